"""Batch-norm folding for inference."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import nn

import ghost_resnet
from ghost_resnet.folding import split_ghost_norms
from ghost_resnet.ghost_resnet import GhostBottleneck

NETWORKS = timm.list_models("*ghost_resnet*")
KEPT = {"ghost_resnet50": 16, "ghost_resnet50_cifar": 16, "ghost_resnet101": 33, "ghost_resnet152": 50}


def drawn_photo(seed: int) -> Image.Image:
    rng = np.random.RandomState(seed)
    image = Image.fromarray(rng.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize((320, 240))
    ImageDraw.Draw(image).ellipse((60, 40, 220, 200), fill=(200, 60, 30))
    return image


def batch(images: list[Image.Image]) -> torch.Tensor:
    pixels = [np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    return batch([drawn_photo(seed) for seed in range(4)])


@pytest.fixture(scope="module")
def real_photos(data_root: Path) -> torch.Tensor:
    folders = sorted((data_root / "trashnet").iterdir())[:4]
    return batch([Image.open(min(folder.glob("*.jpg"))) for folder in folders])


def trained(name: str, photos: torch.Tensor, **kwargs: object) -> nn.Module:
    """A network whose batch norms have learnt something; still in training mode."""
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False, **kwargs)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
        for _ in range(3):
            model(photos)
    return model


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def check_fold(name: str, photos: torch.Tensor) -> None:
    model = trained(name, photos)
    folded = ghost_resnet.fold_batch_norm(model)
    expected = model.eval()(photos)
    assert expected.std(dim=0).max() > 1e-3 * expected.abs().max()  # the photos differ: a constant can't pass
    assert (folded(photos) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_gives_the_same_outputs(name: str, photos: torch.Tensor) -> None:
    check_fold(name, photos)


@pytest.mark.parametrize("name", ["ghost_resnet50", "ghost_resnet50_cifar", "ghost_resnet50_s2"])
def test_folded_network_gives_the_same_outputs_on_real_photos(name: str, real_photos: torch.Tensor) -> None:
    check_fold(name, real_photos)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_norm_is_folded_but_the_one_after_a_ghost_module(name: str) -> None:
    folded = ghost_resnet.fold_batch_norm(timm.create_model(name, device="meta"))
    assert len(norms(folded)) == KEPT.get(name, 0)
    for kept in norms(folded):
        block = folded.get_submodule(kept.rpartition(".")[0])
        assert kept.endswith(".bn1") and isinstance(block.conv1, ghost_resnet.GhostModule)


def test_original_is_untouched_and_the_copy_is_in_evaluation_mode(photos: torch.Tensor) -> None:
    model = trained("ghost_resnet50", photos)
    before = copy.deepcopy(model.state_dict())
    folded = ghost_resnet.fold_batch_norm(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in folded.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in folded.parameters()}
    assert not shared


@torch.no_grad()
def test_folded_network_keeps_its_class_and_methods(photos: torch.Tensor) -> None:
    model = trained("ghost_resnet50", photos, num_classes=6).eval()
    folded = ghost_resnet.fold_batch_norm(model)
    assert type(folded) is type(model)
    assert folded.num_classes == 6 and folded.pretrained_cfg == model.pretrained_cfg
    features, expected = folded.forward_features(photos), model.forward_features(photos)
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()
    for ours, theirs in zip(
        folded.forward_intermediates(photos, intermediates_only=True),
        model.forward_intermediates(photos, intermediates_only=True),
        strict=True,
    ):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_args": {"attn_layer": "se"}, "drop_path_rate": 0.1, "drop_block_rate": 0.1},
        {"stem_type": "deep", "avg_down": True, "aa_layer": timm.layers.BlurPool2d},
        {"features_only": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_other_constructions_fold_too(photos: torch.Tensor, kwargs: dict) -> None:
    model = trained("ghost_resnet50_s2", photos, layers=(1, 1, 1, 1), **kwargs)
    model.eval()
    folded = ghost_resnet.fold_batch_norm(model)
    assert not norms(folded)
    ours, theirs = folded(photos), model(photos)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_gradient_checkpointing_does_not_hinder(photos: torch.Tensor) -> None:
    model = trained("ghost_resnet50", photos, layers=(1, 1, 1, 1)).eval()
    model.set_grad_checkpointing()
    folded = ghost_resnet.fold_batch_norm(model)
    assert len(norms(folded)) == 4
    torch.testing.assert_close(folded(photos), model(photos), rtol=1e-4, atol=1e-4)


class Awkward(nn.Module):
    """Convolutions and norms that must not be merged, and one pair with two names that must."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.twice_norm = nn.BatchNorm2d(4)
        self.branching = nn.Conv2d(4, 4, 1)
        self.branching_norm = nn.BatchNorm2d(4)
        self.batch_statistics = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
        self.norm_act = nn.Sequential(nn.Conv2d(4, 4, 1), timm.layers.BatchNormAct2d(4))
        self.conv_alias, self.norm_alias = self.conv, self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_alias(self.conv_alias(x))
        x = self.twice(self.twice_norm(self.twice(x)))
        branch = self.branching(x)
        x = self.branching_norm(branch) + branch
        return self.norm_act(self.batch_statistics(x))


@torch.no_grad()
def test_only_sound_pairs_are_folded(photos: torch.Tensor) -> None:
    model = Awkward()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    for _ in range(3):
        model(photos)
    folded = ghost_resnet.fold_batch_norm(model)
    assert isinstance(folded.norm, nn.Identity) and folded.norm_alias is folded.norm
    assert set(norms(folded)) == {"twice_norm", "branching_norm", "batch_statistics.1", "norm_act.1"}
    torch.testing.assert_close(folded(photos), model.eval()(photos), rtol=1e-5, atol=1e-5)


def test_forward_that_depends_on_values_is_a_trace_error() -> None:
    class Dynamic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(torch.fx.proxy.TraceError):
        ghost_resnet.fold_batch_norm(Dynamic())


# The norm after a Ghost module, in front of the concatenation


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{}, {"ratio": 3}, {"output_stride": 16}])
def test_split_norms_give_the_same_outputs(photos: torch.Tensor, kwargs: dict) -> None:
    model = trained("ghost_resnet50", photos, layers=(1, 1, 1, 1), **kwargs).eval()
    for norm in (block.bn1 for block in model.modules() if isinstance(block, GhostBottleneck)):
        norm.weight[::3] *= -1  # the rewriting must hold for scales and shifts of every sign
        signs = zip((norm.weight > 0).tolist(), (norm.bias > 0).tolist(), strict=True)
        assert len(set(signs)) == 4
    before = copy.deepcopy(model.state_dict())
    split = split_ghost_norms(model)
    expected = model(photos)
    assert expected.std(dim=0).max() > 1e-3 * expected.abs().max()
    assert (split(photos) - expected).abs().max() <= 1e-6 * expected.abs().max()
    folded = ghost_resnet.fold_batch_norm(split)
    assert (folded(photos) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_split_norms_are_in_front_of_the_concatenation() -> None:
    split = split_ghost_norms(timm.create_model("ghost_resnet50"))
    assert sum(name.endswith(("primary_norm.0", "cheap_norm.0")) for name in norms(split)) == 2 * 16
    assert not any(name.endswith(".bn1") for name in norms(split) if name.startswith("layer"))


def test_networks_without_that_norm_are_left_alone() -> None:
    for name in ("ghost_resnet50_s4", "resnet18"):
        model = timm.create_model(name, device="meta")
        assert norms(split_ghost_norms(model)) == norms(model)
