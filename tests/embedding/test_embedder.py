"""The embedder in process: tables of pixels in, tables of embeddings out, row for row."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from shard_embedder.pipeline.backbones import build_backbone, library_of
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
    IMAGE_ID,
    PIXELS,
    REASON,
    SAMPLE_INDEX,
    STAGE,
    STAGE_DECODE,
    STAGE_EMBED,
    part_row,
    part_rows,
    pixels_field,
    sample_type,
    with_payload,
)
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.embedding.embedder import Embedder, Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, build_network
from tests.embedding.pictures import SIDE, pictures, preprocess, torch_state
from tests.part_values import part_values
from tests.processor import require_openvino

pytestmark = pytest.mark.usefixtures("one_thread")
KEEP = (("caption", "string"),)
OWN = preprocess("squeezenet1_1")


@pytest.fixture(params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: `embedder` makes its embedders of it."""
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    monkeypatch.setitem(ENGINE, "name", request.param)
    name: str = request.param
    return name


ENGINE = {"name": "torch"}


@lru_cache(maxsize=1)
def random_state(backbone: str) -> Any:
    """Random weights, drawn once for the tests that follow on each other."""
    state = build_backbone(backbone, "random:0").state_dict()
    # Its library's own names, in which timm has no such prefix.
    return {key.removeprefix("model."): value for key, value in state.items()}


@lru_cache(maxsize=2)
def random_source(engine: str, network: Network) -> Source:
    """What computes `network` with random weights, converted once."""
    return source_of(engine, network, Weights("random:0", "", random_state(network.backbone)))


@lru_cache(maxsize=3)
def random_embedder(engine: str, network: Network, placement: Placement, dtype: str) -> Embedder:
    """An embedder with random weights, compiled once."""
    return embedder_of(random_source(engine, network), network, placement, dtype)


def embedder_of(source: Source, network: Network, placement: Placement, dtype: str) -> Embedder:
    shape = library_of(network.backbone).output_shape(network.backbone, network.features, network.preprocess.crop)
    return Embedder(source, network, placement, shape=shape, dtype=dtype)


def source_of(engine: str, network: Network, weights: Weights) -> Source:
    if engine == "torch":
        return SharedWeights.of(weights)
    from shard_embedder.pipeline.embedding.openvino_graph import convert

    return convert(build_network(network, weights), network.preprocess.crop)


@pytest.fixture(scope="module", autouse=True)
def _sources_given_back() -> Iterator[None]:
    yield
    for kept in (random_embedder, random_source, random_state):
        kept.cache_clear()


def embedder(
    backbone: str = "squeezenet1_1", *, side: int = SIDE, weights: Weights | None = None, **options: Any
) -> Embedder:
    """An embedder as the flow makes one, with random weights, on the CPU."""
    given = {"preprocess": preprocess(backbone, side), "dtype": "float32", "batch_size": 16} | options
    fields = ("features", "preprocess", "normalize")
    network = Network(backbone=backbone, **{name: given.pop(name) for name in fields if name in given})
    dtype, name = given.pop("dtype"), ENGINE["name"]
    placement = Placement(**given)
    if name == "openvino":
        require_openvino(placement.precision)
    if weights is None:
        return random_embedder(name, network, placement, dtype)
    return embedder_of(source_of(name, network, weights), network, placement, dtype)


def part(pixels: list[Any], number: int = 0, side: int = SIDE) -> pa.Table:
    """A part as the decoder gives it: None stands for a sample that has a reason already."""
    payload = pixels_field(side, side)
    flat = [np.zeros(side * side * 3, np.uint8) if image is None else image.reshape(-1) for image in pixels]
    failed = [image is None for image in pixels]
    rows = pa.array(
        [
            {
                SAMPLE_INDEX: index,
                IMAGE_ID: f"{number}/{index}",
                "member": f"{index}.jpg",
                STAGE: STAGE_DECODE if bad else None,
                REASON: "broken image: for the test" if bad else None,
                "keep:caption": f"caption {index}",
            }
            for index, bad in enumerate(failed)
        ],
        sample_type(payload, KEEP),
    )
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(np.concatenate([np.zeros(0, np.uint8), *flat])), type=payload.type, mask=pa.array(failed, pa.bool_())
    )
    return part_row(numbered(number, len(pixels)), with_payload(rows, payload, **{PIXELS: column}))


