"""What one process can measure: each stage alone, PIL and torchvision beside them, and the GPU by mode.

Run as `python -m benchmarks.stages NAME SETTINGS`: a process of its own leaves no threads and caches to what is
measured next. All times are wall-clock, after one call that is not counted.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torchvision.models import get_model_weights

from benchmarks.decoding import decode_part, num_samples, prepare_decoding, read_samples
from benchmarks.runs import LARGE_KB, Settings, print_result
from benchmarks.shards import LARGE_MEGAPIXELS, large_photos
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.schema import IMAGE, REASON, part_rows
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import JpegForwarder
from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder
from shard_embedder.pipeline.embedding.embedder import PARTS_AT_ONCE, Embedder
from shard_embedder.pipeline.embedding.network import Placement
from shard_embedder.pipeline.output.parts import PartWriter
from shard_embedder.pipeline.planning.engine import Engine, choose_engine
from shard_embedder.pipeline.planning.job import Job, prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.probe import precisions_here
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader

# Parts of this size go to the processes that decode at once, so that none waits long for the last one.
_PART_ROWS = 32
_GPU_BATCHES = (128, 256, 512)
# A rate is of so many seconds at least: a GPU is done with a part in some hundredths.
_LEAST_S = 1.0
_LARGE_ROUNDS = 5


class Stages:
    """The stages of one job, built as the flow builds them but in this process."""

    def __init__(self, settings: Settings, shards: str) -> None:
        self.settings = settings
        self.job, self.pending = _look_up(settings, shards)
        self.reader = SampleReader(self.job.config)
        self.decoder = _decoder(self.job)

    @cached_property
    def engine(self) -> Engine:
        """What embeds, chosen as the job does; not for who only reads and decodes, as its trial takes seconds."""
        device = self.settings.device
        return choose_engine(self.job, self.pending, device, precisions_here(device))

    @property
    def precision(self) -> str:
        """That of the engine."""
        return self.engine.precision

    @cached_property
    def writer(self) -> PartWriter:
        """The write stage."""
        made = self.job.with_engine(self.engine.name, self.precision)
        return PartWriter(made.config, made.fingerprint, made.shape)

    def decode(self, table: pa.Table) -> pa.Table:
        """Parts with pixels of parts with images."""
        return pa.concat_tables(self.decoder(table))

    def embedder(
        self,
        num_threads: int,
        batch_size: int | None = None,
        precision: str | None = None,
        compiled: bool = False,
    ) -> Embedder:
        """An embedder like those of the job."""
        placement = Placement(
            device=self.settings.device,
            precision=precision or self.precision,
            batch_size=batch_size,
            num_threads=None if self.settings.device == "cuda" else num_threads,
            compiled=compiled,
        )
        job = self.job
        return Embedder(self.engine.source, job.network, placement, shape=job.shape, dtype=job.config.dtype)

    def samples(self, most: int) -> list[pa.Table]:
        """Parts of the first shards as they leave the reader, with about `most` images in all."""
        return read_samples(self.reader, self.pending, most)


def _look_up(settings: Settings, shards: str) -> tuple[Job, list[Pending]]:
    job = prepare_job(settings.config(shards, f"{settings.scratch}/{Path(shards).name}-{settings.part_rows}"))
    return job, make_plan(job.shards, job.config.output).pending


def _decoder(job: Job) -> Decoder:
    return Decoder(job.rules)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rate(call: Callable[[], object], num_images: int) -> float:
    """Images/s of calls one after the other, each of which works on so many."""
    num_calls, start = 0, time.perf_counter()
    while num_calls == 0 or time.perf_counter() - start < _LEAST_S:
        call()
        num_calls += 1
    return num_calls * num_images / (time.perf_counter() - start)


def stages(settings: Settings) -> dict[str, float | str]:
    """Each stage alone on the photos: read and write by one core, decode by one and by all, the backbone by all."""
    return {**read(settings), **decode(settings), **decode_all(settings), **embed_and_write(settings)}


def read(settings: Settings) -> dict[str, float | str]:
    """Tar to samples, of all photo shards, with the files in the page cache."""
    stages = Stages(settings, settings.shards)

    def read_all() -> int:
        return sum(num_samples([table]) for shard in stages.pending for table in stages.reader.parts(shard))

    num_images = read_all()
    seconds = _timed(read_all)
    num_bytes = sum(shard.num_bytes for shard in stages.pending)
    return {"read_images_per_s": num_images / seconds, "read_mb_per_s": num_bytes / 1e6 / seconds}


def decode(settings: Settings) -> dict[str, float | str]:
    """The decoder on one core, and what it stands for: PIL and `weights.transforms()`, torch with one thread."""
    stages = Stages(settings, settings.shards)
    torch.set_num_threads(1)
    tables = stages.samples(settings.stage_images)
    images = [
        image for table in tables for _, samples in part_rows(table) for image in samples.field(IMAGE).to_pylist()
    ]
    transform = plain_transform(stages.job)

    def plain(data: bytes) -> object:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    stages.decode(tables[0])
    plain(images[0])
    # Halves of each in turn, so that what else happens on the machine meets both.
    ours_s = plain_s = 0.0
    for table in tables:
        data = [image for _, samples in part_rows(table) for image in samples.field(IMAGE).to_pylist()]
        ours_s += _timed(lambda table=table: stages.decode(table))  # type: ignore[misc]
        plain_s += _timed(lambda data=data: [plain(image) for image in data])  # type: ignore[misc]
    return {"decode_images_per_s": len(images) / ours_s, "decode_pil_images_per_s": len(images) / plain_s}


def large(settings: Settings) -> dict[str, float | str]:
    """One core, large photos by their size in kB at 12 megapixels: the decoder, and it with `--decode scaled`."""
    rules = _look_up(settings, settings.shards)[0].rules
    decoders = {"exact": Decoder(rules), "scaled": Decoder(replace(rules, scaled=True))}
    results: dict[str, float | str] = {}
    for kb in LARGE_KB:
        photos = large_photos(1000 * kb * settings.large_megapixels // LARGE_MEGAPIXELS, settings.large_megapixels)
        seconds = dict.fromkeys(decoders, 0.0)
        # Photo by photo in turn, so that what else happens on the machine meets both; the first round is not counted.
        for number, photo in enumerate(photos * (1 + _LARGE_ROUNDS)):
            for name, decoder in decoders.items():
                elapsed = _timed(lambda decoder=decoder, photo=photo: decoder.decode(photo))  # type: ignore[misc]
                seconds[name] += elapsed if number >= len(photos) else 0.0
        num_images = len(photos) * _LARGE_ROUNDS
        results |= {f"large_{kb}_kb_{name}_images_per_s": num_images / seconds[name] for name in decoders}
    return results


def plain_transform(job: Job) -> Callable[[Image.Image], torch.Tensor]:
    """`weights.transforms()` of the backbone at the job's size."""
    preprocess = job.network.preprocess
    try:
        weights: Any = get_model_weights(job.network.backbone).DEFAULT
    except ValueError as error:
        raise SettingsError(f"backbone must be one of torchvision's, got {job.network.backbone!r}") from error
    transform: Callable[[Image.Image], torch.Tensor] = weights.transforms(
        crop_size=preprocess.crop[0], resize_size=preprocess.resize
    )
    return transform


