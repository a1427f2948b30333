"""torchvision's own models with random weights, and what they feed their classifier."""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision import models

from shard_embedder.pipeline.backbones.weights import Weights

# torchvision's classifier of each architecture, found by asking its models and not our table.
HEADS = ("classifier", "fc", "heads", "head")
# The image sizes of those that do not take 64x64.
SIDES = {"maxvit_t": 224, "vit_b_32": 224, "inception_v3": 80}
ALL = sorted(models.list_models(module=models))
# The smallest of each kind: `make check` computes these.
SMALLEST = {
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vit_b_32",
}  # fmt: skip
# Hundreds of MB each: never filled with values. A smaller one of each kind is.
LARGE = [
    "convnext_base", "convnext_large", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "regnet_x_16gf", "regnet_x_32gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_32gf", "resnet152",
    "resnext101_32x8d", "resnext101_64x4d", "swin_b", "swin_v2_b", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
]  # fmt: skip


def images(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Normalised images that differ from each other."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def torchvision_model(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """torchvision's own model with random weights; the global random state is not ours to change."""
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model.eval()


class _Empty(TorchFunctionMode):
    """Parameters without values. Under `torch.device("meta")` RegNet's builder could not compute its widths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def model_without_values(name: str) -> nn.Module:
    """torchvision's own model on the meta device."""
    with _Empty():
        model: nn.Module = models.get_model(name, weights=None)
    return model.to("meta").eval()


class Operations(TorchDispatchMode):
    """What a module computes on `images`, said by the names of its parameters and the numbers of earlier results."""

    CLASSIFIER: ClassVar[str] = "classifier"

    def __init__(self, module: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.said: list[str] = []
        self._names = {id(value): key for key, value in chain(module.named_parameters(), module.named_buffers())}
        self._names[id(images)] = "images"
        self._kept: list[Tensor] = []  # so that no id means two
        head = next((getattr(module, name) for name in HEADS if hasattr(module, name)), None)
        if head is not None:
            head.register_forward_pre_hook(lambda *_: self.said.append(self.CLASSIFIER))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        said = tree_map(lambda x: self._names[id(x)] if isinstance(x, Tensor) else x, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for place, value in enumerate(tree_leaves(result)):
            self._names[id(value)] = f"{len(self.said)}.{place}"
            self._kept.append(value)
        self.said.append(f"{func}{said}")
        return result


def classifier_of(model: nn.Module) -> nn.Module:
    return next(getattr(model, name) for name in HEADS if hasattr(model, name))


def fed_to_classifier(model: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's own `forward` feeds its classifier, pooled where it is a map."""
    seen: list[Tensor] = []
    hook = classifier_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0]


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the size of `wanted`: random networks give 1e-15 as well as 1e6."""
    assert got.shape == wanted.shape
    assert wanted.std() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def weights_of(model: nn.Module) -> Weights:
    return Weights("test", "", model.state_dict())
