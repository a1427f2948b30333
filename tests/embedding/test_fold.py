"""Batch norms folded into convolutions: the same function, and never where something else would change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.embedding.torch_runner import fold_batch_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def with_trained_norms(module: nn.Module) -> nn.Module:
    """`module` in eval mode, with batch norms that do something: a new one nearly is the identity."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator) * 0.1
            norm.running_var = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.weight.data = torch.rand(norm.num_features, generator=generator) + 0.5
            norm.bias.data = torch.randn(norm.num_features, generator=generator) * 0.1
    return module.eval()


def num_norms(module: nn.Module) -> int:
    return sum(isinstance(one, nn.BatchNorm2d) for one in module.modules())


def assert_same_function(folded: nn.Module, module: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = folded(images), module(images)
    assert wanted.std() > 0
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


# DenseNet has norms before convolutions, which stay: one in each of 58 layers and 3 transitions, and the last.
@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("mobilenet_v2", 0), ("googlenet", 0), ("shufflenet_v2_x0_5", 0), ("densenet121", 62)],
)
def test_a_folded_backbone_computes_the_same_without_its_batch_norms(name: str, left: int) -> None:
    backbone = with_trained_norms(build_backbone(name, "random"))
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    folded = fold_batch_norms(backbone)
    assert num_norms(backbone) > left == num_norms(folded)
    assert_same_function(folded, backbone)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


class Seen(nn.Module):
    """A convolution whose output is used twice, and one that computes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.seen_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shared, self.shared_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.seen(images)
        images = self.seen_norm(seen) + seen
        return self.shared(self.shared_norm(self.shared(images)))


class Activated(nn.BatchNorm2d):
    """As timm has them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Branching(nn.Module):
    """Its `forward` depends on what it computes, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        images = self.norm(self.convolution(images))
        return images if images.mean() > 0 else -images


@pytest.mark.parametrize(
    "module", [Seen(), nn.Sequential(nn.Conv2d(3, 3, 1), Activated(3)), nn.Sequential(nn.BatchNorm2d(3)), Branching()]
)
def test_what_cannot_be_folded_stays(module: nn.Module) -> None:
    num = num_norms(with_trained_norms(module))
    folded = fold_batch_norms(module)
    assert num_norms(folded) == num
    assert_same_function(folded, module)
