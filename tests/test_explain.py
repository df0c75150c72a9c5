"""Heat maps: the heat falls where the answer comes from, at the right place of the photo, and errors are sentences."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawing import draw
from PIL import Image
from typer.testing import CliRunner

from ghost_resnet import Explainer, GarbageClassifier, hub
from ghost_resnet.cli import app
from ghost_resnet.errors import ConfigError, LabelError, UnreadableImageError
from ghost_resnet.explain import _field_of_view

pytestmark = pytest.mark.ecosystem
pytest.importorskip("pytorch_grad_cam", reason="needs the extra `explain`")

SIDE = 64
PREPROCESSING = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0,) * 3}


def red_or_blue(folder: Path, **preprocessing: object) -> Path:
    """A run folder of a Ghost-ResNet whose weights are set by hand: it says how much of a photo is red, and blue.

    Its stem takes red to channel 0 and blue to channel 1, every residual branch gives 0, and the shortcuts pass on.
    """
    model = timm.create_model("ghost_resnet50_cifar", layers=(1, 1, 1, 1), num_classes=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.zero_()
        model.conv1.weight[0, 0, 1, 1] = model.conv1.weight[1, 2, 1, 1] = 1
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for channel in (0, 1):
                stage[0].downsample[0].weight[channel, channel] = 1
        model.fc.weight[0, 0] = model.fc.weight[1, 1] = 1
    hub.save_pretrained(
        model, folder, labels=["red", "blue"], preprocessing={**PREPROCESSING, "std": (1,) * 3, **preprocessing}
    )
    return folder


def squares(size: tuple[int, int], **boxes: tuple[int, int, int, int]) -> Image.Image:
    """A black photo with a rectangle of each named colour."""
    photo = Image.new("RGB", size)
    for colour, box in boxes.items():
        photo.paste(colour, box)
    return photo


@pytest.fixture(scope="module")
def knows_colours(tmp_path_factory: pytest.TempPathFactory) -> Explainer:
    """An explainer of `red_or_blue`."""
    return Explainer(red_or_blue(tmp_path_factory.mktemp("model") / "colours"), device="cpu")


@pytest.mark.parametrize("row", (0, 1))
@pytest.mark.parametrize("column", (0, 1))
def test_the_heat_falls_on_the_quadrant_that_alone_decides(knows_colours: Explainer, row: int, column: int) -> None:
    red = (100 * column, 100 * row)
    blue = (100 - 100 * column, 100 - 100 * row)
    photo = squares((200, 200), red=(*red, red[0] + 100, red[1] + 100), blue=(*blue, blue[0] + 75, blue[1] + 75))
    for label, (left, top) in (("red", red), ("blue", blue)):
        found = knows_colours.explain(photo, label)
        quadrant = found.heat[top : top + 100, left : left + 100]
        assert found.label == label and found.heat.dtype == np.float32 and found.heat.max() > 0.99
        assert quadrant.mean() > 0.45
        assert quadrant.sum() > 0.75 * found.heat.sum()
    assert knows_colours.explain(photo).label == "red"


def test_what_preprocessing_cuts_off_has_no_heat_and_is_grey(knows_colours: Explainer) -> None:
    found = knows_colours.explain(squares((400, 200), red=(0, 0, 400, 100)))
    assert found.heat[:75, 100:300].min() > 0.9 and found.heat[:, :100].max() == found.heat[:, 300:].max() == 0
    pixels = np.asarray(found.overlay).astype(int)
    colourfulness = np.ptp(pixels[:75], axis=2)
    assert colourfulness[:, :100].max() == colourfulness[:, 300:].max() == 0 < colourfulness[:, 100:300].min()


@pytest.mark.parametrize(
    ("changes", "size", "seen"),
    [
        ({}, (400, 200), (100, 0, 300, 200)),
        ({}, (200, 400), (0, 100, 200, 300)),
        ({"crop_pct": 0.5}, (400, 200), (150, 50, 250, 150)),
        ({"crop_pct": 0.5, "crop_mode": "squash"}, (400, 200), (100, 50, 300, 150)),
    ],
)
def test_the_field_of_view_is_what_preprocessing_takes(
    tmp_path: Path, changes: dict, size: tuple[int, int], seen: tuple[int, ...]
) -> None:
    """By the photo itself: a colour that fills exactly that rectangle is all that the network gets."""
    explainer = Explainer(red_or_blue(tmp_path / "model", **changes), device="cpu")
    assert _field_of_view(explainer.preprocessing, size) == seen
    taken = explainer.preprocessing(squares(size, red=seen))
    assert taken[0, 2:-2, 2:-2].min() > 0.99
    left, top, right, bottom = seen
    smaller = (left + 16, top + 16, right - 16, bottom - 16)
    assert explainer.preprocessing(squares(size, red=smaller))[0, [0, -1]].max() < 0.01


def test_the_answer_explained_is_the_classifiers(run_folder: Path) -> None:
    explainer = Explainer(run_folder, device="cpu")
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    labels = set()
    for seed in range(8):
        found = explainer.explain(draw(seed=seed))
        assert found.label == classifier.predict(draw(seed=seed)).label
        labels.add(found.label)
    assert len(labels) > 1


def test_large_photos_give_overlays_of_modest_size(knows_colours: Explainer) -> None:
    found = knows_colours.explain(draw(3000, 1000))
    assert found.overlay.size == (640, 213) and found.heat.shape == (213, 640)


def test_a_photo_without_anything_of_the_class_has_no_heat(knows_colours: Explainer) -> None:
    found = knows_colours.explain(squares((50, 50)), "blue")
    assert not found.heat.any() and not np.asarray(found.overlay).any()


def test_a_script_that_ends_with_an_explainer_ends_in_silence(run_folder: Path, tmp_path: Path) -> None:
    draw().save(tmp_path / "photo.png")
    script = "import sys, ghost_resnet; e = ghost_resnet.Explainer(sys.argv[1], device='cpu'); e.explain(sys.argv[2])"
    command = [sys.executable, "-c", script, str(run_folder), str(tmp_path / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_use_is_answered_with_a_sentence(knows_colours: Explainer, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"expected a class of this model \(red, blue\), got 'green'"):
        knows_colours.explain(draw(), "green")
    with pytest.raises(UnreadableImageError):
        knows_colours.explain(b"no photo")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, img_size=SIDE, depth=1)
    hub.save_pretrained(vit, tmp_path / "vit", labels=["a", "b"], preprocessing=PREPROCESSING)
    with pytest.raises(ConfigError, match=r"convolutional feature maps.*vit_tiny_patch16_224"):
        Explainer(tmp_path / "vit", device="cpu")


def test_the_command_writes_an_overlay_a_photo_and_names_what_it_can_not_read(run_folder: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw(seed=1).save(tmp_path / folder / "photo.png")
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    photos = [str(tmp_path / name) for name in ("a/photo.png", "bad.jpg", "b/photo.png")]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["explain", *photos, "--model", str(run_folder), "--out", str(out), "--class", "metal"]
    )
    assert done.exit_code == 1 and "bad.jpg: no image" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(": metal, " in line for line in lines)
    written = sorted(out.iterdir())
    assert [path.name for path in written] == ["photo-2.metal.png", "photo.metal.png"]
    assert all(Image.open(path).size == (48, 40) for path in written)

    done = CliRunner().invoke(
        app, ["explain", photos[0], "--model", str(run_folder), "--out", str(out), "--class", "gold"]
    )
    assert done.exit_code == 2 and "expected a class of this model" in done.stderr


def test_the_name_of_a_class_leads_to_no_other_folder(run_folder: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(run_folder, hostile)
    config = json.loads((hostile / "config.json").read_text())
    config["label_names"] = [f"/../../away/{number}" for number in range(8)]
    config["pretrained_cfg"].pop("label_names", None)
    (hostile / "config.json").write_text(json.dumps(config))
    draw(seed=1).save(tmp_path / "photo.png")
    command = ["explain", str(tmp_path / "photo.png"), "--model", str(hostile), "--out", str(tmp_path / "a" / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    (written,) = (tmp_path / "a").rglob("*.png")
    assert written.parent == tmp_path / "a" / "out"
    assert not (tmp_path / "away").exists() and not (tmp_path / "a" / "away").exists()
