"""The examples run as their docstrings say, on drawn photos."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawing import draw, write_folder
from PIL import Image, ImageDraw

import ghost_resnet  # noqa: F401  (registers the networks)
from ghost_resnet import GarbageClassifier, hub
from ghost_resnet.data import find_images

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str | Path, cwd: Path) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def losses(lines: list[str]) -> list[float]:
    return [float(line.rpartition("loss ")[2]) for line in lines if line.startswith("epoch ")]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A classifier to start from, as surgery or a training would make it."""
    return hub.save_pretrained(
        timm.create_model("ghost_resnet50", num_classes=2), tmp_path / "start", labels=["a", "b"]
    )


def test_every_example_has_a_test() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text or f"import {path.stem}\n" in text, path


@pytest.mark.slow
def test_fine_tuning_tests_on_photos_that_it_did_not_train_on(tmp_path: Path) -> None:
    write_folder(tmp_path / "my_photos", {"glass": 10, "metal": 10})
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        'arch = "ghost_resnet50_cifar"\nimg_size = 32\nbatch_size = 4\n[model_args]\nlayers = [1, 1, 1, 1]\n'
    )
    lines = run("finetune.py", "my_photos", "runs/mine", "--recipe", recipe, "--epochs", "2", cwd=tmp_path)
    assert len(losses(lines)) == 2
    train, test = (set((tmp_path / f"runs/mine-{part}.txt").read_text().split()) for part in ("train", "test"))
    assert len(train) == 16 and len(test) == 4 and not train & test
    (error,) = (float(line.split()[-1]) for line in lines if line.startswith("Top 1 err"))
    mistakes = [line for line in lines if " was taken for " in line]
    assert len(mistakes) == round(error * 4) and all(line.split()[0] in test for line in mistakes)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


@pytest.mark.slow
def test_sorting_copies_each_photo_to_its_class_and_names_the_unreadable(run_folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number in range(5):
        (photos / f"day{number % 2}").mkdir(parents=True, exist_ok=True)
        draw(seed=number).save(photos / f"day{number % 2}" / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"no photo")
    run("sort_photos.py", "photos", "sorted", run_folder, "--unsure-below", "0.3", cwd=tmp_path)
    with (tmp_path / "sorted" / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and [row["photo"] for row in rows if row["error"]] == ["broken.jpg"]
    expected = {
        f"{row['label'] if float(row['score']) >= 0.3 else 'unsure'}/{row['photo']}" for row in rows if row["label"]
    }
    found = {path.relative_to(tmp_path / "sorted").as_posix() for path in (tmp_path / "sorted").rglob("*.png")}
    assert found == expected and len({name.split("/")[0] for name in found}) > 1


@pytest.mark.slow
@pytest.mark.ecosystem
def test_segmentation_learns_masks_and_saves_the_network(start: Path, tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    for kind in ("images", "masks"):
        (tmp_path / "my_masks" / kind).mkdir(parents=True)
    for number in range(4):
        image = draw(64, 64, seed=number)
        image.save(tmp_path / "my_masks" / "images" / f"{number}.jpg")
        light = np.asarray(image.convert("L")) > 128
        Image.fromarray(light.astype(np.uint8)).save(tmp_path / "my_masks" / "masks" / f"{number}.png")
    options = "--classes", 2, "--start", start, "--epochs", 3, "--side", 64
    found = losses(run("segmentation.py", "my_masks", "runs/unet", *options, cwd=tmp_path))
    assert len(found) == 3 and found[-1] < found[0]
    model = smp.from_pretrained(tmp_path / "runs" / "unet").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.slow
def test_detection_learns_boxes_and_saves_the_network(start: Path, tmp_path: Path) -> None:
    (tmp_path / "my_boxes").mkdir()
    lines = ["photo,label,x1,y1,x2,y2"]
    for number in range(4):
        image = draw(96, 96, seed=number)
        ImageDraw.Draw(image).rectangle([20, 20, 60, 70], fill="white")
        image.save(tmp_path / "my_boxes" / f"{number}.png")
        lines.append(f"{number}.png,{('can', 'bottle')[number % 2]},20,20,60,70")
    (tmp_path / "my_boxes" / "boxes.csv").write_text("\n".join(lines))
    options = "--start", start, "--epochs", 4, "--side", 96
    printed = run("detection.py", "my_boxes", "detector.pt", *options, cwd=tmp_path)
    found = losses(printed)
    assert len(found) == 4 and found[-1] < found[0]
    boxes = [line.split() for line in printed if not line.startswith("epoch ")]
    assert all(box[1] in {"bottle", "can"} and len(box) == 7 for box in boxes)
    assert torch.load(tmp_path / "detector.pt", weights_only=True)["labels"] == ["bottle", "can"]


@pytest.mark.slow
@pytest.mark.ecosystem
def test_ray_gives_the_answers_of_a_single_process_even_if_a_worker_dies(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ray_predict

    photos = write_folder(tmp_path / "photos", {"glass": 20, "metal": 20})
    (photos / "glass" / "cut.jpg").write_bytes((photos / "glass" / "glass1.jpg").read_bytes()[:300])
    died = tmp_path / "died"

    class Mortal(ray_predict.Predictor):
        def __call__(self, block):
            if not died.exists():
                died.touch()
                os._exit(1)
            return super().__call__(block)

    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), *sys.path])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    try:
        out = tmp_path / "answers"
        with pytest.raises(SystemExit, match="no core of 2 to read with"):
            ray_predict.predict([str(photos)], str(run_folder), str(out), workers=3)
        ray_predict.predict([str(photos)], str(run_folder), str(out), workers=2, predictor=Mortal)
    finally:
        ray.shutdown()
    assert died.exists()
    rows = {row["path"]: row for row in parquet.read_table(out).to_pylist()}
    paths = list(find_images(photos))
    assert sorted(rows) == sorted(map(str, paths))
    for path, answer in zip(paths, GarbageClassifier.from_pretrained(run_folder).predict(paths), strict=True):
        row = rows[str(path)]
        assert (row["label"] or "") == answer.label and bool(row["error"]) == bool(answer.error)
        assert {s["label"]: s["score"] for s in row["scores"]} == pytest.approx(dict(answer.scores), abs=1e-4)
