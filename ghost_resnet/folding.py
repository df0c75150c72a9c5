"""Batch-norm folding: the same network for inference with fewer layers."""

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norm"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def fold_batch_norm(model: ModelT) -> ModelT:
    """Merge every batch norm that directly follows a convolution into that convolution, for inference.

    In evaluation mode such a batch norm is a fixed scale and shift of each channel, so the convolution can do
    it. The network keeps its class, methods and attributes (`forward_features`, `num_classes`,
    `pretrained_cfg`): merged batch norms become `nn.Identity`, and their convolutions gain a bias. The pairs
    are those that `torch.fx` finds in the forward pass: a plain `BatchNorm2d` with running statistics, fed by
    a `Conv2d` that feeds nothing else, both called once.

    One batch norm a block stays in `ghost_resnet50`, `101`, `152` and `50_cifar`: the one after the Ghost
    module, whose input is a concatenation that an activation has already been through. It can't move forward
    into the next convolution either: a ReLU stands between. `ghost_resnet50_s2` and `_s4` keep none.

    Args:
        model: A network whose forward pass `torch.fx` can trace, in any mode. It is left as it is.

    Returns:
        A copy in evaluation mode. Its outputs differ from the original's by rounding only, but it can't be
        trained further as the original would, and its state dict fits folded networks only.

    Raises:
        torch.fx.proxy.TraceError: The forward pass depends on its input's values, so it can't be traced.
    """
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    graph = torch.fx.symbolic_trace(folded).graph
    calls = Counter(node.target for node in graph.nodes)

    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or len(source.users) > 1:
            continue
        conv, norm = modules.get(str(source.target)), modules.get(str(node.target))
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or type(conv) is not nn.Conv2d:
            continue
        if calls[source.target] == calls[node.target] == 1:
            _replace(folded, conv, fuse_conv_bn_eval(conv, norm))
            _replace(folded, norm, nn.Identity().eval())
    return folded


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
