"""The device decoder's own code on a GPU that is simulated: whatever the order of its streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from shard_embedder.pipeline.decoding.jpeg import read_header
from shard_embedder.pipeline.embedding import device_decode, device_resize
from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder
from tests.conftest import encode, photo
from tests.embedding.simulated_gpu import SimulatedGpu
from tests.embedding.simulated_torch import TorchGpu
from tests.embedding.test_device_decode import decoder, samples_of

SCHEDULES = [(seed, eagerness) for seed in range(6) for eagerness in (0.0, 0.5)]
# The second and the third stream of the GPU are those of the first part that is decoded. `fetch` is to wait for the
# end of a group before its images are freed.
WAITS = ("wait_stream", "fetch", "synchronize 1", "synchronize 2")


NUM_IMAGES, REFUSED = 8, (44, 36)


@pytest.fixture(scope="module", autouse=True)
def _small_groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_resize, "_GROUP_IMAGES", 2)
        yield


@pytest.fixture(scope="module")
def parts() -> list[tuple[pa.StructArray, Any]]:
    """Parts of photos of which the device refuses the last, and the pixels that torch's CPU device makes of them."""
    cpu = decoder()
    made = []
    for number in range(2):
        images = [encode(photo(NUM_IMAGES * number + n, (48, 40))) for n in range(NUM_IMAGES - 1)]
        samples = samples_of([*images, encode(photo(number, REFUSED))], cpu)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_decode, "decode_jpeg", refusing(device_decode.decode_jpeg))
            found = DeviceDecoder(cpu, "cpu")(samples, np.arange(NUM_IMAGES), f"part {number}")
        assert found.num_refused == 1
        made.append((samples, found.values.numpy()))
    return made


def refusing(decode: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """`decode`, which takes no image of the size `REFUSED`. The CPU decodes it, after all groups."""

    def refuse(images: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        for image in images:
            header = read_header(image.numpy().tobytes())
            if header is not None and (header.width, header.height) == REFUSED:
                raise RuntimeError("refused")
        return decode(images, device=device)

    return refuse


def all_right(parts: list[tuple[pa.StructArray, Any]], seed: int, eagerness: float, lacks: str = "") -> bool:
    """Whether parts of two threads are what they are on the CPU, read by the stream that computes."""
    gpu = TorchGpu(seed, eagerness, lacks=lacks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_decode, "decode_jpeg", refusing(gpu.decode_jpeg))
        with gpu.operations():
            device = DeviceDecoder(decoder(), "cuda", gpu)

        def decoded(number: int) -> Any:
            with gpu.operations():
                found = device(parts[number][0], np.arange(NUM_IMAGES), f"{seed} {eagerness} {lacks} {number}")
                return found.values.cpu().numpy()

        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(decoded, range(2)))
    return all(np.array_equal(pixels, expected) for pixels, (_, expected) in zip(found, parts, strict=True))


@pytest.mark.slow
def test_pixels_are_right_in_whatever_order_the_device_works(parts: list[tuple[pa.StructArray, Any]]) -> None:
    assert [schedule for schedule in SCHEDULES if not all_right(parts, *schedule)] == []


@pytest.mark.parametrize("wait", WAITS)
def test_without_any_one_of_the_decoders_waits_pixels_are_wrong(
    parts: list[tuple[pa.StructArray, Any]], wait: str
) -> None:
    assert not all(all_right(parts, *schedule, lacks=wait) for schedule in SCHEDULES)


def test_a_gpu_is_busy_while_it_decodes(parts: list[tuple[pa.StructArray, Any]]) -> None:
    gpu = TorchGpu()
    with pytest.MonkeyPatch.context() as patch, gpu.operations():
        patch.setattr(device_decode, "decode_jpeg", refusing(gpu.decode_jpeg))
        device = DeviceDecoder(decoder(), "cuda", gpu)
        before_ms = gpu.now_ms
        device(parts[0][0], np.arange(NUM_IMAGES), "a part that is timed")
    worked_s = (gpu.now_ms - before_ms) / 1000
    assert 0.5 * worked_s < gpu.busy_s <= worked_s


@pytest.mark.parametrize("seed", range(8))
def test_time_that_two_streams_are_at_work_counts_once(seed: int) -> None:
    gpu = SimulatedGpu(seed)
    spans = []
    for _ in range(2):
        stream = gpu.stream()
        with gpu.using(stream):
            span = gpu.span()
            gpu.launch(stream, lambda: None, takes_ms=5.0)
            span.ended.record()
        spans.append(span)
    gpu.synchronize()
    for span in spans:
        gpu.add_busy(span)
    assert gpu.busy_s == 0.01
