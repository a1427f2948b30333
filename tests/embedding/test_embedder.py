"""The embedder in process: tables of pixels in, tables of embeddings out, row for row."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import output_shape, preprocess_for
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
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, TorchRunner, build_network
from shard_embedder.pipeline.planning.stored_source import StoredSource
from tests.outputs import part_values

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 64
KEEP = (("caption", "string"),)


def preprocess(backbone: str, side: int = SIDE) -> Preprocess:
    return preprocess_for(backbone, "random").with_size((side, side))


@pytest.fixture(params=["torch", "openvino"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes: `embedder` makes its embedders of it."""
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    monkeypatch.setitem(ENGINE, "name", request.param)
    name: str = request.param
    return name


ENGINE = {"name": "torch"}


def embedder(
    backbone: str = "resnet18", *, side: int = SIDE, weights: Weights | None = None, **options: Any
) -> Embedder:
    """An embedder as the flow makes one, with random weights, on the CPU."""
    weights = weights or load_weights(backbone, "random:0")
    given = {"preprocess": preprocess(backbone, side), "dtype": "float32", "batch_size": 16} | options
    fields = ("features", "preprocess", "normalize")
    network = Network(backbone=backbone, **{name: given.pop(name) for name in fields if name in given})
    dtype = given.pop("dtype")
    crop = network.preprocess.crop
    source: Source = SharedWeights.of(weights)
    if ENGINE["name"] == "openvino":
        from shard_embedder.pipeline.embedding.openvino_graph import convert

        source = convert(build_network(network, weights), crop)
    shape = output_shape(backbone, network.features, crop)
    return Embedder(source, network, Placement(**given), shape=shape, dtype=dtype)


