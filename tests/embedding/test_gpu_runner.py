"""The runner's own code on a GPU that is simulated: whatever the order of its work, and whatever fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.core.errors import DeviceError
from shard_embedder.pipeline.core.schema import PIXELS, SAMPLE_INDEX, part_row, part_rows, pixels_field, sample_type
from shard_embedder.pipeline.embedding.embedder import Embedder
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import TorchRunner
from tests.embedding.simulated_gpu import (
    LOST,
    WAITS,
    BreakingSource,
    DeviceTensor,
    SimulatedGpu,
    SimulatedNetwork,
    features_of,
    simulated_runner,
)
from tests.part_values import part_values

CROP = (4, 5)
SCHEDULES = [(seed, eagerness) for seed in range(20) for eagerness in (0.0, 0.3, 0.7)]


def pixels(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, *CROP, 3), dtype=np.uint8)


def on_device(gpu: SimulatedGpu, images: Any) -> DeviceTensor:
    """As the device's decoder gives them: made in a stream of its own, which is waited for."""
    decodes = gpu.stream()
    with gpu.using(decodes):
        tensor = DeviceTensor(gpu, images.shape, torch.uint8)
        tensor[:] = images
    decodes.synchronize()
    return tensor


def all_right(seed: int, eagerness: float, lacks: str = "") -> bool:
    """Whether parts of two threads, from the host and from the device, get their embeddings on such a GPU."""
    gpu = SimulatedGpu(seed, eagerness, lacks=lacks)
    runner = simulated_runner(SimulatedNetwork(gpu, room=3 if seed % 3 == 2 else 8), CROP)
    images, rng = pixels(90, seed), np.random.default_rng(seed)
    parts = [rng.permutation(90)[: rng.integers(1, 90)] for _ in range(6)]
    parts[3].sort()

    def embed(number: int) -> Any:
        return runner.embed(images if number % 4 < 2 else on_device(gpu, images), parts[number])

    with ThreadPoolExecutor(2) as threads:
        embedded = list(threads.map(embed, range(len(parts))))
    return all(np.array_equal(got, features_of(images[rows])) for got, rows in zip(embedded, parts, strict=True))


@pytest.mark.slow
def test_embeddings_are_right_in_whatever_order_the_device_works() -> None:
    assert [schedule for schedule in SCHEDULES if not all_right(*schedule)] == []


@pytest.mark.parametrize("wait", WAITS)
def test_without_any_one_of_the_runners_waits_embeddings_are_wrong(wait: str) -> None:
    assert not all(all_right(*schedule, lacks=wait) for schedule in SCHEDULES)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
        ),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA ran out of memory outside PyTorch's allocator."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:80],
)
def test_whoever_lacks_memory_gets_half_of_the_batch(error: RuntimeError) -> None:
    images, rows = pixels(30), np.arange(30)[::-1]
    gpu = SimulatedGpu()
    network = SimulatedNetwork(gpu, errors={3: error})
    runner = simulated_runner(network, CROP)
    assert np.array_equal(runner.embed(images, rows), features_of(images[rows]))
    assert runner.batch_size == 4
    assert network.sizes == [8] * 3 + [4] * 8


def test_a_host_that_has_no_memory_for_the_device_to_copy_from_gets_half_of_the_batch() -> None:
    gpu = SimulatedGpu()
    gpu.pinned_errors = [torch.AcceleratorError("CUDA error: out of memory")] * 2
    runner = simulated_runner(SimulatedNetwork(gpu), CROP)
    assert np.array_equal(runner.embed(pixels(9), np.arange(9)), features_of(pixels(9)))
    assert runner.batch_size == 2


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(LOST),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("expected scalar type Half but found Float"),
    ],
)
def test_any_other_error_is_raised_at_once(error: RuntimeError) -> None:
    network = SimulatedNetwork(SimulatedGpu(), errors={2: error})
    runner = simulated_runner(network, CROP)
    with pytest.raises(RuntimeError) as raised:
        runner.embed(pixels(30), np.arange(30))
    assert raised.value is error
    assert (runner.batch_size, network.sizes) == (8, [8, 8])


@pytest.mark.parametrize(("total_bytes", "batch_size"), [(25_300_000_000, 128), (42_300_000_000, 256)])
def test_a_card_of_40_gb_takes_larger_batches(total_bytes: int, batch_size: int) -> None:
    network = SimulatedNetwork(SimulatedGpu(total_bytes=total_bytes))
    assert simulated_runner(network, CROP, batch_size=None).batch_size == batch_size


def part(count: int) -> pa.Table:
    """A part as the decoder gives it."""
    images = [{SAMPLE_INDEX: index, PIXELS: image.reshape(-1)} for index, image in enumerate(pixels(count))]
    samples = pa.array(images, sample_type(pixels_field(*CROP), ()))
    return part_row(part_values(name="shard", part=0, num_samples=count, fault=None), samples)


