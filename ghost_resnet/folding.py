"""Batch-norm folding: the same network for inference with fewer layers."""

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .ghost_resnet import GhostBottleneck
from .layers import GhostModule

__all__ = ["fold_batch_norm", "split_ghost_norms"]

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


def split_ghost_norms(model: ModelT) -> ModelT:
    """Move the batch norm and ReLU that follow a Ghost module into its two halves, for int8 inference.

    Both work on each channel by itself, so they may as well come before the concatenation: the outputs are equal.
    In an int8 graph the halves are then quantised where they are made, each with a scale of its own, the
    depthwise convolution does its half's batch norm and ReLU on the way, and the concatenation copies bytes.

    Args:
        model: A network in evaluation mode, batch norms folded or not. It is left as it is.

    Returns:
        A copy, of which the blocks of `ghost_resnet50`, `101`, `152` and `50_cifar` are changed. Its state dict
        does not fit the original.
    """
    split = copy.deepcopy(model)
    for block in split.modules():
        if (
            isinstance(block, GhostBottleneck)
            and type(block.conv1) is GhostModule
            and type(block.bn1) is nn.BatchNorm2d
            and block.bn1.running_mean is not None
            and type(block.act1) is nn.ReLU
        ):
            block.add_module("conv1", _SplitGhostModule(block.conv1, block.bn1))
            block.bn1, block.act1 = nn.Identity(), nn.Identity()
    return split.eval()


class _SplitGhostModule(nn.Module):
    """A Ghost module with the batch norm and ReLU after it, done on each half."""

    def __init__(self, ghost: GhostModule, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.primary_conv, self.cheap_operation = ghost.primary_conv, ghost.cheap_operation
        primary = ghost.primary_conv[0]
        assert isinstance(primary, nn.Conv2d)
        primary_chs = primary.out_channels
        self.cheap_chs = ghost.out_chs - primary_chs
        self.primary_norm = nn.Sequential(_part(norm, slice(primary_chs)), nn.ReLU())
        self.cheap_norm = nn.Sequential(_part(norm, slice(primary_chs, None)), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary_conv(x)
        cheap = self.cheap_operation(primary)[:, : self.cheap_chs]
        return torch.cat([self.primary_norm(primary), self.cheap_norm(cheap)], dim=1)


def _part(norm: nn.BatchNorm2d, channels: slice) -> nn.BatchNorm2d:
    """The same batch norm for some of the channels."""
    assert norm.running_mean is not None and norm.running_var is not None
    part = nn.BatchNorm2d(len(norm.running_mean[channels]), norm.eps, affine=norm.affine)
    part.load_state_dict({name: value[channels] if value.ndim else value for name, value in norm.state_dict().items()})
    return part


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
