"""Surgery: what must be exact is exact, every step comes nearer, and what is no plain ResNet is refused."""

import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.layers import BlurPool2d
from torch import Tensor, nn
from typer.testing import CliRunner

import ghost_resnet
from ghost_resnet.cli import app
from ghost_resnet.data import Preprocessing
from ghost_resnet.distillation import distill, photo_batches
from ghost_resnet.errors import DataError, GhostResNetError, SurgeryError
from ghost_resnet.hub import save_pretrained
from ghost_resnet.surgery import convert, from_resnet, move_strides_to_1x1

SMALL = (1, 1, 1, 1)
"""Blocks in each stage of the ResNets that most tests operate on; the widths are ResNet-50's."""


def draw(count: int, seed: int, channels: int = 3, side: int = 64) -> Tensor:
    """Smooth blots of colour with hard-edged rectangles on them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, 4, 4, generator=generator)
    images = nn.functional.interpolate(images, side, mode="bicubic")
    for image in images:
        top, left, height, width = (torch.rand(4, generator=generator) * side / 2).int().tolist()
        image[:, top : top + height, left : left + width] = torch.randn(channels, 1, 1, generator=generator)
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def trained_looking(network: nn.Module, images: Tensor, unlike: float = 0.0) -> nn.Module:
    """Give a network batch norms as after training, and first 1x1s of which every filter has a scaled copy.

    `unlike` is how far the copies depart from their originals, in standard deviations."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data = 0.5 + torch.rand(norm.num_features, generator=generator)
        norm.bias.data = 0.3 * torch.randn(norm.num_features, generator=generator)
    network.train()
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    network(images)
    for norm in norms:
        norm.momentum = 0.1
    for block in blocks(network):
        width = block.conv1.out_channels
        original, copy_ = torch.randperm(width, generator=generator).chunk(2)
        filters = block.conv1.weight.data
        noise = torch.randn(filters[original].shape, generator=generator) * filters[original].std()
        filters[copy_] = filters[original] + unlike * noise
        scale = 0.5 + torch.rand(width // 2, generator=generator)
        for values, factor in (
            (block.bn1.weight.data, scale),
            (block.bn1.bias.data, scale),
            (block.bn1.running_mean, 1),
            (block.bn1.running_var, 1),
        ):
            values[copy_] = values[original] * factor
    return network.eval()


def blocks(network: nn.Module) -> list[nn.Module]:
    return [block for stage in "1234" for block in network.get_submodule(f"layer{stage}")]


def resnet(unlike: float = 0.0, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("resnet50", **{"layers": SMALL, "num_classes": 7, **kwargs})
    return trained_looking(network, draw(16, seed=2, channels=network.conv1.in_channels), unlike)


@torch.inference_mode()
def error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """Distance of the logits, relative to how much the teacher's vary."""
    got, expected = student(images), teacher(images)
    return float((got - expected).norm() / (expected - expected.mean(0)).norm())


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


# Exact where it must be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", [None, draw(16, seed=3)], ids=["weights", "calibration"])
def test_a_resnet_of_hidden_pairs_converts_exactly(calibration: Tensor | None) -> None:
    teacher = resnet()
    student = from_resnet(teacher, calibration=calibration)
    images = draw(8, seed=4)
    with torch.inference_mode():
        torch.testing.assert_close(student(images), teacher(images), rtol=1e-4, atol=1e-4)


def test_whatever_both_have_is_copied_bit_for_bit() -> None:
    teacher = resnet(unlike=1.0)
    student = from_resnet(teacher, calibration=draw(8, seed=3))
    theirs, ours = teacher.state_dict(), student.state_dict()
    shared = [key for key in ours if key in theirs and ".bn1." not in key and ".conv2.weight" not in key]
    assert {"conv1.weight", "bn1.running_var", "layer2.0.conv3.weight", "layer3.0.downsample.0.weight", "fc.bias"} < {
        *shared
    }
    for key in shared:
        assert torch.equal(ours[key], theirs[key]), key


def test_kept_filters_keep_batch_norm_and_their_place_in_the_next_convolution() -> None:
    teacher = resnet(unlike=1.0)
    student = from_resnet(teacher, calibration=draw(8, seed=3))
    for old, new in zip(blocks(teacher), blocks(student), strict=True):
        kept = new.conv1.primary_conv[0].weight
        place = [int((old.conv1.weight == filter_).flatten(1).all(1).nonzero()) for filter_ in kept]
        rest = sorted(set(range(old.conv1.out_channels)) - set(place))
        assert len(set(place)) == len(place) == len(rest)
        for key, value in old.bn1.state_dict().items():
            assert torch.equal(new.conv1.primary_conv[1].state_dict()[key], value[place] if value.ndim else value)
        assert torch.equal(new.conv2.weight[:, : len(place)], old.conv2.weight[:, place])
        replaced = new.conv2.weight[:, len(place) :].transpose(0, 1).flatten(1)
        expected = old.conv2.weight[:, rest].transpose(0, 1).flatten(1)
        assert {tuple(row) for row in replaced.tolist()} == {tuple(row) for row in expected.tolist()}


@pytest.mark.parametrize("calibration", [None, draw(8, seed=3)], ids=["weights", "calibration"])
def test_what_the_answers_do_not_depend_on_is_replaced_first(calibration: Tensor | None) -> None:
    teacher = resnet(unlike=2.0)
    for block in blocks(teacher):
        block.conv2.weight.data[:, ::2] = 0  # half of the first maps go nowhere
    student = from_resnet(teacher, calibration=calibration)
    for old, new in zip(blocks(teacher), blocks(student), strict=True):
        kept = {tuple(filter_) for filter_ in new.conv1.primary_conv[0].weight.flatten(1).tolist()}
        assert kept == {tuple(filter_) for filter_ in old.conv1.weight[1::2].flatten(1).tolist()}


def test_batch_norms_hold_the_statistics_of_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghost_resnet.surgery.PRIOR_POSITIONS", 0)
    images = draw(8, seed=3)
    student = from_resnet(resnet(unlike=0.3), calibration=images)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for block in blocks(student):
        for norm in (block.conv1.cheap_operation[1], block.bn1):
            norm.register_forward_hook(lambda norm, inputs, out: seen.update({norm: (inputs[0].clone(), out.clone())}))
    with torch.inference_mode():
        student(images)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    for block in blocks(student):
        cheap, after, half = block.conv1.cheap_operation[1], block.bn1, block.conv1.out_chs // 2
        for norm, known in ((cheap, slice(None)), (after, slice(half))):  # a ReLU changes the second half in between
            inputs = seen[norm][0][:, known]
            close(norm.running_mean[known], inputs.mean((0, 2, 3)))
            close(norm.running_var[known], inputs.var((0, 2, 3), correction=0))
        close(seen[after][1], seen[after][0])
        close(after.running_mean[half:], seen[cheap][1].mean((0, 2, 3)))  # the ResNet's: least squares leave it right


# The same from every kind of source -----------------------------------------------------------------------------


def test_timm_torchvision_and_a_state_dict_give_the_same() -> None:
    images = draw(8, seed=3)
    ours = resnet(unlike=1.0)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, SMALL, num_classes=7)
    theirs.load_state_dict(ours.state_dict())
    student = from_resnet(ours, calibration=images)
    assert_equal(from_resnet(theirs, calibration=images), student)
    assert_equal(from_resnet(ours.state_dict(), calibration=images), student)
    parallel = {f"module.{key}": value for key, value in ours.state_dict().items()}
    assert_equal(from_resnet(parallel, calibration=[(images, "label")]), student)


def test_no_mode_of_autograd_stands_in_the_way() -> None:
    teacher = resnet(unlike=1.0)
    expected = from_resnet(teacher, calibration=draw(8, seed=3))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            student = from_resnet(teacher, calibration=draw(8, seed=3))
        assert_equal(student, expected)
        student(draw(2, seed=4)).sum().backward()


def test_batches_are_summed_up() -> None:
    teacher, images = resnet(unlike=1.0), draw(8, seed=3)
    whole, parts = (from_resnet(teacher, calibration=batches) for batches in (images, images.split(3)))
    torch.testing.assert_close(dict(parts.state_dict()), dict(whole.state_dict()), rtol=1e-3, atol=1e-4)


def test_the_resnet_is_left_as_it_was() -> None:
    teacher = resnet().train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = from_resnet(teacher, calibration=draw(4, seed=3))
    torch.testing.assert_close(dict(teacher.state_dict()), before, rtol=0, atol=0)
    assert teacher.training and not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(("num_classes", "in_chans"), [(0, 3), (2, 1)])
def test_any_head_and_any_input_channels(num_classes: int, in_chans: int) -> None:
    teacher = resnet(num_classes=num_classes, in_chans=in_chans)
    student = from_resnet(teacher, calibration=draw(8, seed=3, channels=in_chans))
    images = draw(4, seed=4, channels=in_chans)
    assert error(student, teacher, images) < 1e-4
    assert student.num_classes == num_classes


@pytest.mark.parametrize("name", ["resnet26", pytest.param("resnet101", marks=pytest.mark.slow)])
def test_depth_is_the_resnets(name: str) -> None:
    teacher = timm.create_model(name, num_classes=3)
    arch = {"resnet26": "ghost_resnet50", "resnet101": "ghost_resnet101"}[name]
    student = from_resnet(teacher, arch, calibration=draw(2, seed=3))
    assert isinstance(student, ghost_resnet.GhostResNet)
    assert len(blocks(student)) == len(blocks(teacher))


def test_cifar_stem() -> None:
    teacher = timm.create_model("resnet50", num_classes=3)
    teacher.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    teacher.maxpool = nn.Identity()
    images = draw(4, seed=3, side=16)
    teacher = trained_looking(teacher, images)
    student = from_resnet(teacher, "ghost_resnet50_cifar", calibration=images)
    assert error(student, teacher, images) < 1e-4


def test_strides_on_the_first_1x1_are_kept() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("resnet50", layers=SMALL, num_classes=7)
    move_strides_to_1x1(teacher)
    teacher = trained_looking(teacher, draw(16, seed=2))
    images = draw(8, seed=3)
    student = from_resnet(teacher, calibration=images)
    assert student.layer2[0].conv1.primary_conv[0].stride == (2, 2) and student.layer2[0].conv2.stride == (1, 1)
    assert error(student, teacher, images) < 1e-4
    assert_equal(from_resnet(teacher.state_dict(), calibration=images, stride_on_1x1=True), student)

    again = timm.create_model("ghost_resnet50", layers=SMALL, num_classes=7).eval()
    again.load_state_dict(student.state_dict())
    assert error(again, teacher, images) > 1e-2
    move_strides_to_1x1(again)
    move_strides_to_1x1(again)  # twice is once
    assert error(again, teacher, images) < 1e-4


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "complaint"),
    [
        ("resnet18", {}, "stage without any layer"),
        ("resnet34", {}, "stage without any layer"),
        ("resnet50d", {}, "no conv1.weight"),
        ("resnext50_32x4d", {}, "layer1.0.conv1.weight of shape"),
        ("wide_resnet50_2", {}, "layer1.0.conv1.weight of shape"),
        ("seresnet50", {}, "an unknown layer1.0.se"),
        ("resnet50_gn", {}, "no bn1.running_mean"),
        ("resnetv2_50", {}, "no conv1.weight"),
        ("convnext_atto", {}, "no conv1.weight"),
        ("resnet50", {"layers": SMALL, "output_stride": 16}, "stride"),
        ("resnet50", {"layers": SMALL, "act_layer": "silu"}, "act1 to be ReLU, got SiLU"),
        ("resnet50", {"layers": SMALL, "global_pool": "max"}, "global_pool"),
        ("resnet50", {"layers": SMALL, "aa_layer": BlurPool2d}, "maxpool"),
        ("ghost_resnet50", {}, "no layer1.0.conv1.weight"),
        ("resnet101", {}, "becomes a ghost_resnet101, got arch='ghost_resnet50'"),
    ],
)
def test_what_is_no_plain_bottleneck_resnet_is_refused(name: str, kwargs: dict, complaint: str) -> None:
    network = timm.create_model(name, num_classes=3, **kwargs)
    with pytest.raises(SurgeryError, match=complaint) as caught:
        from_resnet(network)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, GhostResNetError)


