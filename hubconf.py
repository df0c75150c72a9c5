"""Entry points of `torch.hub`: one a network, each with all arguments of `timm.create_model`."""

from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

import ghost_resnet as _ghost_resnet  # noqa: F401  (registers the networks with timm)

dependencies = ["lazy_loader", "timm", "torch", "wrapt"]


def ghost_resnet50(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """Ghost-ResNet-50 with an ImageNet stem: the first 1x1 of each bottleneck is a Ghost module.

    Args:
        pretrained: Load the published weights.
        **kwargs: Arguments of `timm.create_model` and of the network, such as `num_classes=6`, `in_chans=1`,
            `features_only=True`. An unknown one is refused by name.
    """
    return _timm.create_model("ghost_resnet50", pretrained=pretrained, **kwargs)


def ghost_resnet50_cifar(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """Ghost-ResNet-50 for small images: a 3x3 stem of stride 1 without pooling, 100 classes by default.

    Args: those of `ghost_resnet50`.
    """
    return _timm.create_model("ghost_resnet50_cifar", pretrained=pretrained, **kwargs)


def ghost_resnet50_s2(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """The GhostNet paper's Ghost-ResNet-50: every convolution but the stem is a Ghost module of ratio 2.

    Args: those of `ghost_resnet50`.
    """
    return _timm.create_model("ghost_resnet50_s2", pretrained=pretrained, **kwargs)


def ghost_resnet50_s4(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """The GhostNet paper's Ghost-ResNet-50: every convolution but the stem is a Ghost module of ratio 4.

    Args: those of `ghost_resnet50`.
    """
    return _timm.create_model("ghost_resnet50_s4", pretrained=pretrained, **kwargs)


def ghost_resnet101(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """Ghost-ResNet-101: `ghost_resnet50` with 3, 4, 23 and 3 blocks.

    Args: those of `ghost_resnet50`.
    """
    return _timm.create_model("ghost_resnet101", pretrained=pretrained, **kwargs)


def ghost_resnet152(pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    """Ghost-ResNet-152: `ghost_resnet50` with 3, 8, 36 and 3 blocks.

    Args: those of `ghost_resnet50`.
    """
    return _timm.create_model("ghost_resnet152", pretrained=pretrained, **kwargs)
