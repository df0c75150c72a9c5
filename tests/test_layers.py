"""The Ghost module."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import ghostnet
from torch import nn

from ghost_resnet import GhostModule
from ghost_resnet.errors import UnsupportedArgumentError


def photo(size: int = 9) -> torch.Tensor:
    return torch.randn(2, 6, size, size, generator=torch.Generator().manual_seed(0))


def with_statistics(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, its batch norms far from the identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize(("out_chs", "ratio"), [(8, 2), (9, 2), (8, 3), (10, 4)])
def test_output_is_primary_then_cheap_channels_cut_to_out_chs(out_chs: int, ratio: int) -> None:
    module = with_statistics(GhostModule(6, out_chs, ratio=ratio))
    primary_chs = -(-out_chs // ratio)

    def norm(x: torch.Tensor, layer: nn.BatchNorm2d) -> torch.Tensor:
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)

    primary = module.primary_conv[0].weight
    cheap = module.cheap_operation[0].weight
    assert primary.shape == (primary_chs, 6, 1, 1)
    assert cheap.shape == (primary_chs * (ratio - 1), 1, 3, 3)
    first = F.relu(norm(F.conv2d(photo(), primary), module.primary_conv[1]))
    second = F.relu(norm(F.conv2d(first, cheap, padding=1, groups=primary_chs), module.cheap_operation[1]))
    expected = torch.cat([first, second], 1)[:, :out_chs]
    torch.testing.assert_close(module(photo()), expected)


@pytest.mark.parametrize("kwargs", [{}, {"ratio": 4}, {"kernel_size": 3, "stride": 2}, {"dw_size": 5}])
def test_equals_timms_module_with_its_weights(kwargs: dict) -> None:
    theirs = with_statistics(ghostnet.GhostModule(6, 10, **kwargs))
    ours = GhostModule(6, 10, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(photo()), theirs(photo()))


def test_stride_and_dilation_belong_to_the_primary_convolution() -> None:
    module = GhostModule(6, 8, kernel_size=3, stride=2, dilation=3)
    primary, cheap = module.primary_conv[0], module.cheap_operation[0]
    assert (primary.stride, primary.dilation, primary.padding) == ((2, 2), (3, 3), (3, 3))
    assert (cheap.stride, cheap.dilation, cheap.padding) == ((1, 1), (1, 1), (1, 1))
    assert module(photo()).shape == (2, 8, 5, 5)


def test_dw_dilation_keeps_the_values_when_stride_becomes_dilation() -> None:
    strided = with_statistics(GhostModule(6, 8, kernel_size=3, stride=2))
    dilated = GhostModule(6, 8, kernel_size=3, stride=1, dw_dilation=2).eval()
    dilated.load_state_dict(strided.state_dict())
    torch.testing.assert_close(dilated(photo())[..., ::2, ::2], strided(photo()))


def test_act_false_leaves_both_halves_linear() -> None:
    out = with_statistics(GhostModule(6, 8, act=False))(photo())
    assert (out[:, :4] < 0).any() and (out[:, 4:] < 0).any()
    out = with_statistics(GhostModule(6, 8, act=True))(photo())
    assert (out >= 0).all()


def test_activation_and_norm_classes_reach_both_halves() -> None:
    module = GhostModule(6, 8, act_layer=nn.SiLU, norm_layer=lambda chs, **dd: nn.GroupNorm(2, chs, **dd))
    for half in (module.primary_conv, module.cheap_operation):
        assert isinstance(half[1], nn.GroupNorm) and isinstance(half[2], nn.SiLU)


def test_zero_init_makes_the_output_zero() -> None:
    module = GhostModule(6, 8, act=False)
    assert module(photo()).abs().sum() > 0
    module.zero_init()
    assert module(photo()).abs().sum() == 0


def test_device_and_dtype_reach_every_parameter() -> None:
    module = GhostModule(6, 8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_state_dict_keys_are_those_of_timms_ghostnet() -> None:
    assert set(GhostModule(6, 8).state_dict()) == set(ghostnet.GhostModule(6, 8).state_dict())


@pytest.mark.parametrize("kwargs", [{"ratio": 1}, {"ratio": 0}, {"kernel_size": 2}, {"dw_size": 4}])
def test_argument_without_a_meaning_is_refused_by_name(kwargs: dict) -> None:
    ((name, value),) = kwargs.items()
    with pytest.raises(UnsupportedArgumentError, match=f"{name}={value}"):
        GhostModule(6, 8, **kwargs)


def test_torchscript_gives_the_same_output_with_and_without_surplus_channels() -> None:
    for out_chs in (8, 9):
        module = with_statistics(GhostModule(6, out_chs))
        torch.testing.assert_close(torch.jit.script(module)(photo()), module(photo()))


def profiled_names(module: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the operators and kernels that a forward pass runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as profile:
        module(x)
    return {event.key for event in profile.key_averages()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "memory_format", "enabled", "cudnn"),
    [
        (torch.float32, torch.channels_last, True, True),
        (torch.float16, torch.channels_last, True, True),
        (torch.bfloat16, torch.channels_last, True, True),
        (torch.float32, torch.contiguous_format, True, False),
        (torch.bfloat16, torch.contiguous_format, True, False),
        (torch.float16, torch.channels_last, False, False),
    ],
)
def test_depthwise_convolution_runs_on_the_kernel_that_the_docs_say(
    dtype: torch.dtype, memory_format: torch.memory_format, enabled: bool, cudnn: bool
) -> None:
    cheap = GhostModule(64, 128).cheap_operation.eval().to("cuda", dtype)
    x = torch.randn(2, 64, 28, 28, device="cuda", dtype=dtype).to(memory_format=memory_format)
    with torch.backends.cudnn.flags(enabled=enabled):
        names = profiled_names(cheap, x)
    assert ("aten::cudnn_convolution" in names) == cudnn
    assert ("aten::_conv_depthwise2d" in names) == (not cudnn)
    assert any("conv_depthwise2d_forward_kernel" in name for name in names) == (not cudnn)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channels_last_with_autocast_keeps_every_depthwise_convolution_on_cudnn(dtype: torch.dtype) -> None:
    model = timm.create_model("ghost_resnet50").eval().to("cuda", memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        names = profiled_names(model, x)
    assert "aten::cudnn_convolution" in names
    assert "aten::_conv_depthwise2d" not in names