def pictures(count: int, seed: int = 0, side: int = SIDE) -> list[Any]:
    """uint8 RGB of shape [side, side, 3], no two alike."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return list(np.kron(base, np.ones((1, side // 4, side // 4, 1), np.uint8)))


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
    [("resnet18", SIDE, "fp32", 16), ("resnet18", SIDE, "bf16", 16), ("vit_b_32", 224, "fp32", 4)],
)
def test_neither_padding_nor_neighbours_change_an_embedding_by_a_bit(
    backbone: str, side: int, precision: str, count: int
) -> None:
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
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (preprocess("resnet18").mean, preprocess("resnet18").std)
    )
    x = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        wanted = build_backbone("resnet18", "random")(x).double().numpy()
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
    loud = replace(preprocess("resnet18"), mean=(0.0, 0.0, 0.0), std=(1e-7, 1e-7, 1e-7))
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
    maps = embeddings(samples).reshape(3, 512, 2, 2)
    assert cosine(maps.mean((2, 3)), embed(embedder(), images)).min() > 0.999999
    mean, std = (np.array(value, np.float32) for value in (preprocess("resnet18").mean, preprocess("resnet18").std))
    x = torch.from_numpy((np.stack(images).astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = build_backbone("resnet18", "random", "map")(x).double().numpy()
    assert np.abs(maps - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.usefixtures("engine")
def test_an_input_that_is_not_square_keeps_height_and_width_apart() -> None:
    wide = preprocess_for("resnet18", "random").with_size((32, 96))
    actor = embedder(preprocess=wide, features="map")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 96, 3), dtype=np.uint8)
    rows = [{SAMPLE_INDEX: i, PIXELS: image.reshape(-1)} for i, image in enumerate(pixels)]
    table = part_row(numbered(0, 2), pa.array(rows, sample_type(pixels_field(32, 96), KEEP)))
    ((_, samples),) = part_rows(actor(table))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (wide.mean, wide.std))
    with torch.no_grad():
        wanted = build_backbone("resnet18", "random", "map")((x - mean) / std)
    assert wanted.shape == (2, 512, 1, 3)
    assert cosine(embeddings(samples), wanted.double().flatten(1).numpy()).min() > 0.999999


@pytest.mark.parametrize(("precision", "wanted"), [("bf16", 0.999), ("fp16", 0.999)])
def test_reduced_precision_keeps_the_direction(precision: str, wanted: float) -> None:
    images = pictures(8)
    exact, reduced = embed(embedder(), images), embed(embedder(precision=precision), images)
    assert cosine(exact, reduced).min() > wanted
    assert not np.array_equal(exact, reduced)


def test_batches_that_do_not_fit_into_memory_are_halved_until_they_do() -> None:
    pixels = np.stack(pictures(11))

    def runner(batch_size: int, room: int) -> TorchRunner:
        network = build_network(
            Network(backbone="resnet18", preprocess=preprocess("resnet18")), load_weights("resnet18", "random:0")
        )
        tried: list[int] = []

        def device_memory(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            # The first batch always fits: memory may run out at any time.
            tried.append(len(inputs[0]))
            if len(inputs[0]) > room and len(tried) > 1:
                raise torch.OutOfMemoryError(f"no room for {len(inputs[0])} images")

        network.register_forward_pre_hook(device_memory)
        return TorchRunner(network, (SIDE, SIDE), Placement(batch_size=batch_size))

    rows = np.array([10, 3, 4, 5, 6, 7, 8, 9, 0])
    halved = runner(8, room=3)
    embedded = halved.embed(pixels, rows)
    assert halved.batch_size == 2
    assert np.array_equal(embedded, runner(2, room=2).embed(pixels, rows))
    with pytest.raises(torch.OutOfMemoryError, match="no room for 1 images"):
        runner(4, room=0).embed(pixels, rows)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU, found no g++")
def test_a_compiled_backbone_gives_the_vectors_of_the_eager_one() -> None:
    from torch._dynamo.utils import counters

    pixels, rows = np.stack(pictures(11)), np.array([10, 3, 4, 5, 6, 7, 8, 9, 0])

    def runner(compiled: bool) -> TorchRunner:
        network = build_network(
            Network(backbone="resnet18", preprocess=preprocess("resnet18")), load_weights("resnet18", "random:0")
        )
        return TorchRunner(network, (SIDE, SIDE), Placement(batch_size=4, compiled=compiled))

    eager = runner(False).embed(pixels, rows)
    counters.clear()
    fast = runner(True)
    compiled = fast.embed(pixels, rows)
    np.testing.assert_allclose(compiled, eager, rtol=1e-3, atol=1e-5)
    assert np.array_equal(fast.embed(torch.from_numpy(pixels), rows), compiled)
    assert np.array_equal(fast.embed(pixels, rows[4:]), compiled[4:])
    assert counters["stats"]["unique_graphs"] >= 1


def test_torch_computes_in_one_thread_whoever_asks() -> None:
    network = build_network(
        Network(backbone="squeezenet1_1", preprocess=preprocess("squeezenet1_1")),
        load_weights("squeezenet1_1", "random:0"),
    )
    threads: list[int] = []
    network.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    runner = TorchRunner(network, (SIDE, SIDE), Placement(batch_size=4))
    together = threading.Barrier(3)

    def ask(_: int) -> int:
        together.wait()
        runner.embed(np.stack(pictures(4)), np.arange(4))
        return threading.get_ident()

    with ThreadPoolExecutor(3) as pool:
        asked = set(pool.map(ask, range(3)))
    assert len(asked) == len(threads) == 3
    # CUDA graphs belong to the thread that recorded them.
    assert len(set(threads)) == 1


def test_num_threads_is_what_torch_uses() -> None:
    embedder(num_threads=1)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_shared_through_the_object_store_are_the_same(dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) if value.is_floating_point() else value
             for key, value in torch_state("squeezenet1_1").items()}  # fmt: skip
    weights = Weights("w.pth", "5" * 64, state)
    shared = ray.get(StoredSource.put(SharedWeights.of(weights)).ref).get()
    assert (shared.name, shared.sha256, shared.seed) == (weights.name, weights.sha256, None)
    here, there = build_backbone("squeezenet1_1", weights), build_backbone("squeezenet1_1", shared)
    for key, value in here.state_dict().items():
        assert torch.equal(there.state_dict()[key], value)


@pytest.mark.usefixtures("ray_session")
def test_random_weights_are_shared_by_their_seed_alone() -> None:
    shared = ray.get(StoredSource.put(SharedWeights.of(load_weights("squeezenet1_1", "random:6"))).ref)
    assert (shared.seed, shared.state) == (6, None)


def torch_state(name: str) -> dict[str, torch.Tensor]:
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state: dict[str, torch.Tensor] = models.get_model(name, weights=None).state_dict()
    return state


@pytest.mark.usefixtures("engine")
def test_a_vector_without_direction_is_an_error_where_lengths_are_normalized() -> None:
    zeros = {key: torch.zeros_like(value) for key, value in torch_state("squeezenet1_1").items()}
    actor = embedder("squeezenet1_1", normalize=True, weights=Weights("zeros", "0" * 64, zeros))
    ((_, samples),) = part_rows(actor(part(pictures(1))))
    assert samples.field(EMBEDDING).null_count == 1
    assert samples.field(REASON)[0].as_py().startswith("not finite")
