"""The job from Python: shards in, Parquet out, and a typed result."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.storage import join, locate
from shard_embedder.pipeline.output.lease import Lease, hold
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS
from shard_embedder.pipeline.planning.job import match_output, pack_input, prepare_job
from shard_embedder.pipeline.planning.plan import check_names, make_plan
from shard_embedder.pipeline.run.in_process import InProcess
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.run.report import has_incomplete_shards


@dataclass(frozen=True)
class Run:
    """The result of a run: the counts of its shards, and where its rows are.

    `report` is the whole of `report.json`. A run is `complete` when every sample of its shards is one stored row and
    every shard was read to its end.
    """

    output: str
    num_samples: int
    num_embedded: int
    num_errors: int
    errors_by_reason: dict[str, int]
    broken_shards: dict[str, str]
    report: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool(self.report["balanced"]) and not has_incomplete_shards(self.report)

    @property
    def embeddings(self) -> ds.Dataset:
        """All stored embeddings of the output, as a pyarrow dataset: those of earlier runs, too."""
        return _dataset(self.output, EMBEDDINGS)

    @property
    def errors(self) -> ds.Dataset:
        """All samples of the output that have no embedding, each with its reason."""
        return _dataset(self.output, ERRORS)


def embed(input: str | Path | list[str | Path], output: str | Path, *, on_ray: bool = False, **settings: Any) -> Run:
    """Embed every image of WebDataset shards into Parquet, or resume an earlier run.

    Args:
        input: shards: a `.tar`, a brace range, a glob, a folder, a `.txt` list, or several of these. Or a local
            folder of images, which is packed into shards in the folder `packed` of the output.
        output: folder or `s3://` prefix of the result.
        on_ray: run on the Ray that this process is connected to, or on one started on this machine for as long as
            the process lives. Otherwise the stages run one after the other in this process.
        **settings: the job's options by their names in Python: `backbone="resnet50"`, `keep=["json:caption"]`.

    Raises:
        SettingsError: an option, the input, the weights or the output do not allow the run.
        OutputBusyError: another run holds the output.
        ClusterError: Pillow or pillow-heif is too old here, or the cluster lacks what the job needs.
        StoreError: the disk or the object store failed; run it again to resume.
    """
    inputs = [os.fspath(one) for one in ([input] if isinstance(input, (str, Path)) else input)]
    config = parse({"input": inputs, "output": os.fspath(output), **settings})
    executor = closing(OnRay()) if on_ray else nullcontext(_in_process(config.device))
    job = prepare_job(config)
    with hold(job.config.output, lambda why: None, job.run) as lease, executor as chosen:
        job = pack_input(match_output(job), lambda *_: lease.check())
        plan = make_plan(job.shards, job.config.output)
        check_names(job, plan)
        report = run(job, plan, _watcher(lease), chosen)
    return Run(
        output=job.config.output,
        num_samples=report["samples"],
        num_embedded=report["embedded"],
        num_errors=report["errors"],
        errors_by_reason=report["errors_by_reason"],
        broken_shards=report["broken_shards"],
        report=report,
    )


def _in_process(device: str) -> InProcess:
    # torch takes seconds to import, and on a cluster the workers need it first.
    from shard_embedder.pipeline.embedding.torch_runner import device_here  # noqa: PLC0415

    return InProcess(device_here(device))


def _watcher(lease: Lease) -> Watcher:
    """Shows nothing, and ends the run when its lease is lost."""
    return Watcher(
        on_resources=lambda *_: lease.confirm(),
        on_pass=lambda *_: lease.confirm(),
        on_part=lambda _: lease.check(),
        on_end=lease.confirm,
    )


def _dataset(output: str, folder: str) -> ds.Dataset:
    fs, path = locate(join(output, folder))
    return ds.dataset(path, filesystem=fs, format="parquet", exclude_invalid_files=False)
