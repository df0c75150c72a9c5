"""The Ghost module."""

import math
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedArgumentError

__all__ = ["GhostModule"]


class GhostModule(nn.Module):
    """Makes `out_chs` channels from fewer convolutions: some computed, the rest cheap copies of those.

    A primary convolution makes `ceil(out_chs / ratio)` channels; a depthwise convolution of those makes
    `ratio - 1` times as many more; each is followed by batch norm and activation; both are concatenated and
    cut to `out_chs`. Input `(N, in_chs, H, W)`, output `(N, out_chs, H / stride, W / stride)`.

    Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, https://arxiv.org/abs/1911.11907.
    State-dict keys are those of timm's GhostNet: `primary_conv.{0,1}`, `cheap_operation.{0,1}`.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Side of the primary convolution's kernel, odd.
        ratio: How many times more channels come out than the primary convolution makes; 2 or more.
        dw_size: Side of the depthwise kernel, odd.
        stride: Stride of the primary convolution.
        dilation: Dilation of the primary convolution.
        dw_dilation: Dilation of the depthwise convolution. It works on the primary convolution's *output*
            grid, so a network that trades stride for dilation must dilate it too, or its values change.
        act: Whether activations follow the batch norms.
        act_layer: Activation class.
        norm_layer: Normalisation class.

    Raises:
        UnsupportedArgumentError: `ratio` is below 2, or a kernel's side is even.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        ratio: int = 2,
        dw_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        dw_dilation: int = 1,
        act: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ratio < 2 or kernel_size % 2 == 0 or dw_size % 2 == 0:
            raise UnsupportedArgumentError(
                "GhostModule needs ratio >= 2 (1 is a plain convolution) and odd kernel_size and dw_size, "
                f"got ratio={ratio}, kernel_size={kernel_size}, dw_size={dw_size}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        primary_chs = math.ceil(out_chs / ratio)
        cheap_chs = primary_chs * (ratio - 1)
        self.out_chs = out_chs
        self.surplus = primary_chs + cheap_chs > out_chs
        self.primary_conv = nn.Sequential(
            nn.Conv2d(
                in_chs,
                primary_chs,
                kernel_size,
                stride=stride,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                bias=False,
                **dd,
            ),
            norm_layer(primary_chs, **dd),
            act_layer(inplace=True) if act else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(
                primary_chs,
                cheap_chs,
                dw_size,
                padding=dw_dilation * (dw_size // 2),
                dilation=dw_dilation,
                groups=primary_chs,
                bias=False,
                **dd,
            ),
            norm_layer(cheap_chs, **dd),
            act_layer(inplace=True) if act else nn.Identity(),
        )

    def zero_init(self) -> None:
        """Make the module's output zero, for the end of a residual branch."""
        for norm in (self.primary_conv[1], self.cheap_operation[1]):
            weight = getattr(norm, "weight", None)
            if weight is not None:
                nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        primary = self.primary_conv(x)
        out = torch.cat([primary, self.cheap_operation(primary)], dim=1)
        return out[:, : self.out_chs] if self.surplus else out
