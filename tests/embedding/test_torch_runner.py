"""The runner of torch in process, and the weights that it is given."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray
import torch

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, TorchRunner, build_network
from shard_embedder.pipeline.planning.stored_source import StoredSource
from tests.embedding.pictures import SIDE, pictures, preprocess, torch_state

pytestmark = pytest.mark.usefixtures("one_thread")


def test_batches_that_do_not_fit_into_memory_are_halved_until_they_do() -> None:
    pixels = np.stack(pictures(11))

    def runner(batch_size: int, room: int) -> TorchRunner:
        network = build_network(
            Network(backbone="squeezenet1_1", preprocess=preprocess("squeezenet1_1")),
            Weights("random:0", "", seed=0),
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU, found no g++")
def test_a_compiled_backbone_gives_the_vectors_of_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    # Do not try vector extensions or precompile torch's headers: either takes longer than to compile the kernels.
    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)
    monkeypatch.setattr(config, "cpp_cache_precompile_headers", False)

    pixels, rows = np.stack(pictures(11)), np.array([10, 3, 4, 5, 6, 7, 8, 9, 0])

    def runner(compiled: bool) -> TorchRunner:
        network = build_network(
            Network(backbone="squeezenet1_1", preprocess=preprocess("squeezenet1_1")),
            load_weights("squeezenet1_1", "random:0"),
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