def numbered(number: int, num_samples: int) -> dict[str, Any]:
    return part_values(name=f"shard-{number}", part=number, num_samples=num_samples, fault=None)


def embeddings(samples: pa.StructArray) -> Any:
    """Stored embeddings [rows, C]; rows without one are zeros."""
    column = samples.field(EMBEDDING)
    width = column.type.list_size
    return np.array([row.as_py() or [0.0] * width for row in column], np.float64).reshape(len(samples), width)


def embed(actor: Embedder, pixels: list[Any]) -> Any:
    ((_, samples),) = part_rows(actor(part(pixels, side=actor._crop[0])))
    return embeddings(samples)


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("backbone", "side", "precision", "count"),
    [
        ("squeezenet1_1", SIDE, "fp32", 16),
        ("squeezenet1_1", SIDE, "bf16", 16),
        pytest.param("timm/vit_tiny_patch16_224", SIDE, "fp32", 4, marks=pytest.mark.slow),
    ],
)
def test_neither_padding_nor_neighbours_change_an_embedding_by_a_bit(
    backbone: str, side: int, precision: str, count: int
) -> None:
    if backbone.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    actor = embedder(backbone, side=side, precision=precision, batch_size=count)
    images = pictures(count, side=side)
    together = embed(actor, images)
    for some in (1, count - 1):
        assert np.array_equal(embed(actor, images[:some]), together[:some])
    # Neither does what a batch before it left behind.
    others = [images[0], *pictures(count - 1, seed=9, side=side)]
    assert np.array_equal(embed(actor, others)[:1], together[:1])


@pytest.mark.usefixtures("engine")
def test_rows_keep_their_order_over_many_batches() -> None:
    actor = embedder(batch_size=4)
    images = pictures(23)
    together = embed(actor, images)
    for row in (0, 3, 4, 11, 22):
        assert cosine(embed(actor, [images[row]])[0], together[row]) > 0.99999
    assert np.ptp(together, axis=0).max() > 0
    backwards = embed(actor, images[::-1])
    assert cosine(backwards[::-1], together).min() > 0.99999


@pytest.mark.usefixtures("engine")
def test_embeddings_are_what_the_backbone_gives_on_normalised_images() -> None:
    actor = embedder()
    images = pictures(5)
    mean, std = (torch.tensor(value)[:, None, None] for value in (OWN.mean, OWN.std))
    x = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        wanted = build_backbone("squeezenet1_1", "random")(x).double().numpy()
    got = embed(actor, images)
    assert cosine(got, wanted).min() > 0.999999
    centred = cosine(got - wanted.mean(0), wanted - wanted.mean(0))
    assert centred.min() > 0.9999


@pytest.mark.usefixtures("engine")
def test_a_sample_with_a_reason_stays_a_row_without_an_embedding() -> None:
    images = pictures(6)
    holes = [None, images[1], None, None, images[4], images[5], None]
    ((_, samples),) = part_rows(embedder()(part(holes)))
    assert [value is None for value in samples.field(EMBEDDING).to_pylist()] == [h is None for h in holes]
    assert [reason is not None for reason in samples.field(REASON).to_pylist()] == [h is None for h in holes]
    assert [stage for stage in samples.field(STAGE).to_pylist() if stage] == [STAGE_DECODE] * 4
    alone = embed(embedder(), [images[1], images[4], images[5]])
    assert np.array_equal(embeddings(samples)[[1, 4, 5]], alone)


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_parts_embedded_at_once_are_those_embedded_in_turn_and_no_second_counts_twice() -> None:
    actor = embedder(batch_size=4, num_threads=3)
    tables = [part(pictures(count, seed), seed) for seed, count in enumerate([30, 3, 17, 0, 9, 21])]
    in_turn = [samples for table in tables for _, samples in part_rows(actor(table))]
    start = time.perf_counter()
    with ThreadPoolExecutor(3) as pool:
        at_once = [row for table in pool.map(actor, tables) for row in part_rows(table)]
    wall_s = time.perf_counter() - start
    assert [values["part"] for values, _ in at_once] == list(range(6))
    assert [samples.equals(wanted) for (_, samples), wanted in zip(at_once, in_turn, strict=True)] == [True] * 6
    assert 0 < sum(values["embed_s"] for values, _ in at_once) <= wall_s


