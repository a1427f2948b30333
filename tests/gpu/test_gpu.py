"""On a CUDA device: the same vectors as on the CPU, and the same on every run."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import output_shape, preprocess_for
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import encoded_field
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import JpegForwarder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder
from shard_embedder.pipeline.embedding.embedder import Embedder
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, build_network
from shard_embedder.pipeline.planning.batch_size import best, ladder, measure
from shard_embedder.pipeline.planning.probe import precisions_here, try_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"),
]
COSINE = {"fp32": 0.9999, "bf16": 0.999, "fp16": 0.999}
BACKBONES = ["resnet18", "resnet50_stride1", "resnext101_32x8d", "vit_b_32"]


def embedder(
    backbone: str, device: str, precision: str, batch_size: int = 16, features: str = "pooled", compiled: bool = False
) -> Embedder:
    preprocess = preprocess_for(backbone, "random")
    return Embedder(
        SharedWeights("random:0", "", 0, None),
        Network(backbone=backbone, preprocess=preprocess, features=features),
        Placement(device=device, precision=precision, batch_size=batch_size, compiled=compiled),
        shape=output_shape(backbone, features, preprocess.crop),
        dtype="float32",
    )


def pictures(count: int) -> Any:
    """uint8 RGB of shape [count, 224, 224, 3], no two alike."""
    base = np.random.default_rng(0).integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return np.kron(base, np.ones((1, 32, 32, 1), np.uint8))


def cosine(a: Any, b: Any) -> Any:
    a, b = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize("precision", COSINE)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_device_gives_the_vectors_of_the_cpu(backbone: str, precision: str) -> None:
    images = pictures(20)
    rows = np.arange(20)
    wanted = embedder(backbone, "cpu", "fp32").embed(images, rows)
    got = embedder(backbone, "cuda", precision).embed(images, rows)
    assert cosine(got, wanted).min() >= COSINE[precision]
    centre = wanted.mean(0)
    assert cosine(got - centre, wanted - centre).min() >= (0.999 if precision == "fp32" else 0.9)


def test_convolutions_are_fused_on_the_device() -> None:
    network = Network(backbone="resnet18", preprocess=preprocess_for("resnet18", "random"))
    module = build_network(network, load_weights("resnet18", "random:0")).as_precision(torch.bfloat16).to("cuda")
    plain = module.backbone
    assert module.fused((224, 224)).backbone is not plain


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_compiled_backbone_gives_the_vectors_of_the_eager_one_on_every_call(backbone: str) -> None:
    images, rows = pictures(50), np.arange(50)
    wanted = embedder(backbone, "cuda", "bf16").embed(images, rows)
    actor = embedder(backbone, "cuda", "bf16", compiled=True)
    got = actor.embed(images, rows)
    assert cosine(got, wanted).min() >= COSINE["bf16"]
    for _ in range(3):
        assert np.array_equal(actor.embed(images, rows), got)
    assert np.array_equal(actor.embed(torch.from_numpy(images).cuda(), rows), got)


def test_compiled_backbones_of_one_process_work_side_by_side() -> None:
    images, rows = pictures(20), np.arange(20)
    actors = [embedder(backbone, "cuda", "bf16", compiled=True) for backbone in ("resnet18", "resnet50")]
    first = [actor.embed(images, rows) for actor in actors]
    for actor, wanted in zip(actors, first, strict=True):
        assert np.array_equal(actor.embed(images, rows), wanted)


def test_the_device_is_busy_while_it_computes_and_no_longer() -> None:
    runner = embedder("resnet50", "cuda", "bf16")._runner
    runner.embed(pictures(20), np.arange(20))
    before, start = runner.gpu.busy_s, time.perf_counter()
    runner.embed(pictures(150), np.arange(150))
    wall_s = time.perf_counter() - start
    assert 0.0 < runner.gpu.busy_s - before <= wall_s


def test_a_process_that_loses_its_device_knows_and_one_that_lacked_memory_does_not_think_so() -> None:
    code = (
        "import torch\n"
        "from shard_embedder.pipeline.embedding.gpu import Gpu, lacks_memory\n"
        "gpu = Gpu(torch.device('cuda'))\n"
        "try:\n    torch.empty(2**50, device='cuda')\n"
        "except RuntimeError as error:\n    print(lacks_memory(error), gpu.is_broken())\n"
        "try:\n    torch.zeros(3, device='cuda')[torch.tensor([7], device='cuda')].cpu()\n"
        "except RuntimeError as error:\n    print(lacks_memory(error), gpu.is_broken())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines() == ["True False", "False True"], ran.stderr


def test_feature_maps_come_from_the_device_in_the_order_c_h_w() -> None:
    images, rows = pictures(5), np.arange(5)
    wanted = embedder("resnet18", "cpu", "fp32", features="map").embed(images, rows)
    got = embedder("resnet18", "cuda", "fp32", features="map").embed(images, rows)
    assert got.shape == wanted.shape == (5, 512, 7, 7)
    assert cosine(got, wanted).min() >= 0.9999


@pytest.mark.parametrize("precision", COSINE)
def test_every_run_gives_the_same_bits_whatever_is_in_flight(precision: str) -> None:
    images = pictures(150)
    rows = np.arange(150)
    first = embedder("resnet50", "cuda", precision).embed(images, rows)
    actor = embedder("resnet50", "cuda", precision)
    for _ in range(3):
        assert np.array_equal(actor.embed(images, rows), first)
    # A buffer that is filled again while it is still copied from would show here.
    assert np.array_equal(actor.embed(images, rows[:16]), first[:16])
    assert np.array_equal(actor.embed(images, rows[:3]), first[:3])


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_of_two_threads_get_the_bits_that_each_gets_alone(compiled: bool) -> None:
    """The first batch of one is copied while the last of the other are computed."""
    images, order = pictures(150), np.arange(150)
    actor = embedder("resnet18", "cuda", "bf16", compiled=compiled)
    parts = [order[:70], order[70:], order[::-1], order[:16], order[:1]] * 8
    alone = [actor.embed(images, rows) for rows in parts]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda rows: actor.embed(images, rows), parts))
    assert all(np.array_equal(got, wanted) for got, wanted in zip(together, alone, strict=True))


def test_rows_keep_their_order_over_many_batches() -> None:
    images = pictures(100)
    actor = embedder("resnet18", "cuda", "fp32")
    together = actor.embed(images, np.arange(100))
    backwards = actor.embed(images, np.arange(100)[::-1])
    centre = together.mean(0)
    assert cosine(backwards[::-1] - centre, together - centre).min() > 0.9999


def test_random_weights_leave_the_devices_random_state_as_it_was() -> None:
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    build_backbone("resnet18", "random:4")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_backbone_trains_on_the_device() -> None:
    model = build_backbone("resnet18", "random").to("cuda").train()
    images = torch.randn(4, 3, 64, 64, device="cuda")
    model(images).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def jpeg(seed: int, mode: str = "RGB", size: tuple[int, int] = (500, 375), **options: Any) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpegs() -> list[bytes]:
    """Every kind that is forwarded to the device."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[dict[str, Any]] = [
        {}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"mode": "L"},
        {"exif": exif}, {"restart_marker_rows": 1}, {"size": (61, 437)}, {"size": (3000, 2000)},
    ]  # fmt: skip
    return [jpeg(seed, **options) for seed, options in enumerate(kinds)]


