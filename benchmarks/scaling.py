"""Strong scaling without devices: the flow with backbones that sleep for as long as a device would compute.

Run as `python -m benchmarks.scaling NAME SETTINGS`. All is what the job does, on as many logical CPUs as it takes,
except for the backbone (`benchmarks/sleep.py`). The stored Parquet tells which actor was busy when.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import ray
from PIL import Image

from benchmarks.runs import Settings, print_result
from benchmarks.sleep import SleepSource, Start
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.run.tally import Tally, slowest_stage

ACTORS = (1, 2, 4, 8, 16)
# A shard is a part and a block: images of so many bytes, which are light to decode.
IMAGES_A_SHARD = 256
_IMAGE_BYTES = 131_072
_SIDE = 32
# Images/s of one sleeping actor: 8 s a part, as long as 16 of them can be fed by two cores.
_RATE = 32.0
_PARTS_AN_ACTOR = 6
# Of the logical CPUs, beside what the actors reserve.
_OTHER_CPUS = 4


@dataclass(frozen=True)
class Batch:
    """What one actor embedded at once; times in seconds after the run began."""

    actor: int
    came: float
    begin: float
    end: float
    num_images: int


def num_ahead(batches: list[Batch]) -> int:
    """Of them, those whose actor had them before it was done with the one before."""
    ordered = sorted(batches, key=lambda one: (one.actor, one.begin))
    return sum(last.actor == one.actor and one.came < last.end for last, one in pairwise(ordered))


@dataclass(frozen=True)
class Scaled:
    """One run: its batches, and what its report would say."""

    batches: list[Batch]
    slowest_stage: str
    busy: dict[str, float]

    @property
    def window(self) -> tuple[float, float]:
        """From the moment by which every actor had begun to that at which the first had no more to do."""
        actors = {batch.actor for batch in self.batches}
        begin = max(min(one.begin for one in self.batches if one.actor == actor) for actor in actors)
        end = min(max(one.end for one in self.batches if one.actor == actor) for actor in actors)
        return begin, end

    @property
    def images_per_s(self) -> float:
        """Images embedded in the window, by its length; of a batch as much as lies within."""
        begin, end = self.window
        return sum(
            one.num_images * max(0.0, min(one.end, end) - max(one.begin, begin)) / max(one.end - one.begin, 1e-9)
            for one in self.batches
        ) / max(end - begin, 1e-9)

    @property
    def num_actors(self) -> int:
        """Actors that embedded anything."""
        return len({batch.actor for batch in self.batches})


def light_shards(folder: Path, num_shards: int, images_a_shard: int = IMAGES_A_SHARD) -> None:
    """Write shards that are heavy to read and light to decode; on disk they are one file with many names."""
    buffer = io.BytesIO()
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((_SIDE, _SIDE)).save(buffer, "JPEG")
    image = buffer.getvalue().ljust(_IMAGE_BYTES, b"\0")
    folder.mkdir(parents=True)
    first = folder / "light-00000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(images_a_shard):
            info = tarfile.TarInfo(f"{row:05d}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    for number in range(1, num_shards):
        os.link(first, folder / f"light-{number:05d}.tar")


def scaled(shards: Path, output: Path, num_actors: int, images_per_s: float) -> Scaled:
    """Run the flow over `shards` with actors that embed `images_per_s` each, on the Ray that is up.

    They begin together, each once it has a part.
    """
    config = Config(
        input=(str(shards),),
        output=str(output),
        backbone="squeezenet1_1",
        weights="random:0",
        image_size=(_SIDE, _SIDE),
        device="cpu",
        precision="fp32",
        part_rows=IMAGES_A_SHARD,
        actors=(num_actors, num_actors),
    )
    prepared = replace(prepare_job(config).with_engine("sleep", "fp32"), shape=(4,))
    pending = make_plan(prepared.shards, config.output).pending
    resources = plan_resources(config)
    tally = Tally()
    with TemporaryDirectory() as folder:
        source = SleepSource(images_per_s, time.time(), Start(Path(folder), num_actors))
        flow = make_flow(pending, prepared, source, resources)
        for table in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for receipt in table.to_pylist():
                tally.add(receipt)
    slowest, busy = slowest_stage(tally.stage_s, resources.slots, tally.wall_s)
    return Scaled(_batches(output), slowest, busy)


def _batches(output: Path) -> list[Batch]:
    table = ds.dataset(output / "embeddings", format="parquet").to_table(["embedding"])
    rows, counts = np.unique(vectors(table), axis=0, return_counts=True)
    return [
        Batch(int(actor), float(came), float(begin), float(end), int(count))
        for (actor, came, begin, end), count in zip(rows, counts, strict=True)
    ]


def scaling(settings: Settings) -> dict[str, Any]:
    """Images/s of 1 to 16 actors, what as many would do if none ever waited, and which stage was the slowest."""
    found: dict[str, Any] = {"scaling_actor_images_per_s": _RATE}
    with TemporaryDirectory(dir=_folder(settings)) as folder:
        for num_actors in ACTORS:
            shards, output = Path(folder) / f"in-{num_actors}", Path(folder) / "out"
            light_shards(shards, num_actors * _PARTS_AN_ACTOR)
            run = scaled(shards, output, num_actors, _RATE)
            if run.num_actors != num_actors:
                raise RuntimeError(f"of {num_actors} actors {run.num_actors} embedded anything")
            found |= {
                f"scaling_{num_actors}_images_per_s": run.images_per_s,
                f"scaling_{num_actors}_linear_images_per_s": num_actors * _RATE,
                f"scaling_{num_actors}_parts_ahead": num_ahead(run.batches) / len(run.batches),
                f"scaling_{num_actors}_slowest_stage": run.slowest_stage,
                **{f"scaling_{num_actors}_{stage}_busy": share for stage, share in run.busy.items()},
            }
            rmtree(output)
    return found


def _folder(settings: Settings) -> str:
    Path(settings.scratch).mkdir(parents=True, exist_ok=True)
    return settings.scratch


if __name__ == "__main__":
    ray.init(
        address="local",
        num_cpus=_OTHER_CPUS + max(ACTORS) // 3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    print_result(scaling(Settings.parse(sys.argv[2])))
    ray.shutdown()
