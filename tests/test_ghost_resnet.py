"""The networks: every habit of a timm user, on every registered network."""

import functools
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d, DropBlock2d, DropPath, SEModule, set_scriptable
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghost_resnet import GhostModule
from ghost_resnet.errors import UnsupportedArgumentError
from ghost_resnet.ghost_resnet import GhostBottleneckFull

NETWORKS = timm.list_models("*ghost_resnet*")
FIFTIES = [name for name in NETWORKS if "50" in name]  # 101 and 152 are the same blocks, more often
IMAGENET_STEMS = [name for name in FIFTIES if not name.endswith("cifar")]
PARAMETERS = {
    "ghost_resnet50": 23_416_840,
    "ghost_resnet50_cifar": 21_565_060,
    "ghost_resnet101": 40_209_032,
    "ghost_resnet152": 54_042_632,
    "ghost_resnet50_s2": 13_953_512,
    "ghost_resnet50_s4": 8_151_752,
}
SHALLOW = {"layers": (2, 1, 1, 1)}  # every kind of block, once: what changes with depth is tested without it
GOLDEN = Path(__file__).parent / "golden" / "networks.json"

each_network = pytest.mark.parametrize("name", NETWORKS)
each_fifty = pytest.mark.parametrize("name", FIFTIES)


def create(name: str, **kwargs: object) -> nn.Module:
    """A network whose weights depend on its architecture alone, with live residual branches."""
    torch.manual_seed(0)
    return timm.create_model(name, **{"zero_init_last": False, **kwargs}).eval()


@functools.cache
def shared(name: str) -> nn.Module:
    """`create(name)`, in evaluation mode; a test must leave it as it is."""
    return create(name)


def photo(*size: int, batch: int = 1, chans: int = 3) -> torch.Tensor:
    return torch.randn(batch, chans, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def square(name: str, batch: int = 1) -> torch.Tensor:
    """A photo on which the last features are at least 2 x 2."""
    side = 32 if "cifar" in name else 64
    return photo(side, side, batch=batch)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() > 0


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]


# --- what the networks are


def test_registry_holds_the_networks_of_the_design() -> None:
    assert sorted(NETWORKS) == sorted(PARAMETERS)


@each_network
def test_parameter_count_is_exact(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@each_network
def test_head_has_as_many_classes_as_the_config_says(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert model.num_classes == model.pretrained_cfg["num_classes"] == (100 if "cifar" in name else 1000)


@pytest.mark.parametrize(("name", "giga"), [("ghost_resnet50_s2", 2.15), ("ghost_resnet50_s4", 1.18)])
def test_multiply_adds_of_the_papers_networks(name: str, giga: float) -> None:
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.01)


@each_network
def test_ghost_modules_are_where_the_design_puts_them(name: str) -> None:
    model = timm.create_model(name, device="meta")
    full = name.endswith(("_s2", "_s4"))
    for block in blocks_of(model):
        assert isinstance(block.conv1, GhostModule)
        assert isinstance(block.conv2, GhostModule) == isinstance(block.conv3, GhostModule) == full
        assert isinstance(block.bn1, nn.Identity if full else nn.BatchNorm2d)
        assert isinstance(block.act1, nn.Identity if full else nn.ReLU)
        if block.downsample is not None:
            assert isinstance(block.downsample[0], GhostModule) == full
    ratio = 4 if name.endswith("_s4") else 2
    for module in model.modules():
        if isinstance(module, GhostModule):
            assert module.primary_conv[0].out_channels * ratio == module.out_chs


@each_fifty
def test_stride_is_in_the_3x3_of_a_stages_first_block(name: str) -> None:
    for index, stage in enumerate(["layer1", "layer2", "layer3", "layer4"]):
        for number, block in enumerate(getattr(shared(name), stage)):
            conv = block.conv2.primary_conv[0] if isinstance(block.conv2, GhostModule) else block.conv2
            assert conv.kernel_size == (3, 3)
            assert conv.stride == ((2, 2) if index > 0 and number == 0 else (1, 1))


# --- inputs and heads


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 96)])
def test_any_input_size(name: str, size: tuple[int, int]) -> None:
    out = shared(name)(photo(*size))
    assert out.shape == (1, shared(name).num_classes)
    assert out.isfinite().all()


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_every_input_channel_counts(name: str, in_chans: int) -> None:
    model = create(name, in_chans=in_chans, **SHALLOW)
    x = photo(chans=in_chans)
    expected = model(x)
    for channel in range(in_chans):
        changed = x.clone()
        changed[:, channel] = 0
        assert not torch.allclose(model(changed), expected)


