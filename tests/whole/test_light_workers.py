"""What planning and the workers load that read, decode and write: each of them takes the time and memory for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ray.cloudpickle

from shard_embedder.pipeline.core.schema import SHARD_SCHEMA
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.flow import decode, read, write
from shard_embedder.pipeline.output.parts import PartWriter
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import write_shards
from tests.outputs import job_for

ROOT = Path(__file__).resolve().parents[2]
# As a worker of Ray, which has loaded Ray Data before its task comes.
WORKER = """
import pickle, sys
import pyarrow as pa
import ray.data
import shard_embedder.pipeline.planning.plan
read, reader, decode, decoder, write, writer, shards, schema = pickle.load(open(sys.argv[1], "rb"))
(samples,) = read(pa.Table.from_pylist(shards, schema=schema), reader)
(decoded,) = decode(samples, decoder)
print(decoded["num_samples"].to_pylist(), sorted({"torch", "torchvision", "timm", "openvino"} & sys.modules.keys()))
"""


def test_planning_and_workers_that_read_decode_and_write_load_no_backbone(tmp_path: Path) -> None:
    job = job_for(write_shards(tmp_path / "in", num_shards=1, samples_each=2), tmp_path / "out")
    shards = [shard._asdict() for shard in make_plan(job.shards, job.config.output).pending]
    tasks = (read, SampleReader(job.config), decode, Decoder(job.rules))
    tasks += (write, PartWriter(job.config, job.fingerprint, job.shape))
    (tmp_path / "task").write_bytes(ray.cloudpickle.dumps((*tasks, shards, SHARD_SCHEMA)))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "task")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[2] []"
