"""torchvision's own models with random weights, and what they feed their classifier."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, ClassVar

import pytest
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
# Those that are filled with values. The others differ from one of them in numbers alone, and compute the same
# operations as torchvision; of those added here torchvision pools with other operations than we do.
FILLED = SMALLEST | {
    "densenet161", "densenet169", "densenet201", "maxvit_t", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
    "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0",
}  # fmt: skip
_VALUES = torch.randn(2**16, generator=torch.Generator().manual_seed(0))


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


def model_without_values(name: str, **options: Any) -> nn.Module:
    """torchvision's own model on the meta device."""
    return _empty(name, **options).to("meta")


def filled_model(name: str, **options: Any) -> nn.Module:
    """torchvision's own model with values, but for its classifier.

    To draw random weights takes seconds, and to hold them hundreds of MB. The channels of these are overlapping
    views of the same few values.
    """
    model = _empty(name, **options)
    unused = {*classifier_of(model).modules()}
    scaled: dict[int, Tensor] = {}
    for module in model.modules():
        if module in unused:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            count, *shape = parameter.shape
            if shape:
                fan_in = math.prod(shape)
                values = scaled.setdefault(fan_in, _VALUES * (2 / fan_in) ** 0.5)
                strides = ((len(values) - fan_in) // count, *torch.empty(shape, device="meta").stride())
                values = values.as_strided(parameter.shape, strides)
            else:
                values = _VALUES[:count] * 0.1 + (1.0 if key == "weight" else 0.0)
            setattr(module, key, nn.Parameter(values))
    return model


def own_values(model: nn.Module) -> nn.Module:
    """The model with each value in memory of its own: kernels for views round otherwise."""
    model.load_state_dict({key: value.contiguous() for key, value in model.state_dict().items()}, assign=True)
    return model


def _empty(name: str, **options: Any) -> nn.Module:
    """torchvision's own model, its parameters on the meta device."""
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}
    with _Empty():
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model.eval()


class Operations(TorchDispatchMode):
    """What a module computes on `images`, said by the names of its parameters and the numbers of earlier results.

    Those that share `results` compute the shape of the same operation once.
    """

    CLASSIFIER: ClassVar[str] = "classifier"

    def __init__(self, module: nn.Module, images: Tensor, results: dict[str, Any]) -> None:
        super().__init__()
        self.said: list[str] = []
        self._names = {id(value): key for key, value in chain(module.named_parameters(), module.named_buffers())}
        self._names[id(images)] = "images"
        self._kept: list[Tensor] = []  # so that no id means two
        self._results = results
        head = next((getattr(module, name) for name in HEADS if hasattr(module, name)), None)
        if head is not None:
            head.register_forward_pre_hook(lambda *_: self.said.append(self.CLASSIFIER))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        said = tree_map(lambda x: self._names[id(x)] if isinstance(x, Tensor) else x, (args, kwargs or {}))
        result = self._result(func, args, kwargs or {})
        for place, value in enumerate(tree_leaves(result)):
            self._names[id(value)] = f"{len(self.said)}.{place}"
            self._kept.append(value)
        self.said.append(f"{func}{said}")
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Tensors without values, of a shape that torch says only once: its rules take long."""
        shapes = tree_map(lambda x: (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x, (args, kwargs))
        key = f"{func}{shapes}"
        if key in self._results:
            return tree_map(_alike, self._results[key])
        result = func(*args, **kwargs)
        given = {id(value) for value in tree_leaves((args, kwargs))}
        # What is changed in place is itself the result.
        if given.isdisjoint(map(id, tree_leaves(result))):
            self._results[key] = result
        return result


def _alike(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def classifier_of(model: nn.Module) -> nn.Module:
    return next(getattr(model, name) for name in HEADS if hasattr(model, name))


def fed_to_classifier(model: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's own `forward` feeds its classifier, pooled where it is a map."""

    def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
        raise FedError(inputs[0])

    hook = classifier_of(model).register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(FedError) as fed:
        model(x)
    hook.remove()
    seen: Tensor = fed.value.args[0]
    return seen.mean((2, 3)) if seen.dim() == 4 else seen


class FedError(Exception):
    """What a classifier is fed, which need not compute."""


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the size of `wanted`: random networks give 1e-15 as well as 1e6."""
    assert got.shape == wanted.shape
    assert wanted.std() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def weights_of(model: nn.Module) -> Weights:
    return Weights("test", "", model.state_dict())