@pytest.mark.parametrize("arch", ["ghost_resnet101", "ghost_resnet50_s2", "resnet50", "nonsense"])
def test_architectures_that_cannot_hold_it_are_refused(arch: str) -> None:
    with pytest.raises(SurgeryError, match=f"becomes a ghost_resnet50 or ghost_resnet50_cifar, got arch='{arch}'"):
        from_resnet(timm.create_model("resnet50", layers=SMALL), arch)


def test_an_imagenet_stem_does_not_become_a_cifar_stem() -> None:
    with pytest.raises(SurgeryError, match=r"conv1.weight of shape \(64, 3, 7, 7\) instead of \(64, 3, 3, 3\)"):
        from_resnet(timm.create_model("resnet50", layers=SMALL), "ghost_resnet50_cifar")


def test_incomplete_state_dicts_and_other_things_are_refused() -> None:
    state = timm.create_model("resnet50", layers=SMALL).state_dict()
    del state["layer3.0.bn2.running_var"]
    with pytest.raises(SurgeryError, match=r"no layer3\.0\.bn2\.running_var$"):
        from_resnet(state)
    for other in ("resnet50", {"state_dict": state}, None):
        with pytest.raises(SurgeryError, match="expected a ResNet or its state dict, got"):
            from_resnet(other)