def test_everything_else_of_a_sample_passes_unchanged() -> None:
    table = part([*pictures(3), None])
    ((values, samples),) = part_rows(embedder()(table))
    ((old_values, old),) = part_rows(table)
    for name in (SAMPLE_INDEX, IMAGE_ID, "member", "keep:caption"):
        assert samples.field(name).equals(old.field(name))
    assert [field.name for field in samples.type][-1] == EMBEDDING
    assert PIXELS not in [field.name for field in samples.type]
    assert values.pop("embed_s") > old_values.pop("embed_s") == 0
    assert (values.pop("batch_size"), old_values.pop("batch_size")) == (16 if ENGINE["name"] == "torch" else 4, 0)
    assert values == old_values


def test_a_part_without_samples_stays_a_part() -> None:
    table = embedder()(part([]))
    ((values, samples),) = part_rows(table)
    assert (values["name"], len(samples)) == ("shard-0", 0)
    assert samples.field(EMBEDDING).type.list_size == 512


def test_a_part_of_nothing_but_errors_stays_a_part() -> None:
    ((_, samples),) = part_rows(embedder()(part([None, None])))
    assert samples.field(EMBEDDING).null_count == 2


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("combined", [False, True])
def test_parts_of_one_table_do_not_mix(combined: bool) -> None:
    images = pictures(12)
    parts = [images[:5], [], [None, *images[5:7]], images[7:]]
    table = pa.concat_tables([part(pixels, number) for number, pixels in enumerate(parts)])
    if combined:
        table = table.combine_chunks()
    actor = embedder(batch_size=4)
    result = part_rows(actor(table))
    assert [(values["name"], len(samples)) for values, samples in result] == [
        ("shard-0", 5), ("shard-1", 0), ("shard-2", 3), ("shard-3", 5),
    ]  # fmt: skip
    for (_, samples), pixels in zip(result, parts, strict=True):
        if pixels:
            assert np.array_equal(embeddings(samples), embed(actor, pixels))


@pytest.mark.usefixtures("engine")
def test_a_slice_of_a_block_gives_the_same_as_the_whole() -> None:
    images = pictures(9)
    table = pa.concat_tables([part(images[:4], 0), part(images[4:], 1)]).combine_chunks()
    actor = embedder(batch_size=4)
    ((_, whole),) = part_rows(actor(table))[1:]
    ((values, sliced),) = part_rows(actor(table.slice(1)))
    assert values["name"] == "shard-1"
    assert sliced.equals(whole)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_normalised_embeddings_have_length_1_and_the_same_direction(dtype: str, precision: str) -> None:
    images = pictures(8)
    plain = embed(embedder(precision=precision), images)
    unit = embed(embedder(precision=precision, normalize=True, dtype=dtype), images)
    assert np.abs(np.linalg.norm(unit, axis=1) - 1).max() < (1e-6 if dtype == "float32" else 1e-3)
    assert cosine(plain, unit).min() > 0.999999
    assert np.abs(np.linalg.norm(plain, axis=1) - 1).min() > 0.1


def test_float16_is_the_nearest_to_float32() -> None:
    images = pictures(4)
    ((_, samples),) = part_rows(embedder(dtype="float16")(part(images)))
    assert samples.field(EMBEDDING).type.value_type == pa.float16()
    assert np.array_equal(embeddings(samples), embed(embedder(), images).astype(np.float16).astype(np.float64))