def decode_all(settings: Settings) -> dict[str, float | str]:
    """The decoder in as many processes as there are cores, together."""
    stages = Stages(replace(settings, part_rows=_PART_ROWS), settings.shards)
    context = multiprocessing.get_context("spawn")
    of_each = (stages.reader, stages.decoder, stages.pending, settings.stage_images, context.Barrier(settings.cores))
    num_parts = max(settings.stage_images // _PART_ROWS, 4) * settings.cores
    with ProcessPoolExecutor(settings.cores, context, prepare_decoding, of_each) as pool:
        # The pool starts its processes as work comes; each passes the barrier only with all the others.
        list(pool.map(decode_part, range(settings.cores)))
        start = time.perf_counter()
        decoded = list(pool.map(decode_part, range(num_parts)))
        seconds = time.perf_counter() - start
    num_images, core_s = (sum(column) for column in zip(*decoded, strict=True))
    return {
        "decode_all_images_per_s": num_images / seconds,
        "decode_all_core_ms_per_image": 1000 * core_s / num_images,
    }


def device_decode(settings: Settings) -> dict[str, float | str]:
    """What `--decode gpu` does, on the job's device: what is left for one core, and the device's own part.

    The latter is from a JPEG in host memory to pixels as the backbone takes them, by two threads as in the job's
    actor; so it stands beside what `decode_all` measures of the cores.
    """
    stages = Stages(settings, settings.shards)
    forwarder = JpegForwarder(stages.decoder)
    decoder = DeviceDecoder(stages.decoder, settings.device)
    tables = stages.samples(settings.stage_images)
    list(forwarder(tables[0]))
    forwarded: list[pa.Table] = []
    forward_s = _timed(lambda: forwarded.extend(itertools.chain.from_iterable(map(forwarder, tables))))

    def on_device(numbered: tuple[int, pa.Table]) -> None:
        number, table = numbered
        for _, samples in part_rows(table):
            pixels = decoder(samples, np.flatnonzero(samples.field(REASON).is_null()), f"{number} of the benchmark")
            # A device answers before it is done.
            pixels.values.sum().item()

    num_images = num_samples(tables)
    with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
        work = list(enumerate(forwarded * PARTS_AT_ONCE))
        list(threads.map(on_device, work[:PARTS_AT_ONCE]))
        rate = _rate(lambda: list(threads.map(on_device, work)), PARTS_AT_ONCE * num_images)
    return {"device_decode_images_per_s": rate, "device_decode_forward_images_per_s": num_images / forward_s}


def embed_and_write(settings: Settings) -> dict[str, float | str]:
    """The embed stage with all cores, or on the GPU, and the write stage on one core."""
    stages = Stages(settings, settings.shards)
    embedder = stages.embedder(settings.cores)
    decoded = [stages.decode(table) for table in stages.samples(settings.stage_images)]
    num_images = num_samples(decoded)
    embedder(decoded[0])
    embedded: list[pa.Table] = []

    def embed() -> None:
        embedded[:] = [embedder(table) for table in decoded]

    rate = _rate(embed, num_images)
    stages.writer(embedded[0])
    written: list[pa.Table] = []
    write_s = _timed(lambda: written.extend(stages.writer(table) for table in embedded))
    num_bytes = sum(sum(table.column("written_bytes").to_pylist()) for table in written)
    return {
        "model_images_per_s": rate,
        "write_images_per_s": num_images / write_s,
        "write_mb_per_s": num_bytes / 1e6 / write_s,
        "precision": stages.precision,
    }


def tiny_work(settings: Settings) -> dict[str, float | str]:
    """All stages of tiny shards in a row, by one process with one thread: what a shard costs without an engine."""
    stages = Stages(settings, settings.tiny)
    embedder = stages.embedder(1)
    shards = stages.pending[: max(10, min(200, len(stages.pending)))]

    def run(shard: Pending) -> None:
        for table in stages.reader.parts(shard):
            stages.writer(embedder(stages.decode(table)))

    def run_all() -> None:
        for shard in shards:
            run(shard)

    run(shards[0])
    seconds = _timed(run_all)
    return {"tiny_work_ms_per_shard": 1000 * seconds / len(shards)}


def gpu(settings: Settings) -> dict[str, float | str]:
    """The backbone on a GPU by precision and batch, from uint8 pixels in host memory; and host to device alone."""
    stages = Stages(settings, settings.shards)
    results: dict[str, float | str] = {}
    for precision in ("fp32", "bf16", "fp16"):
        results |= _model_rates(stages, precision)
    host = torch.empty(256 * 2**20, dtype=torch.uint8).pin_memory()
    device = torch.empty_like(host, device="cuda")

    def copy() -> None:
        for _ in range(16):
            device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return {**results, "host_to_device_gb_per_s": 16 * host.numel() / 1e9 / _timed(copy)}


def compiled(settings: Settings) -> dict[str, float | str]:
    """The same of the backbone as `--compile` has it, in bf16, and the seconds until it is ready."""
    return {**_model_rates(Stages(settings, settings.shards), "bf16", compiled=True)}


def _model_rates(stages: Stages, precision: str, *, compiled: bool = False) -> dict[str, float]:
    """Images/s by batch size."""
    settings = stages.settings
    height, width = stages.job.network.preprocess.crop
    rates: dict[str, float] = {}
    for batch in _GPU_BATCHES:
        name = f"model_{precision}{'_compiled' if compiled else ''}_batch_{batch}"
        pixels = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
        rows = np.tile(np.arange(batch), 8)
        start = time.perf_counter()
        embedder = stages.embedder(settings.cores, batch, precision, compiled)
        embedder.embed(pixels, rows[: 2 * batch])
        if compiled:
            rates[f"{name}_ready_s"] = time.perf_counter() - start
        rates[f"{name}_images_per_s"] = _rate(partial(embedder.embed, pixels, rows), len(rows))
        del embedder
        torch.cuda.empty_cache()
    return rates


_MEASUREMENTS = {
    function.__name__: function
    for function in (stages, decode, large, decode_all, device_decode, embed_and_write, tiny_work, gpu, compiled)
}


if __name__ == "__main__":
    print_result(_MEASUREMENTS[sys.argv[1]](Settings.parse(sys.argv[2])))