@torch.no_grad()
@each_fifty
def test_num_classes_and_reset_classifier(name: str) -> None:
    model = create(name, num_classes=6)
    pooled = model.forward_features(photo()).mean((2, 3))
    assert_same(model(photo()), F.linear(pooled, model.fc.weight, model.fc.bias))
    assert model(photo()).shape == (1, 6)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert_same(model(photo()), pooled)
    model.reset_classifier(7, "max")
    largest = model.forward_features(photo()).amax((2, 3))
    assert_same(model(photo()), F.linear(largest, model.fc.weight, model.fc.bias))
    assert model.get_classifier() is model.fc and model.fc.out_features == 7
    assert_same(model.forward_head(model.forward_features(photo()), pre_logits=True), largest)


@torch.no_grad()
@each_fifty
def test_num_classes_zero_gives_pooled_features(name: str) -> None:
    model = create(name, num_classes=0)
    assert model.num_classes == 0
    assert_same(model(photo()), model.forward_features(photo()).mean((2, 3)))


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_global_pool(name: str, pool: str) -> None:
    model = create(name, num_classes=0, global_pool=pool, **SHALLOW)
    features = model.forward_features(photo(48, 48))
    avg, largest = features.mean((2, 3)), features.amax((2, 3))
    expected = {
        "avg": avg,
        "max": largest,
        "avgmax": (avg + largest) / 2,
        "catavgmax": torch.cat([avg, largest], 1),
        "": features,
    }[pool]
    assert_same(model(photo(48, 48)), expected)
    assert model.head_hidden_size == (4096 if pool == "catavgmax" else 2048)


