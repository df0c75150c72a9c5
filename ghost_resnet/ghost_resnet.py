"""Ghost-ResNet: timm's ResNet with Ghost modules in its bottlenecks.

Two families:

* `ghost_resnet50`, `ghost_resnet101`, `ghost_resnet152` and `ghost_resnet50_cifar` follow a report of Tianjin
  University (January 2022): the **first 1x1** of each bottleneck is a Ghost module of ratio 2, followed by a
  batch norm and a ReLU of its own. `_cifar` has the stem of weiaicunzai/pytorch-cifar100.
* `ghost_resnet50_s2`, `ghost_resnet50_s4` are the GhostNet paper's own Ghost-ResNet-50 (Han et al., CVPR
  2020, https://arxiv.org/abs/1911.11907, table 6): **every convolution but the stem** is a Ghost module.

State-dict keys are those of timm's ResNet, with `GhostModule`'s below each replaced convolution
(`layer1.0.conv1.primary_conv.0.weight`).
"""

# mypy: disable-error-code="has-type, arg-type"
# (the convolutions that are replaced here come from timm, which is untyped)

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from . import hub
from .errors import UnsupportedArgumentError
from .layers import GhostModule

__all__ = ["GhostBottleneck", "GhostBottleneckFull", "GhostResNet"]

CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
STEM_TYPES = ("", "deep", "deep_tiered", "cifar")


class GhostBottleneck(Bottleneck):
    """Bottleneck whose first 1x1 convolution is a Ghost module; the batch norm and ReLU after it stay.

    Args: those of timm's `Bottleneck`, and
        ratio: The Ghost module's ratio.
        dw_size: Side of the Ghost module's depthwise kernel, odd.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        ratio: int = 2,
        dw_size: int = 3,
        dilation: int = 1,
        first_dilation: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            inplanes,
            planes,
            stride,
            downsample,
            dilation=dilation,
            first_dilation=first_dilation,
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        self.conv1 = GhostModule(
            inplanes,
            self.conv1.out_channels,
            ratio=ratio,
            dw_size=dw_size,
            dw_dilation=first_dilation or dilation,  # the grid that this block's input has
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )


class GhostBottleneckFull(Bottleneck):
    """Bottleneck whose convolutions are all Ghost modules, the shortcut's too, with no batch norm after them.

    Args: those of timm's `Bottleneck` but `cardinality`, which must be 1, and
        ratio: The Ghost modules' ratio.
        dw_size: Side of the Ghost modules' depthwise kernels, odd.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Sequential | None = None,
        *,
        ratio: int = 2,
        dw_size: int = 3,
        cardinality: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if cardinality != 1:
            raise UnsupportedArgumentError(
                f"a Ghost module's primary convolution has one group, got cardinality={cardinality}: "
                "leave it at 1, or use ghost_resnet50, whose 3x3 convolutions are plain"
            )
        super().__init__(
            inplanes,
            planes,
            stride,
            dilation=dilation,
            first_dilation=first_dilation,
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
            **kwargs,
        )

        def ghost(conv: nn.Conv2d, dw_dilation: int, act: bool) -> GhostModule:
            return GhostModule(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size[0],
                ratio=ratio,
                dw_size=dw_size,
                stride=conv.stride[0],
                dilation=conv.dilation[0],
                dw_dilation=dw_dilation,
                act=act,
                act_layer=act_layer,
                norm_layer=norm_layer,
                device=device,
                dtype=dtype,
            )

        self.conv1 = ghost(self.conv1, first_dilation or dilation, act=True)
        self.conv2 = ghost(self.conv2, dilation, act=True)
        self.conv3 = ghost(self.conv3, dilation, act=False)
        self.bn1, self.act1 = nn.Identity(), nn.Identity()
        self.bn2, self.act2 = nn.Identity(), nn.Identity()
        self.bn3 = nn.Identity()
        if downsample is not None:  # timm's (pool,) convolution, norm
            *pool, conv, _norm = downsample
            self.downsample = nn.Sequential(*pool, ghost(conv, dilation, act=False))

    def zero_init_last(self) -> None:
        """Make the residual branch's output zero at the start of training."""
        self.conv3.zero_init()