def decoded(images: list[bytes], device: str) -> tuple[Any, dict[int, str]]:
    """Pixels on a device, and the errors of what has none."""
    decoder = Decoder(DecodingRules(preprocess=preprocess_for("resnet18", "random"), max_pixels=10_000_000))
    field = encoded_field()
    encoded = pa.array([JpegForwarder(decoder).forward(image) for image in images], field.type)
    samples = pa.StructArray.from_arrays([encoded], fields=[field])
    found = DeviceDecoder(decoder, device)(samples, np.arange(len(images)), "a part")
    return found.values, found.faults


def test_jpegs_decoded_on_the_device_have_the_embeddings_of_those_decoded_on_the_cpu() -> None:
    images = jpegs()
    wanted, _ = decoded(images, "cpu")
    got, faults = decoded(images, "cuda")
    assert (got.device.type, faults) == ("cuda", {})
    # Colours at half the size may be widened in another way.
    assert float((got.cpu().float() - wanted.float()).abs().mean()) < 3.0
    rows = np.arange(len(images))
    expected = embedder("resnet18", "cpu", "fp32").embed(wanted.numpy(), rows)
    assert cosine(embedder("resnet18", "cuda", "fp32").embed(got, rows), expected).min() >= 0.999


def test_decoding_on_the_device_gives_the_same_bits_every_time() -> None:
    first, _ = decoded(jpegs(), "cuda")
    for _ in range(3):
        assert torch.equal(decoded(jpegs(), "cuda")[0], first)


def test_decoding_beside_a_busy_device_gives_the_bits_of_an_idle_one() -> None:
    """nvJPEG writes from a stream of its own, into memory that may still be read."""
    images = [jpeg(seed, size=(900 - seed, 700)) for seed in range(200)]
    idle, _ = decoded(images, "cuda")
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(200):
        busy = busy @ busy / 8192
    assert torch.equal(decoded(images, "cuda")[0], idle)


def test_a_jpeg_that_no_decoder_takes_costs_only_itself() -> None:
    images = jpegs()
    broken = bytearray(images[0])
    broken[broken.index(b"\xff\xc0") + 12] = 3
    decoder = Decoder(DecodingRules(preprocess=preprocess_for("resnet18", "random"), max_pixels=10_000_000))
    with pytest.raises(SampleError) as expected:
        decoder.decode(bytes(broken))
    pixels, faults = decoded([*images, bytes(broken)], "cuda")
    assert faults == {len(images): str(expected.value)}
    alone, _ = decoded(images, "cuda")
    assert float((pixels[:-1].float() - alone.float()).abs().mean()) < 1.0


def test_a_batch_size_is_measured_and_fits() -> None:
    source = SharedWeights("random:0", "", 0, None)
    preprocess = preprocess_for("resnet50", "random")
    network = Network(backbone="resnet50", preprocess=preprocess)
    runner = source.runner(network, Placement(device="cuda", precision="bf16", batch_size=16))
    sizes = ladder(1024, preprocess.crop, "cuda")
    rates = measure(runner, sizes, 1024, preprocess.crop)
    assert best(rates) in sizes
    assert 0.0 < runner.memory_share() <= 1.0


@pytest.mark.parametrize("compiled", [False, True])
def test_precision_and_batch_size_are_found_on_the_device(compiled: bool) -> None:
    preprocess = preprocess_for("resnet50", "random")
    sizes = ladder(1024, preprocess.crop, "cuda", compiled=compiled)
    precision, rates = try_out(
        SharedWeights("random:0", "", 0, None),
        Network(backbone="resnet50", preprocess=preprocess),
        Placement(device="cuda", compiled=compiled),
        pictures(8),
        precisions_here("cuda"),
        sizes,
        1024,
    )
    # That of random weights moves little.
    assert precision == [*precisions_here("cuda"), "fp32"][0]
    assert best(rates) in sizes
