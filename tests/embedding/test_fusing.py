"""Convolutions fused with what follows them: the same function, with torch's plain operators in place of cuDNN's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.embedding.fusing import fuse_convolutions
from shard_embedder.pipeline.embedding.torch_runner import fold_batch_norms

FUSED = (torch.cudnn_convolution_relu, torch.cudnn_convolution_add_relu)


@pytest.fixture
def _cudnn_on_cpu() -> Iterator[None]:
    """What cuDNN's two operators are documented to do, for tensors in host memory."""

    def relu(x: Tensor, weight: Tensor, bias: Tensor | None, *how: object) -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, *how))

    def add_relu(
        x: Tensor, weight: Tensor, z: Tensor, alpha: float | None, bias: Tensor | None, *how: object
    ) -> Tensor:
        assert alpha == 1.0
        convolved = F.conv2d(x, weight, bias, *how)
        assert convolved.shape == z.shape
        return F.relu(convolved + z)

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", relu, "CPU")
    library.impl("cudnn_convolution_add_relu", add_relu, "CPU")
    yield
    library._destroy()


def calls(network: nn.Module, *targets: object) -> int:
    assert isinstance(network, fx.GraphModule)
    return sum(node.target in targets for node in network.graph.nodes)


def alone(network: nn.Module, kind: type[nn.Module]) -> int:
    """How many modules of a kind are still called as such."""
    assert isinstance(network, fx.GraphModule)
    called = [node.target for node in network.graph.nodes if node.op == "call_module"]
    return sum(isinstance(network.get_submodule(str(target)), kind) for target in called)


@pytest.mark.usefixtures("_cudnn_on_cpu")
@pytest.mark.parametrize(
    ("backbone", "num_relu", "num_add_relu", "num_left"),
    [
        ("resnet18", 9, 8, 3),
        ("resnet50", 33, 16, 4),
        pytest.param("regnet_y_400mf", 49, 16, 20, marks=pytest.mark.slow),
        pytest.param("googlenet", 57, 0, 0, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_gives_the_same_with_its_convolutions_fused(
    backbone: str, num_relu: int, num_add_relu: int, num_left: int
) -> None:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        network = fold_batch_norms(build_backbone(backbone, "random:0").eval())
        expected = network(images)
        fused = fuse_convolutions(network, images[:1])
        torch.testing.assert_close(fused(images), expected)
    assert [calls(fused, operator) for operator in FUSED] == [num_relu, num_add_relu]
    # Those of the shortcuts, and of RegNet's gates.
    assert alone(fused, nn.Conv2d) == num_left


class Odd(nn.Module):
    """Convolutions and ReLUs that may not be fused, or not as others are; `kind` is what follows the first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 3, padding="same" if kind == "named padding" else 1)
        if kind == "mirrored padding":
            self.first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        if kind == "a channel a group":
            self.first = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.second = nn.Conv2d(3, 1 if kind == "broadcast" else 4, 3, padding=1, bias=kind != "no bias")

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        if self.kind == "seen twice":
            return F.relu(first) + first
        if self.kind == "called twice":
            return F.relu(first) + F.relu(self.first(images * 2))
        if self.kind == "by name":
            return torch.relu(input=first)
        if self.kind == "of a number":
            return torch.relu(first + 1.0)
        if self.kind == "twice itself":
            return F.relu(first + first)
        if self.kind in ("broadcast", "no bias", "shortcut"):
            return (first + self.second(images)).relu()
        return F.relu(first)


@pytest.mark.usefixtures("_cudnn_on_cpu")
@pytest.mark.parametrize(
    ("kind", "num_relu", "num_add_relu"),
    [
        ("named padding", 0, 0),
        ("mirrored padding", 0, 0),
        ("seen twice", 0, 0),
        ("called twice", 0, 0),
        ("of a number", 0, 0),
        ("by name", 0, 0),
        ("twice itself", 0, 0),
        ("broadcast", 0, 0),
        ("a channel a group", 0, 0),
        ("no bias", 0, 1),
        ("shortcut", 0, 1),
        ("plain", 1, 0),
    ],
)
def test_what_may_not_be_fused_stays_as_it_is(kind: str, num_relu: int, num_add_relu: int) -> None:
    torch.manual_seed(0)
    network, images = fx.symbolic_trace(Odd(kind).eval()), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = network(images)
        fused = fuse_convolutions(network, images[:1])
        torch.testing.assert_close(fused(images), expected)
    if num_relu + num_add_relu:
        assert [calls(fused, operator) for operator in FUSED] == [num_relu, num_add_relu]
    else:
        assert fused is network


def test_a_backbone_stays_as_it_is_where_cudnn_has_no_such_kernels() -> None:
    # As here, for tensors in host memory.
    network, images = fold_batch_norms(build_backbone("resnet18", "random:0").eval()), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = network(images)
        assert fuse_convolutions(network, images) is network
        assert torch.equal(network(images), expected)


def test_what_is_no_graph_stays_as_it_is() -> None:
    network = build_backbone("squeezenet1_1", "random:0").eval()
    assert fuse_convolutions(network, torch.rand(1, 3, 64, 64)) is network