@pytest.mark.parametrize(
    ("calibration", "complaint"),
    [([], "at least one batch"), (draw(3, seed=3)[0], "shape"), ([draw(1, 3)[0]], "shape")],
)
def test_calibration_images_must_be_batches(calibration: object, complaint: str) -> None:
    with pytest.raises(SurgeryError, match=complaint):
        from_resnet(timm.create_model("resnet50", layers=SMALL), calibration=calibration)


# Nearer with every step -----------------------------------------------------------------------------------------


def draw_places(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, 32, 32)` with a bright square in one of four places, and which."""
    images = draw(count, seed, side=32)
    places = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    for image, place in zip(images, places.tolist(), strict=True):
        top, left = 16 * (place // 2) + 4, 16 * (place % 2) + 4
        image[:, top : top + 8, left : left + 8] += torch.tensor([2.0, 1.0, -1.0])[:, None, None]
    return images, places


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ResNet that knows where the square is."""
    network = resnet(unlike=2.0, num_classes=4)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    images, places = draw_places(256, seed=1)
    network.train()
    for _ in range(3):
        for x, y in zip(images.split(32), places.split(32), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network.eval()


@torch.inference_mode()
def divergence(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    got, expected = student(images).log_softmax(1), teacher(images).log_softmax(1)
    return nn.functional.kl_div(got, expected, log_target=True, reduction="batchmean").item()


def test_every_step_comes_nearer_to_the_teacher(trained: nn.Module) -> None:
    unseen = draw_places(128, seed=2)[0]
    seen = draw_places(192, seed=3)[0]
    steps = [divergence(from_resnet(trained), trained, unseen)]
    student = from_resnet(trained, calibration=seen.split(32))
    steps.append(divergence(student, trained, unseen))
    distill(student, trained, seen.split(32), block_epochs=3, logit_epochs=0)
    steps.append(divergence(student, trained, unseen))
    assert all(after < 0.8 * before for before, after in itertools.pairwise(steps)), steps
    before = divergence(student, trained, seen)
    distill(student, trained, seen.split(32), block_epochs=0, logit_epochs=3)
    assert divergence(student, trained, seen) < 0.5 * before
    assert divergence(student, trained, unseen) < 1.1 * steps[-1]


def test_blocks_learn_in_what_is_new_only() -> None:
    teacher = resnet(unlike=0.5)
    images = draw(8, seed=3, side=32)
    student = from_resnet(teacher, calibration=images)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    theirs = {key: value.clone() for key, value in teacher.state_dict().items()}
    distill(student, teacher, [(images, "label")], block_epochs=1, logit_epochs=0)
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    new = {key for key, _ in student.named_parameters() if re.match(r"layer\d\.\d\.(conv1|bn1)\.", key)}
    assert changed == new
    assert all(torch.equal(value, theirs[key]) for key, value in teacher.state_dict().items())
    distill(student, teacher, images, block_epochs=0, logit_epochs=1)
    assert not torch.equal(student.fc.weight, before["fc.weight"])
    assert torch.equal(student.bn1.running_mean, before["bn1.running_mean"])


def test_distillation_refuses_what_it_cannot_work_with() -> None:
    teacher = resnet()
    student = from_resnet(teacher, calibration=draw(2, seed=3))
    with pytest.raises(SurgeryError, match="got an iterator"):
        distill(student, teacher, iter([draw(2, seed=3)]), block_epochs=2)
    with pytest.raises(SurgeryError, match="at least one batch"):
        distill(student, teacher, [], block_epochs=1)
    with pytest.raises(SurgeryError, match="blocks differ"):
        distill(student, timm.create_model("resnet26", num_classes=7), draw(2, seed=3))


# The whole way --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(draw(6, seed=3, side=48)):
        pixels = ((image.clamp(-2, 2) + 2) * 63).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("with_photos", [True, False])
def test_a_folder_becomes_a_folder_that_timm_opens(with_photos: bool, photos: Path, tmp_path: Path) -> None:
    preprocessing = Preprocessing((3, 32, 32), "bilinear", 1.0, "squash", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    teacher = resnet(num_classes=2)
    save_pretrained(teacher, tmp_path / "teacher", labels=["cat", "dog"], preprocessing=vars(preprocessing))
    out = convert(str(tmp_path / "teacher"), tmp_path / "ghost", photos=photos if with_photos else None, logit_epochs=0)
    student = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert isinstance(student, ghost_resnet.GhostResNet)
    assert student.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert Preprocessing.from_config(student.pretrained_cfg) == preprocessing
    images = draw(4, seed=4, side=32)
    untouched = timm.create_model("ghost_resnet50", layers=SMALL, num_classes=2).eval()
    assert error(student, teacher, images) < 0.2 * error(untouched, teacher, images)


def test_the_command_line_operates_and_says_where_the_network_is(tmp_path: Path) -> None:
    save_pretrained(resnet(num_classes=2), tmp_path / "teacher", labels=["cat", "dog"])
    command = ["surgery", str(tmp_path / "teacher"), "--out", str(tmp_path / "ghost")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'ghost'}\n"
    assert (tmp_path / "ghost" / "model.safetensors").is_file()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "an empty one" in again.stderr
    refused = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other"), "--arch", "ghost_resnet50_s2"])
    assert refused.exit_code == 2 and "ghost_resnet50_s2" in refused.stderr


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    teacher = save_pretrained(resnet(num_classes=2), tmp_path / "teacher", labels=["cat", "dog"])
    before = (teacher / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SurgeryError, match="an empty one"):
        convert(str(teacher), teacher)
    assert (teacher / "model.safetensors").stat().st_mtime_ns == before


def test_an_empty_folder_of_photos_is_refused(tmp_path: Path) -> None:
    save_pretrained(resnet(num_classes=2), tmp_path / "teacher", labels=["cat", "dog"])
    with pytest.raises(DataError, match="expected photos in"):
        convert(str(tmp_path / "teacher"), tmp_path / "ghost", photos=tmp_path / "none")


def test_photo_batches_are_preprocessed_and_random_only_if_asked(photos: Path) -> None:
    preprocessing = Preprocessing((1, 32, 32), mean=(0.5,), std=(0.25,))
    paths = sorted(photos.iterdir())
    plain = photo_batches(paths, preprocessing, 4)
    assert [images.shape for images, _ in plain] == [(4, 1, 32, 32), (2, 1, 32, 32)]
    expected = torch.from_numpy(preprocessing.read(paths[0]))
    assert torch.equal(next(iter(plain))[0][0], expected)
    crops = photo_batches(paths, preprocessing, 4, augment=True)
    first, second = (torch.cat([images for images, _ in crops]) for _ in range(2))
    assert first.shape == (6, 1, 32, 32) and not torch.equal(first, second)