# --- features


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_features_only(name: str, feature_cls: str) -> None:
    model = create(name, features_only=True, feature_cls=feature_cls)
    x = square(name)
    features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert model.feature_info.channels() == [64, 256, 512, 1024, 2048] == [f.shape[1] for f in features]
    reductions = [1, 1, 2, 4, 8] if "cifar" in name else [2, 4, 8, 16, 32]
    assert model.feature_info.reduction() == reductions == [x.shape[2] // f.shape[2] for f in features]
    intermediates = shared(name).forward_intermediates(x, intermediates_only=True)
    for feature, intermediate in zip(features, intermediates, strict=True):
        assert_same(feature, intermediate)


@torch.no_grad()
@each_network
def test_features_only_out_indices(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(1, 3), device="meta")
    features = model(torch.empty(1, 3, 64, 64, device="meta"))
    assert model.feature_info.channels() == [256, 1024] == [f.shape[1] for f in features]
    assert model.feature_info.reduction() == [64 // f.shape[2] for f in features]


@torch.no_grad()
@each_fifty
def test_forward_intermediates(name: str) -> None:
    model = shared(name)
    final, intermediates = model.forward_intermediates(square(name))
    assert_same(final, model.forward_features(square(name)))
    assert_same(intermediates[-1], final)
    taken = model.forward_intermediates(square(name), indices=[1, 3], stop_early=True, intermediates_only=True)
    for ours, theirs in zip(taken, (intermediates[1], intermediates[3]), strict=True):
        assert_same(ours, theirs)


@torch.no_grad()
@each_fifty
def test_prune_intermediate_layers(name: str) -> None:
    model = create(name)
    assert model.prune_intermediate_layers(indices=[0, 2]) == [0, 2]
    assert len(model.layer2) > 0 and len(model.layer3) == len(model.layer4) == 0
    assert sum(p.numel() for p in model.parameters()) < PARAMETERS[name] / 4
    pruned = model.forward_intermediates(square(name), indices=[0, 2], intermediates_only=True)
    full = shared(name).forward_intermediates(square(name), indices=[0, 2], intermediates_only=True)
    for ours, theirs in zip(pruned, full, strict=True):
        assert_same(ours, theirs)


# --- output_stride


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("size", [64, 75])
def test_output_stride_keeps_the_values_on_the_coarse_grid(name: str, step: int, size: int) -> None:
    """Stride traded for dilation (the a-trous algorithm) computes more places, not other values."""
    natural = 8 if "cifar" in name else 32
    size = size // 2 if "cifar" in name else size
    dilated = create(name, output_stride=natural // step)
    expected = shared(name).forward_intermediates(photo(size, size), intermediates_only=True)
    for index, (ours, theirs) in enumerate(
        zip(dilated.forward_intermediates(photo(size, size), intermediates_only=True), expected, strict=True)
    ):
        coarser = {3: step // 2, 4: step}.get(index, 1)
        assert_same(ours[..., ::coarser, ::coarser], theirs)


@each_fifty
@pytest.mark.parametrize("step", [1, 2, 4])
def test_output_stride_is_the_true_one(name: str, step: int) -> None:
    output_stride = (8 if "cifar" in name else 32) // step
    model = timm.create_model(name, features_only=True, output_stride=output_stride, device="meta")
    features = model(torch.empty(1, 3, 64, 64, device="meta"))
    assert model.feature_info.reduction()[-1] == output_stride
    assert model.feature_info.reduction() == [64 // f.shape[-1] for f in features]


@pytest.mark.parametrize(
    ("name", "refused"), [("ghost_resnet50", (0, 2, 4, 12, 64)), ("ghost_resnet50_cifar", (1, 3, 16, 64))]
)
def test_output_stride_that_the_stem_cannot_have_is_refused(name: str, refused: tuple[int, ...]) -> None:
    for output_stride in refused:
        with pytest.raises(UnsupportedArgumentError, match=f"output_stride.*got {output_stride}$"):
            timm.create_model(name, output_stride=output_stride)


# --- the constructor's arguments, each truly applied


@each_network
def test_drop_path_rate_grows_with_depth(name: str) -> None:
    blocks = blocks_of(timm.create_model(name, drop_path_rate=0.3, device="meta"))
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for block in blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, len(blocks)).tolist())


@torch.no_grad()
@each_fifty
def test_dropped_path_leaves_the_shortcut(name: str) -> None:
    block = create(name, drop_path_rate=0.5).layer4[-1].train()
    block.drop_path.drop_prob = 1.0 - 1e-9
    x = torch.rand(2, 2048, 2, 2)
    torch.testing.assert_close(block(x), x)
    assert not torch.allclose(block.eval()(x), x)


@torch.no_grad()
@each_fifty
def test_drop_block_rate_drops_in_the_last_two_stages_in_training_only(name: str) -> None:
    model = create(name, drop_block_rate=0.2)
    for block in blocks_of(model):
        late = any(block in stage for stage in (list(model.layer3), list(model.layer4)))
        assert isinstance(block.drop_block, DropBlock2d if late else nn.Identity)
        if late:
            assert block.drop_block.drop_prob == 0.2
    assert_same(model(photo()), shared(name)(photo()))
    block = model.layer4[-1]
    dropped = []
    block.drop_block.register_forward_hook(lambda _m, x, y: dropped.append(((y == 0) & (x[0] != 0)).any()))
    block.train()(torch.rand(64, 2048, 4, 4))
    assert dropped == [True]


@torch.no_grad()
@each_fifty
def test_zero_init_last_makes_every_block_its_shortcut(name: str) -> None:
    for zero_init_last in (True, False):
        model = create(name, zero_init_last=zero_init_last, **SHALLOW)
        for block in [stage[i] for stage in (model.layer1, model.layer4) for i in (0, -1)]:
            inputs = block.conv1.primary_conv[0].in_channels
            x = torch.rand(2, inputs, 4, 4)
            shortcut = F.relu(x if block.downsample is None else block.downsample(x))
            assert torch.allclose(block(x), shortcut) == zero_init_last


@each_fifty
def test_zero_init_last_is_the_default(name: str) -> None:
    block = timm.create_model(name).layer1[-1]
    last = block.conv3.primary_conv[1] if isinstance(block, GhostBottleneckFull) else block.bn3
    assert (last.weight == 0).all()


@each_fifty
@pytest.mark.parametrize("act_layer", ["silu", nn.SiLU])
def test_act_layer_replaces_every_relu(name: str, act_layer: str | type[nn.Module]) -> None:
    def activations(model: nn.Module) -> Counter:
        names = (type(module).__name__ for module in model.modules())
        return Counter(n for n in names if n in ("ReLU", "SiLU", "Swish"))

    before = activations(timm.create_model(name, device="meta"))
    after = activations(timm.create_model(name, act_layer=act_layer, device="meta"))
    assert set(before) == {"ReLU"} and "ReLU" not in after
    assert sum(after.values()) == sum(before.values())
    block = timm.create_model(name, act_layer=act_layer, device="meta").layer1[0]
    assert type(block.conv1.primary_conv[2]) is type(block.conv1.cheap_operation[2]) is type(block.act3)


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize("norm_layer", ["groupnorm1", "layernorm2d"])
def test_norm_layer_replaces_every_batch_norm(name: str, norm_layer: str) -> None:
    model = create(name, norm_layer=norm_layer)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert type(model.layer1[0].conv1.primary_conv[1]) is type(model.bn1)
    assert type(model.layer1[0].conv1.cheap_operation[1]) is type(model.bn1)
    assert model(photo()).isfinite().all()


@torch.no_grad()
@each_fifty
def test_aa_layer_takes_over_the_strides(name: str) -> None:
    model = create(name, aa_layer=BlurPool2d)
    for stage in (model.layer2, model.layer3, model.layer4):
        first, second = stage[0], stage[1]
        conv = first.conv2.primary_conv[0] if isinstance(first.conv2, GhostModule) else first.conv2
        assert conv.stride == (1, 1)
        assert isinstance(first.aa, BlurPool2d) and not isinstance(second.aa, BlurPool2d)
    features, strided = model.forward_features(square(name)), shared(name).forward_features(square(name))
    assert features.shape == strided.shape
    assert not torch.allclose(features, strided)


@torch.no_grad()
@each_fifty
def test_attn_layer_works_in_every_block(name: str) -> None:
    model = create(name, block_args={"attn_layer": "se"})
    calls = []
    for block in blocks_of(model):
        assert isinstance(block.se, SEModule)
        block.se.register_forward_hook(lambda *_: calls.append(1))
    model(photo())
    assert len(calls) == 16


@each_fifty
def test_dw_size_and_ratio_reach_every_ghost_module(name: str) -> None:
    model = timm.create_model(name, ratio=3, block_args={"dw_size": 5}, device="meta")
    modules = [module for module in model.modules() if isinstance(module, GhostModule)]
    assert modules
    for module in modules:
        assert module.cheap_operation[0].kernel_size == (5, 5)
        assert module.primary_conv[0].out_channels == -(-module.out_chs // 3)
    assert model.eval()(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, model.num_classes)


def test_cardinality_groups_the_plain_3x3() -> None:
    model = timm.create_model("ghost_resnet50", cardinality=2, device="meta")
    assert all(block.conv2.groups == 2 for block in blocks_of(model))


@torch.no_grad()
@each_fifty
def test_drop_rate_drops_before_the_classifier_in_training_only(name: str) -> None:
    model = create(name, drop_rate=0.5, num_classes=0)
    features = torch.ones(1, 2048, 2, 2)
    assert (model.forward_head(features) == 1).all()
    assert set(model.train().forward_head(features).unique().tolist()) == {0.0, 2.0}


@torch.no_grad()
@each_fifty
@pytest.mark.parametrize(
    "kwargs",
    [
        {"stem_type": "deep", "stem_width": 32},
        {"stem_type": "deep_tiered", "stem_width": 32},
        {"avg_down": True},
        {"down_kernel_size": 3},
        {"block_reduce_first": 2},
        {"base_width": 32},
        {"channels": (32, 64, 128, 256)},
        {"layers": (1, 1, 1, 1)},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_other_timm_options_change_the_network_and_compute(name: str, kwargs: dict) -> None:
    model = create(name, **kwargs)
    out = model(photo())
    assert out.shape == (1, shared(name).num_classes) and out.isfinite().all()
    assert not torch.allclose(out, shared(name)(photo()))


def test_replace_stem_pool_puts_a_convolution_in_the_pools_place() -> None:
    model = timm.create_model("ghost_resnet50", replace_stem_pool=True, device="meta")
    assert isinstance(model.maxpool[0], nn.Conv2d) and model.maxpool[0].stride == (2, 2)


@each_fifty
def test_device_and_dtype(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@each_fifty
@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_clases": 6}, "num_clases"),
        ({"img_size": 224}, "img_size"),
        ({"block_args": {"attn_layr": "se"}}, "attn_layr"),
        ({"stem_width": 32}, "stem_width"),
        ({"stem_type": "cifar10"}, "stem_type"),
        ({"ratio": 1}, "ratio"),
        ({"block_args": {"dw_size": 4}}, "dw_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_argument_that_cannot_be_honoured_is_refused_by_name(name: str, kwargs: dict, named: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=named):
        timm.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("ghost_resnet50_s2", {"cardinality": 2}, "cardinality"),
        ("ghost_resnet50_s4", {"cardinality": 32}, "cardinality"),
        ("ghost_resnet50_cifar", {"replace_stem_pool": True}, "replace_stem_pool"),
    ],
)
def test_argument_that_this_network_cannot_honour_is_refused(name: str, kwargs: dict, named: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=named):
        timm.create_model(name, **kwargs)


# --- training


@each_network
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create(name, num_classes=6).train()
    F.cross_entropy(model(square(name, batch=2)), torch.tensor([1, 4])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@each_fifty
def test_gradient_checkpointing_changes_nothing_but_memory(name: str) -> None:
    outputs, gradients, recomputed = [], [], []
    for enable in (False, True):
        model = create(name, num_classes=6, **SHALLOW).train()
        model.set_grad_checkpointing(enable)
        calls: list[int] = []
        model.layer3[0].conv1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = model(square(name, batch=2))
        F.cross_entropy(out, torch.tensor([1, 4])).backward()
        outputs.append(out.detach())
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        recomputed.append(len(calls))
    assert recomputed == [1, 2]
    assert_same(*outputs)
    for key, gradient in gradients[0].items():
        assert_same(gradients[1][key], gradient, 1e-4)


@each_network
def test_layer_decay_groups_follow_the_blocks(name: str) -> None:
    model = timm.create_model(name, device="meta")
    scale, decay = {}, {}
    for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5):
        for parameter in group["params"]:
            scale[parameter], decay[parameter] = group["lr_scale"], group["weight_decay"]
    assert set(scale) == set(model.parameters())

    def scale_of(*modules: nn.Module) -> float:
        (value,) = {scale[p] for module in modules for p in module.parameters()}
        return value

    depths = [scale_of(model.conv1, model.bn1), *map(scale_of, blocks_of(model)), scale_of(model.fc)]
    assert depths[-1] == 1
    assert all(deep == 2 * shallow for shallow, deep in itertools.pairwise(depths))
    assert all(decay[p] == (0 if p.ndim <= 1 else 0.05) for p in model.parameters())


# --- compilers and formats


@torch.no_grad()
@each_fifty
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_script_and_trace(name: str) -> None:
    with set_scriptable(True):
        model = create(name, **SHALLOW)
    expected = model(photo(64, 48))
    assert_same(torch.jit.script(model)(photo(64, 48)), expected)
    assert_same(torch.jit.trace(model, photo())(photo(64, 48)), expected)


@torch.no_grad()
@each_fifty
def test_fx_symbolic_trace(name: str) -> None:
    traced = torch.fx.symbolic_trace(shared(name))
    assert_same(traced(photo(64, 48)), shared(name)(photo(64, 48)))


def check_export(model: nn.Module) -> None:
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (photo(64, 64, batch=2),), dynamic_shapes=(dynamic,))
    for x in (photo(64, 64), photo(96, 64, batch=3)):
        assert_same(program.module()(x), model(x))


@torch.no_grad()
@each_fifty
def test_export_with_dynamic_batch_and_size(name: str) -> None:
    check_export(create(name, **SHALLOW))


@torch.no_grad()
@each_fifty
def test_dynamo_captures_the_network_whole(name: str) -> None:
    torch._dynamo.reset()
    model = create(name, **SHALLOW)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(compiled(photo()), model(photo()))


@torch.no_grad()
@pytest.mark.slow
@each_network
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_and_export_at_full_depth(name: str) -> None:
    with set_scriptable(True):
        model = create(name)
    assert_same(torch.jit.script(model)(photo()), shared(name)(photo()))
    check_export(shared(name))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ghost_resnet50", "ghost_resnet50_s4"])  # one of each family
def test_compile_gives_the_same_outputs(name: str) -> None:
    torch._dynamo.reset()
    model = create(name, **SHALLOW)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(photo(64, 64, batch=2)), model(photo(64, 64, batch=2)), 1e-4)


@torch.no_grad()
@each_fifty
def test_channels_last_stays_channels_last(name: str) -> None:
    model = create(name).to(memory_format=torch.channels_last)
    x = square(name, batch=2).to(memory_format=torch.channels_last)
    for feature in model.forward_intermediates(x, intermediates_only=True):
        assert feature.is_contiguous(memory_format=torch.channels_last)
    assert_same(model(x), shared(name)(square(name, batch=2)))


@torch.no_grad()
@each_fifty
def test_bf16_by_cast_and_by_autocast(name: str) -> None:
    x, model = photo(), create(name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x)
    assert autocast.dtype == torch.bfloat16
    assert_same(autocast.float(), expected, 0.1)
    cast = model.bfloat16()(x.bfloat16())
    assert cast.dtype == torch.bfloat16
    assert_same(cast.float(), expected, 0.1)


# --- stability


def fill(model: nn.Module) -> nn.Module:
    """Give `model` weights that no torch version can change: NumPy's `RandomState` stream is frozen."""
    rng = np.random.RandomState(20220118)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        values = rng.random_sample(tensor.numel()) * (high - low) + low
        tensor.copy_(torch.from_numpy(values).view(tensor.shape))

    for key, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            bound = (6 / tensor[0].numel()) ** 0.5
            uniform(tensor, -bound, bound)
        elif key.endswith(("weight", "running_var")):
            uniform(tensor, 0.5, 1.5)
        elif key.endswith(("bias", "running_mean")):
            uniform(tensor, -0.2, 0.2)
    return model.eval()


@torch.no_grad()
def golden_of(name: str) -> dict[str, object]:
    model = fill(timm.create_model(name, num_classes=6))
    ramp = torch.linspace(-1, 1, 32)
    x = torch.stack([ramp[:, None] * ramp, ramp[:, None] + 0 * ramp, torch.cos(9 * ramp[:, None] + 5 * ramp)])[None]
    layout = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in model.state_dict().items())
    return {
        "state_dict_sha256": hashlib.sha256(layout.encode()).hexdigest(),
        "logits": model(x)[0].tolist(),
        "feature_means": [f.mean().item() for f in model.forward_intermediates(x, intermediates_only=True)],
    }


@each_network
def test_outputs_and_state_dict_are_those_of_the_first_release(name: str) -> None:
    """A change here breaks published weights. If it is meant: `python tests/test_ghost_resnet.py`."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    now = golden_of(name)
    assert now["state_dict_sha256"] == golden["state_dict_sha256"]
    assert_same(torch.tensor(now["logits"]), torch.tensor(golden["logits"]), 1e-4)
    assert now["feature_means"] == pytest.approx(golden["feature_means"], rel=1e-4)


@each_network
def test_state_dict_keys_are_timms_with_the_modules_below(name: str) -> None:
    depth = {"ghost_resnet101": "resnet101", "ghost_resnet152": "resnet152"}.get(name, "resnet50")
    theirs = set(timm.create_model(depth, device="meta").state_dict())
    for key in timm.create_model(name, device="meta").state_dict():
        parts = key.split(".")
        if set(parts) & {"primary_conv", "cheap_operation"}:
            half = next(part for part in parts if part in ("primary_conv", "cheap_operation"))
            assert ".".join([*parts[: parts.index(half)], "weight"]) in theirs, key
        else:
            assert key in theirs


# --- what is left of timm's own tests/test_models.py


@torch.no_grad()
@each_network
def test_default_config_describes_the_network(name: str) -> None:
    model = timm.create_model(name).eval()
    cfg, keys = model.default_cfg, model.state_dict().keys()
    x = torch.randn(1, *cfg["input_size"])
    out = model(x)
    assert out.shape == (1, cfg["num_classes"]) and out.isfinite().all()
    assert model.forward_features(x).shape[-2:] == cfg["pool_size"]
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, *cfg["pool_size"])
    assert f"{cfg['classifier']}.weight" in keys and f"{cfg['first_conv']}.weight" in keys


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: golden_of(name) for name in NETWORKS}, indent=1) + "\n", encoding="utf-8")
