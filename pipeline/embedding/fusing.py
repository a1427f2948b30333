"""Fuses convolutions on a GPU with the bias, residual and ReLU that follow them.

Eager torch runs a kernel for each of the three, and each of these reads and writes the convolution's whole output. On
an H200 they took about half of a ResNet's time.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_RELUS = (F.relu, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
_ADDS = (operator.add, operator.iadd, torch.add)


def fuse_convolutions(backbone: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the backbone with each convolution, its bias, a residual and the ReLU after it in one kernel.

    It is tried with `images` [N, 3, H, W], on the device and in the precision of the backbone. Returns the backbone
    itself if it is no graph (`fold_batch_norms` makes one), has nothing to fuse, or cuDNN has no such kernels.
    """
    if not isinstance(backbone, fx.GraphModule):
        return backbone
    network = copy.deepcopy(backbone)
    shapes = _Shapes(network).of_nodes(images)
    relus = [node for node in network.graph.nodes if node.args and _is_relu(node, network)]
    if sum(_fuse(node, network, shapes) for node in relus) == 0:
        return backbone
    network.graph.eliminate_dead_code()
    network.recompile()
    try:
        with torch.inference_mode():
            network(images)
    except RuntimeError:
        return backbone
    return network


def _fuse(relu: fx.Node, network: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> bool:
    """Replace a ReLU and what is before it by one node. Returns False where that is not possible."""
    source, residual = _summed(relu.args[0], network, shapes)
    convolution = _convolution(source, network)
    if convolution is None:
        return False
    _take_bias(convolution, _convolution(residual, network))
    graph, name = network.graph, source.target
    with graph.inserting_before(relu):
        inputs = [source.args[0], graph.get_attr(f"{name}.weight")]
        bias = None if convolution.bias is None else graph.get_attr(f"{name}.bias")
        how = (bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        if residual is None:
            fused = graph.call_function(torch.cudnn_convolution_relu, (*inputs, *how))
        else:
            fused = graph.call_function(torch.cudnn_convolution_add_relu, (*inputs, residual, 1.0, *how))
    shapes[fused] = shapes[relu]
    relu.replace_all_uses_with(fused)
    return True


class _Shapes(fx.Interpreter):
    """Runs a network once."""

    def of_nodes(self, images: Tensor) -> dict[fx.Node, torch.Size]:
        """The shapes of what gives one tensor."""
        self._found: dict[fx.Node, torch.Size] = {}
        with torch.inference_mode():
            self.run(images)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._found[n] = result.shape
        return result


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in _RELU_METHODS
    )


def _summed(node: Any, network: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> tuple[Any, fx.Node | None]:
    """The convolution and the residual that a node adds; itself and None where it adds no such two."""
    is_sum = isinstance(node, fx.Node) and node.op == "call_function" and node.target in _ADDS and not node.kwargs
    if is_sum and len(node.users) == 1:
        for source, residual in (node.args, node.args[::-1]):
            # One of another shape would be broadcast.
            is_other = source is not residual and shapes.get(source) == shapes.get(residual)
            if is_other and _convolution(source, network) is not None:
                return source, residual
    return node, None


def _convolution(node: Any, network: fx.GraphModule) -> nn.Conv2d | None:
    """The convolution that a node calls, where only one sees what it gives, and no other node calls it."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return None
    module = network.get_submodule(str(node.target))
    # Subclasses may do more; padding by name, or by other than zeros, is not cuDNN's; and for one channel a group
    # torch has kernels of its own.
    if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    if module.groups > 1 and module.groups == module.in_channels:
        return None
    return module if sum(other.target == node.target for other in network.graph.nodes) == 1 else None


def _take_bias(convolution: nn.Conv2d, residual: nn.Conv2d | None) -> None:
    """Move the bias of a residual that is a convolution to the other one: it then needs no kernel of its own."""
    if residual is not None and residual.bias is not None and convolution.bias is not None:
        convolution.bias = nn.Parameter((convolution.bias + residual.bias).detach(), requires_grad=False)
        residual.bias = None