class GhostResNet(ResNet):
    """timm's `ResNet` made of Ghost bottlenecks, with two additions.

    `stem_type="cifar"` is a 3x3 stem of stride 1 without pooling, for small images: its features have
    reductions 1, 1, 2, 4, 8, and `output_stride` means the true one (2, 4 or 8). And an argument that neither
    the network nor its block knows is refused here, by name.

    Args: those of timm's `ResNet` and
        ratio: The Ghost modules' ratio.
        block_args: `attn_layer` and `dw_size` of the blocks.

    Input `(N, in_chans, H, W)`, output `(N, num_classes)`.

    Raises:
        UnsupportedArgumentError: An unknown argument, or one that can't be honoured.
    """

    def __init__(
        self,
        block: type[Bottleneck],
        layers: tuple[int, ...],
        ratio: int = 2,
        stem_type: str = "",
        output_stride: int = 32,
        block_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unknown("Ghost-ResNet", kwargs, inspect.signature(ResNet.__init__).parameters)
        _refuse_unknown("block_args", block_args or {}, ("attn_layer", "dw_size"))
        if stem_type not in STEM_TYPES:
            raise UnsupportedArgumentError(f"stem_type must be one of {STEM_TYPES}, got {stem_type!r}")
        cifar = stem_type == "cifar"
        if "deep" not in stem_type and kwargs.get("stem_width", 64) != 64:
            raise UnsupportedArgumentError(
                f"stem_width applies to deep stems only, got stem_width={kwargs['stem_width']} with "
                f"stem_type={stem_type!r}: leave it at 64, or take stem_type='deep'"
            )
        if cifar and kwargs.get("replace_stem_pool"):
            raise UnsupportedArgumentError(
                "the cifar stem has no pooling, so replace_stem_pool=True can't be honoured: leave it out"
            )
        natural_stride = 8 if cifar else 32
        allowed = sorted({natural_stride // 4, natural_stride // 2, natural_stride, 32})  # 32: timm's default
        if output_stride not in allowed:
            raise UnsupportedArgumentError(
                f"output_stride must be one of {allowed} with this stem, got {output_stride}"
            )
        super().__init__(
            block,
            layers,
            stem_type="" if cifar else stem_type,
            output_stride=min(output_stride, natural_stride) * (32 // natural_stride),
            block_args={"ratio": ratio, **(block_args or {})},
            **kwargs,
        )
        if cifar:
            self.conv1 = nn.Conv2d(
                self.conv1.in_channels,
                self.conv1.out_channels,
                3,
                padding=1,
                bias=False,
                device=self.conv1.weight.device,
                dtype=self.conv1.weight.dtype,
            )
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
            self.feature_info[0]["reduction"] = 1
            for info in self.feature_info[1:]:
                info["reduction"] //= 4


def _refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        known = sorted(set(known) - {"self", "block", "layers"})
        raise UnsupportedArgumentError(
            f"{what} has no argument {', '.join(map(repr, unknown))}; it takes {', '.join(known)}"
        )


def _create_ghost_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if pretrained and not overlay.get("file"):  # a file that the caller names is left to timm
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        kwargs["pretrained_cfg_overlay"] = {**overlay, **hub.pretrained_overlay(variant, cfg, **kwargs)}
    elif not pretrained and not kwargs.get("pretrained_cfg"):
        # an untrained network has the classes that its name promises, not those of its first weights
        kwargs["pretrained_cfg"] = default_cfgs[variant].cfgs[""]
    return build_model_with_cfg(GhostResNet, variant, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


_network_cfgs = {
    "ghost_resnet50": _cfg(),
    "ghost_resnet50_cifar": _cfg(
        num_classes=100,
        input_size=(3, 32, 32),
        pool_size=(4, 4),
        crop_pct=1.0,
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
    ),
    "ghost_resnet50_s2": _cfg(),
    "ghost_resnet50_s4": _cfg(),
    "ghost_resnet101": _cfg(),
    "ghost_resnet152": _cfg(),
}


def _tag_cfg(entry: hub.Entry) -> dict[str, Any]:
    """The network's configuration with what the manifest knows of a tag."""
    cfg = {**_network_cfgs[entry.architecture], **entry.pretrained_cfg()}
    sides = zip(_network_cfgs[entry.architecture]["pool_size"], cfg["input_size"][1:], strict=True)
    whole = _network_cfgs[entry.architecture]["input_size"][1]
    return {**cfg, "pool_size": tuple(pool * side // whole for pool, side in sides)}


default_cfgs = generate_default_cfgs(
    {**_network_cfgs, **{tag: _tag_cfg(entry) for tag, entry in hub.manifest().items()}}
)


@register_model
def ghost_resnet50(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """The report's Ghost-ResNet-50 with an ImageNet stem. 23,416,840 parameters with 1000 classes."""
    model_args = {"block": GhostBottleneck, "layers": (3, 4, 6, 3)}
    return _create_ghost_resnet("ghost_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def ghost_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """The report's own network: 3x3 stem, no pooling. 21,565,060 parameters with its 100 classes."""
    model_args = {"block": GhostBottleneck, "layers": (3, 4, 6, 3), "stem_type": "cifar"}
    return _create_ghost_resnet("ghost_resnet50_cifar", pretrained, **dict(model_args, **kwargs))


@register_model
def ghost_resnet50_s2(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """The GhostNet paper's Ghost-ResNet-50, s = 2. 13,953,512 parameters with 1000 classes."""
    model_args = {"block": GhostBottleneckFull, "layers": (3, 4, 6, 3), "ratio": 2}
    return _create_ghost_resnet("ghost_resnet50_s2", pretrained, **dict(model_args, **kwargs))


@register_model
def ghost_resnet50_s4(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """The GhostNet paper's Ghost-ResNet-50, s = 4. 8,151,752 parameters with 1000 classes."""
    model_args = {"block": GhostBottleneckFull, "layers": (3, 4, 6, 3), "ratio": 4}
    return _create_ghost_resnet("ghost_resnet50_s4", pretrained, **dict(model_args, **kwargs))


@register_model
def ghost_resnet101(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """Ghost-ResNet-101. 40,209,032 parameters with 1000 classes."""
    model_args = {"block": GhostBottleneck, "layers": (3, 4, 23, 3)}
    return _create_ghost_resnet("ghost_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def ghost_resnet152(pretrained: bool = False, **kwargs: Any) -> GhostResNet:
    """Ghost-ResNet-152. 54,042,632 parameters with 1000 classes."""
    model_args = {"block": GhostBottleneck, "layers": (3, 8, 36, 3)}
    return _create_ghost_resnet("ghost_resnet152", pretrained, **dict(model_args, **kwargs))