def bright_and_black() -> tuple[Preprocess, list[Any]]:
    """Preprocessing that makes bright images too large for float16, and images of which three are black."""
    loud = replace(preprocess("squeezenet1_1"), mean=(0.0, 0.0, 0.0), std=(1e-7, 1e-7, 1e-7))
    images = pictures(6)
    for row in (1, 2, 5):
        images[row] = np.zeros_like(images[row])
    return loud, images


@pytest.mark.usefixtures("engine")
def test_an_embedding_that_is_not_finite_is_an_error_row_and_its_neighbours_are_not() -> None:
    loud, images = bright_and_black()
    ((_, samples),) = part_rows(embedder(preprocess=loud, dtype="float16")(part(images)))
    reasons = samples.field(REASON).to_pylist()
    assert [reason is not None for reason in reasons] == [True, False, False, True, True, False]
    assert reasons[0] == "not finite: the embedding has NaN or infinite values as float16"
    assert samples.field(STAGE).to_pylist() == [STAGE_EMBED, None, None, STAGE_EMBED, STAGE_EMBED, None]
    assert [value is None for value in samples.field(EMBEDDING).to_pylist()] == [r is not None for r in reasons]


@pytest.mark.usefixtures("engine")
def test_what_is_too_large_for_float16_is_finite_as_float32() -> None:
    loud, images = bright_and_black()
    ((_, samples),) = part_rows(embedder(preprocess=loud)(part(images)))
    assert samples.field(REASON).null_count == 6
    assert embeddings(samples)[0].max() > 65504


@pytest.mark.usefixtures("engine")
def test_feature_maps_are_stored_flat_in_the_order_c_h_w() -> None:
    images = pictures(3)
    actor = embedder(features="map", normalize=False)
    ((_, samples),) = part_rows(actor(part(images)))
    maps = embeddings(samples).reshape(3, 512, 3, 3)
    assert cosine(maps.mean((2, 3)), embed(embedder(), images)).min() > 0.999999
    mean, std = (np.array(value, np.float32) for value in (OWN.mean, OWN.std))
    x = torch.from_numpy((np.stack(images).astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = build_backbone("squeezenet1_1", "random", "map")(x).double().numpy()
    assert np.abs(maps - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.usefixtures("engine")
def test_an_input_that_is_not_square_keeps_height_and_width_apart() -> None:
    wide = preprocess_for("squeezenet1_1", "random").with_size((32, 96))
    actor = embedder(preprocess=wide, features="map")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 96, 3), dtype=np.uint8)
    rows = [{SAMPLE_INDEX: i, PIXELS: image.reshape(-1)} for i, image in enumerate(pixels)]
    table = part_row(numbered(0, 2), pa.array(rows, sample_type(pixels_field(32, 96), KEEP)))
    ((_, samples),) = part_rows(actor(table))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (wide.mean, wide.std))
    with torch.no_grad():
        wanted = build_backbone("squeezenet1_1", "random", "map")((x - mean) / std)
    assert wanted.shape == (2, 512, 1, 5)
    assert cosine(embeddings(samples), wanted.double().flatten(1).numpy()).min() > 0.999999


@pytest.mark.parametrize(("precision", "wanted"), [("bf16", 0.999), ("fp16", 0.999)])
def test_reduced_precision_keeps_the_direction(precision: str, wanted: float) -> None:
    images = pictures(8)
    exact, reduced = embed(embedder(), images), embed(embedder(precision=precision), images)
    assert cosine(exact, reduced).min() > wanted
    assert not np.array_equal(exact, reduced)


@pytest.mark.usefixtures("engine")
def test_a_vector_without_direction_is_an_error_where_lengths_are_normalized() -> None:
    zeros = {key: torch.zeros_like(value) for key, value in torch_state("squeezenet1_1").items()}
    actor = embedder("squeezenet1_1", normalize=True, weights=Weights("zeros", "0" * 64, zeros))
    ((_, samples),) = part_rows(actor(part(pictures(1))))
    assert samples.field(EMBEDDING).null_count == 1
    assert samples.field(REASON)[0].as_py().startswith("not finite")


def test_num_threads_is_what_torch_uses() -> None:
    embedder(num_threads=1)
    assert torch.get_num_threads() == 1