def embedder(source: Any, **options: Any) -> Embedder:
    network = Network(backbone="resnet18", preprocess=preprocess_for("resnet18", "random").with_size(CROP))
    return Embedder(source, network, Placement(), shape=(3,), dtype="float32", **options)


class Runners:
    """A source that gives a runner which is there already."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def runner(self, network: Network, placement: Placement) -> Any:
        return self._runner


@pytest.mark.parametrize("eagerness", [0.0, 1.0])
def test_a_gpu_is_busy_while_it_computes_and_not_while_the_host_is_at_work(eagerness: float) -> None:
    gpu = SimulatedGpu(eagerness=eagerness)
    actor = embedder(Runners(simulated_runner(SimulatedNetwork(gpu), CROP)))
    busy_s = []
    for count in (30, 8):
        gpu.now_ms += 60_000
        ((values, _),) = part_rows(actor(part(count)))
        busy_s.append(values["embed_s"])
        actor.embed(pixels(5), np.arange(5))
    # Of a batch two kernels of 5 ms and the copy of 1 ms of what they give; in its last place, what was not a part's.
    copied_s = 0.001 * 4 if eagerness == 0.0 else 0.0
    assert busy_s[0] == pytest.approx(4 * 0.011, abs=copied_s + 1e-9)
    assert busy_s[1] == pytest.approx(0.011, abs=copied_s + 1e-9)


def test_a_cpu_is_busy_while_a_part_is_under_way() -> None:
    class Slow:
        gpu = None
        batch_size = 8

        def embed(self, images: Any, rows: Any) -> Any:
            time.sleep(0.05)
            return features_of(images[rows])

    ((values, _),) = part_rows(embedder(Runners(Slow()))(part(3)))
    assert values["embed_s"] >= 0.05


def test_an_embedder_in_the_callers_process_raises_what_breaks_its_gpu(tmp_path: Path) -> None:
    actor = embedder(BreakingSource(tmp_path, at=2, num_broken=1, width=3))
    actor(part(3))
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"^this process can use its GPU no more: CUDA .*red$"):
            actor(part(3))


# Two processes forked from one that has imported what takes them longest: one GPU breaks in the first part.
BREAKING = """
import os, sys
from pathlib import Path
from tests.embedding.test_gpu_runner import *
for at in (1, 2):
    print(f"at {at}:", file=sys.stderr, flush=True)
    process = os.fork()
    if process == 0:
        folder = Path(sys.argv[1], str(at))
        folder.mkdir()
        actor = embedder(BreakingSource(folder, at=at, num_broken=1, width=3), ends_process=True)
        try:
            actor(part(3))
            actor(part(3))
        except DeviceError:
            print("raised", flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_process_of_its_own_ends_with_its_gpu_but_not_before_it_has_embedded_a_part(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BREAKING, str(tmp_path)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.split()) == (0, ["raised", "0", "1"]), ran.stderr
    first, second = ran.stderr.split("at 2:")
    said = "this process can use its GPU no more: CUDA error: an illegal memory access was encountered; it ends"
    assert said not in first
    assert said in second


class Threads(torch.nn.Module):
    """A network that notes the thread it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def as_precision(self, dtype: torch.dtype) -> Threads:
        return self

    @torch.compiler.disable
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.add(threading.current_thread().name)
        return images.float().flatten(1)[:, :3]


@pytest.mark.slow
def test_all_compiled_runners_of_a_process_share_one_thread() -> None:
    networks = [Threads(), Threads(), Threads()]
    for network in networks:
        TorchRunner(network, CROP, Placement(compiled=network is not networks[0])).embed(pixels(3), np.arange(3))
    assert len(networks[1].seen) == 1
    assert networks[1].seen == networks[2].seen
    assert networks[0].seen.isdisjoint(networks[1].seen)


@pytest.mark.slow
def test_fp32_is_fp32_whatever_the_image_asks_for() -> None:
    code = (
        "import os, torch\n"
        "from shard_embedder.pipeline.embedding.network import Placement\n"
        "from shard_embedder.pipeline.embedding.torch_runner import TorchRunner\n"
        "class Network(torch.nn.Module):\n"
        "    def as_precision(self, dtype):\n        return self\n"
        "flags = lambda: [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]\n"
        "print(flags())\n"
        "TorchRunner(Network(), (8, 8), Placement(precision='fp32'))\n"
        "print(flags(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)\n"
        "print(torch.get_float32_matmul_precision(), os.environ.get('NVIDIA_TF32_OVERRIDE'))\n"
    )
    asked = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "NVIDIA_TF32_OVERRIDE": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", code]
    ran = subprocess.run(command, env=asked, check=False, capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines() == [
        "['tf32', 'tf32']", "['ieee', 'ieee'] False False", "highest None",
    ], ran.stderr  # fmt: skip
