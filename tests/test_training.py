"""Training: what a run folder holds, that it resumes exactly, and that what goes wrong is said and loses nothing."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from ghost_resnet import GarbageClassifier, cli, evaluate, finetune, training
from ghost_resnet.errors import DataError, RecipeError, RunError, TrainingError
from ghost_resnet.recipes import Recipe

TINY = Recipe(
    arch="ghost_resnet50_s4",
    model_args={"layers": [1, 1, 1, 1]},
    img_size=32,
    cache_side=32,
    epochs=2,
    batch_size=8,
    lr=0.02,
    val_fraction=0.0,
    precision="fp32",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that a network can tell apart: stripes that lie and stripes that stand, in random colours."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in ("lying", "standing"):
        (root / label).mkdir()
        for i in range(14):
            stripes = (np.sin(np.arange(40) * rng.uniform(0.5, 1.2) + rng.uniform(0, 6)) > 0)[:, None, None]
            pixels = np.where(stripes, rng.integers(0, 256, 3), rng.integers(0, 256, 3)).repeat(48, 1)
            pixels = pixels + rng.integers(0, 30, pixels.shape)
            pixels = pixels if label == "lying" else pixels.transpose(1, 0, 2)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / label / f"{i:02}.png")
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_what_is_promised_and_opens_in_timm_and_here(photos: Path, tmp_path: Path) -> None:
    events: list[training.Progress] = []
    run = finetune(photos, tmp_path / "run", replace(TINY, val_fraction=0.25), on_progress=events.append)

    assert {path.name for path in run.folder.iterdir()} == {
        "README.md",
        "checkpoints",
        "config.json",
        "history.csv",
        "metrics.json",
        "model.safetensors",
        "photos.sha256",
        "recipe.toml",
        "report.html",
        "tensorboard",
    }
    assert run.metrics.photos == 8 and run.metrics.measured_on == "8 photos that were held out"
    assert [row["epoch"] for row in history(run.folder)] == ["1", "2"]
    assert [event.val_top1 is not None for event in events] == [event.epoch_done for event in events]
    assert sum(event.epoch_done for event in events) == 2 and len(events) == 2 * (events[0].steps + 1)

    model = timm.create_model(f"local-dir:{run.folder}", pretrained=True).eval()
    assert model.num_classes == 2 and model.pretrained_cfg["label_names"] == ["lying", "standing"]
    assert GarbageClassifier.from_pretrained(run.folder).labels == ("lying", "standing")

    log = EventAccumulator(str(run.folder / "tensorboard"))
    log.Reload()
    assert len(log.Scalars("train/loss")) == len(log.Scalars("train/lr")) == 2 * events[0].steps
    assert log.Scalars("val/top1")[-1].value == pytest.approx(float(history(run.folder)[-1]["val_top1"]))


def test_training_learns_and_the_kept_metrics_are_those_of_the_saved_weights(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=8, crop_scale=(0.8, 1.0), hflip=0.5)
    (tmp_path / "val.txt").write_text("".join(f"{c}/{i:02}.png\n" for c in ("lying", "standing") for i in range(14)))
    run = finetune(photos, tmp_path / "run", recipe, val=tmp_path / "val.txt")
    assert run.metrics.top1 == max(row["val_top1"] for row in run.history) >= 0.8
    measured = evaluate(run.folder, photos)
    assert measured.top1 == run.metrics.top1
    assert measured.loss == pytest.approx(run.metrics.loss, abs=1e-4)


def test_the_finished_classifier_is_calibrated_on_the_validation_photos(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=4, val_fraction=0.25)
    fitted = finetune(photos, tmp_path / "fitted", recipe)
    temperature = GarbageClassifier.from_pretrained(fitted.folder).temperature
    assert temperature != 1.0
    hot = finetune(photos, tmp_path / "hot", replace(recipe, calibration=50.0))
    assert GarbageClassifier.from_pretrained(hot.folder).temperature == 50.0
    assert hot.metrics.loss == pytest.approx(np.log(2), abs=0.02)
    before = {row["val_loss"] for row in fitted.history if row["val_top1"] == fitted.metrics.top1}
    assert fitted.metrics.loss < max(before)
    without = finetune(photos, tmp_path / "without", replace(TINY, epochs=1))
    assert GarbageClassifier.from_pretrained(without.folder).temperature == 1.0


def test_a_run_repeats_exactly_from_its_saved_recipe(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, auto_augment="rand-m5", random_erasing=0.3, color_jitter=0.2, ema_decay=0.9)
    first = finetune(photos, tmp_path / "first", recipe)
    assert first.metrics.measured_on == "the training photos" and first.metrics.photos == 28
    finetune(photos, tmp_path / "second", first.folder / "recipe.toml")
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    finetune(photos, tmp_path / "other", first.folder / "recipe.toml", overrides={"seed": 1})
    assert not torch.equal(weights(tmp_path / "other")["fc.weight"], weights(tmp_path / "first")["fc.weight"])


class Killed(Exception):
    pass


def kill_at(epoch: int, step: int) -> Any:
    def on_progress(progress: training.Progress) -> None:
        if (progress.epoch, progress.step) == (epoch, step) and not progress.epoch_done:
            raise Killed

    return on_progress


@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 9}, {"mixup": 0.2, "ema_decay": 0.9, "opt": "adamw", "balance": 0.5, "fit_head": True}],
)
def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(
    photos: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = replace(TINY, epochs=3, random_erasing=0.3, **changes)
    finetune(photos, tmp_path / "whole", recipe)
    for epoch, step in ((0, 2), (1, 1), (2, 2)):
        with pytest.raises(Killed):
            finetune(photos, tmp_path / "cut", recipe, resume=epoch > 0, on_progress=kill_at(epoch, step))
    finetune(photos, tmp_path / "cut", recipe, resume=True)
    finetune(photos, tmp_path / "cut", recipe, resume=True)  # a run that has ended stays as it is
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert [row["epoch"] for row in history(tmp_path / "cut")] == [row["epoch"] for row in history(tmp_path / "whole")]


@pytest.mark.slow
def test_a_run_killed_with_signal_9_at_any_moment_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """One in an epoch, one while a checkpoint is written, one in the first moments, by the benchmark of the docs."""
    seed = np.random.SeedSequence().generate_state(1)[0]
    script = Path(__file__).parents[1] / "benchmarks" / "resume.py"
    command = [sys.executable, str(script), "--runs", "3", "--seed", str(seed), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| yes |") == 3, done.stdout
    for run in sorted(tmp_path.glob("run-*")):
        assert_same_weights(tmp_path / "whole", run)
        assert not list(run.rglob(".*")), "nothing half-written stays"
        log = EventAccumulator(str(run / "tensorboard"))
        log.Reload()
        steps = [event.step for event in log.Scalars("train/loss")]
        assert steps == list(range(1, len(steps) + 1)), "a resumed log has no step twice"


def test_a_run_that_was_killed_before_it_could_be_resumed_is_begun_anew(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("photos.sha256", ".photos.sha256.01234567", ".recipe.toml.89abcdef"):
        (tmp_path / "run" / name).write_text("half")
    finetune(photos, tmp_path / "run", replace(TINY, epochs=1))
    assert not list((tmp_path / "run").glob(".*"))
    finetune(photos, tmp_path / "run", replace(TINY, epochs=1), resume=True)


def test_the_best_epoch_is_kept_and_patience_ends_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.5, 0.75, 0.25, 0.5, 0.75])  # the last one is of the finished classifier
    saved: list[int] = []
    save = training.hub.save_pretrained
    compute = training.compute_metrics
    monkeypatch.setattr(training, "compute_metrics", lambda *args: replace(compute(*args), top1=next(accuracies)))
    monkeypatch.setattr(
        training.hub, "save_pretrained", lambda model, *args, **kwargs: saved.append(1) or save(model, *args, **kwargs)
    )
    run = finetune(photos, tmp_path / "run", replace(TINY, epochs=9, val_fraction=0.25, patience=2))
    assert [row["val_top1"] for row in run.history] == [0.5, 0.75, 0.25, 0.5]
    assert len(saved) == 2, "after the first epoch, and after the better second one"


def test_the_first_epochs_train_on_smaller_images(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=3, smaller_first=((32, 2),), img_size=48, val_fraction=0.25)
    run = finetune(photos, tmp_path / "run", recipe)
    assert [row["img_size"] for row in run.history] == [32, 32, 48]
    assert GarbageClassifier.from_pretrained(run.folder).preprocessing.input_size == (3, 48, 48)


def test_patience_counts_from_the_first_epoch_that_can_be_the_best(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=4, smaller_first=((16, 3),), fit_head=True, patience=1, val_fraction=0.25)
    recipe = replace(recipe, start=str(finetune(photos, tmp_path / "start", TINY).folder))
    run = finetune(photos, tmp_path / "run", recipe)
    assert [row["img_size"] for row in run.history[1:]] == [16, 16, 16, 32], (
        "the fitted head is measured at 32, before all"
    )


def test_fitting_the_head_alone_leaves_the_rest_as_it_was(photos: Path, tmp_path: Path) -> None:
    start = finetune(photos, tmp_path / "start", replace(TINY, epochs=4))
    recipe = replace(TINY, epochs=0, fit_head=True, start=str(start.folder))
    run = finetune(photos, tmp_path / "run", recipe)
    before, after = weights(start.folder), weights(run.folder)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    assert evaluate(run.folder, photos).top1 >= 0.85


def test_a_teacher_with_the_same_classes_teaches_by_outputs_and_another_by_features(
    photos: Path, tmp_path: Path
) -> None:
    teacher = finetune(photos, tmp_path / "teacher", replace(TINY, epochs=8, crop_scale=(0.8, 1.0)))
    pupil = replace(TINY, teacher=str(teacher.folder), teacher_weight=1.0, epochs=12, crop_scale=(0.8, 1.0))
    shuffled = tmp_path / "shuffled"  # its labels say nothing, so all it can learn, it learns from the teacher
    rng = np.random.default_rng(0)
    for path in sorted(photos.glob("*/*")):
        folder = shuffled / rng.choice(["lying", "standing"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{path.parent.name}-{path.name}").symlink_to(path)
    taught = finetune(shuffled, tmp_path / "taught", pupil)
    agreement = [
        GarbageClassifier.from_pretrained(folder).predict(sorted(photos.glob("*/*")))
        for folder in (teacher.folder, taught.folder)
    ]
    same = [a.label == b.label for a, b in zip(*agreement, strict=True)]
    assert np.mean(same) >= 0.75

    renamed = tmp_path / "renamed"
    for label in ("lying", "standing"):
        (renamed / f"other-{label}").mkdir(parents=True)
        for path in (photos / label).iterdir():
            (renamed / f"other-{label}" / path.name).symlink_to(path)
    by_features = training._create_task(
        pupil,
        timm.create_model(pupil.arch, num_classes=2, **pupil.model_args),
        ["other-lying", "other-standing"],
        False,
        torch.device("cpu"),
    )
    assert type(by_features).__name__ == "FeatureDistillationTask"
    assert finetune(renamed, tmp_path / "by-features", pupil).history


def test_a_network_of_timm_teaches_by_its_features_from_the_command_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []
    create_model = timm.create_model

    def without_network(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        asked.append((name, pretrained))
        return create_model(name, **kwargs)

    monkeypatch.setattr(training.timm, "create_model", without_network)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(replace(TINY, epochs=1).to_toml())
    arguments = ["finetune", "--data", str(photos), "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, [*arguments, "--teacher", "resnet18.a1_in1k"])
    assert result.exit_code == 0, result.output
    assert asked[:2] == [("ghost_resnet50_s4", False), ("resnet18.a1_in1k", True)]
    assert training.load_recipe(tmp_path / "run" / "recipe.toml").teacher == "resnet18.a1_in1k"
    assert not [name for name in weights(tmp_path / "run") if "projection" in name], "the pupil alone is kept"
    alone = finetune(photos, tmp_path / "alone", replace(TINY, epochs=1))
    assert not torch.equal(weights(alone.folder)["conv1.weight"], weights(tmp_path / "run")["conv1.weight"])


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_weights(photos: Path, tmp_path: Path) -> None:
    good = finetune(photos, tmp_path / "good", TINY)
    recipe = replace(TINY, lr=1e30, start=str(good.folder), fit_head=True)
    with pytest.raises(TrainingError, match=r"loss is .* in epoch 1.*lower lr"):
        finetune(photos, tmp_path / "run", recipe)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_running_out_of_memory_says_which_batch_size_to_try(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "_train_epoch", exhausted)
    with pytest.raises(TrainingError, match="batch_size=4 --set accumulate=2"):
        finetune(photos, tmp_path / "run", TINY)


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(photos, tmp_path / "whole", TINY)
    save = training._save_checkpoint

    def full(job: Any) -> None:
        if job.state.epoch == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(job)

    monkeypatch.setattr(training, "_save_checkpoint", full)
    with pytest.raises(RunError, match=r"No space left on device.*--resume"):
        finetune(photos, tmp_path / "run", TINY)
    monkeypatch.setattr(training, "_save_checkpoint", save)
    finetune(photos, tmp_path / "run", TINY, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1, 12])
def test_a_file_that_can_not_be_written_whole_ends_the_run_in_a_sentence_and_resumes(
    photos: Path, tmp_path: Path, megabytes: int
) -> None:
    """The writers of weights and of optimizer states each meet the limit, with their own kinds of error."""
    resource = pytest.importorskip("resource")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(replace(TINY, opt="adamw", lr=1e-3).to_toml())
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (megabytes * 2**20, -1))
    command = [sys.executable, "-m", "ghost_resnet", "finetune", "--data", str(photos), "--recipe", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], env=environment, preexec_fn=limit, capture_output=True, text=True
    )
    assert full.returncode == 2 and "can't be written" in full.stderr and "--resume" in full.stderr
    assert "Traceback" not in full.stderr
    finetune(photos, tmp_path / "whole", recipe)
    finetune(photos, tmp_path / "run", recipe, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("batch_size", "steps"), [(9, 3), (12, 2), (11, 3), (32, 1)])
def test_a_last_batch_less_than_half_full_is_left_out_of_the_epoch(
    batch_size: int, steps: int, photos: Path, tmp_path: Path
) -> None:
    """28 photos leave 1, 4, 6 and none. Batch norm can't take one value a channel, and blows up on a few."""
    events: list[training.Progress] = []
    recipe = replace(TINY, batch_size=batch_size, warmup_epochs=0)
    finetune(photos, tmp_path / "run", recipe, on_progress=events.append)
    assert [(event.epoch, event.step) for event in events if not event.epoch_done] == [
        (epoch, step) for epoch in (0, 1) for step in range(1, steps + 1)
    ]
    assert {event.steps for event in events} == {steps}
    assert sorted((event.lr for event in events), reverse=True) == [event.lr for event in events]


def test_photos_can_not_be_trained_on_one_by_one(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"img_size = 32.*two or more photos.*got batch_size = 1"):
        finetune(photos, tmp_path / "single", TINY, overrides={"batch_size": 1})


def test_runs_of_different_precision_follow_each_other_in_one_process(photos: Path, tmp_path: Path) -> None:
    for precision in ("bf16", "fp32"):
        assert finetune(photos, tmp_path / precision, replace(TINY, epochs=1, precision=precision)).history


def test_what_a_recipe_asks_of_these_photos_is_checked_before_training(photos: Path, tmp_path: Path) -> None:
    for number, changes in enumerate(({"batch_size": 7}, {"batch_size": 64})):
        with pytest.raises(RecipeError, match="must be even and at most 28"):
            finetune(photos, tmp_path / f"mix{number}", TINY, overrides={"mixup": 0.2, **changes})
    with pytest.raises(RecipeError, match="no weights of ghost_resnet50_s4"):
        finetune(photos, tmp_path / "quick", TINY, overrides={"start": "auto", "fit_head": True, "epochs": 0})


def test_resuming_on_other_photos_another_recipe_or_nothing_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        finetune(photos, tmp_path / "none", TINY, resume=True)
    finetune(photos, tmp_path / "run", replace(TINY, epochs=1))
    with pytest.raises(RunError, match="not empty"):
        finetune(photos, tmp_path / "run", TINY)
    with pytest.raises(RunError, match="another recipe"):
        finetune(photos, tmp_path / "run", TINY, resume=True)
    (tmp_path / "split.txt").write_text("lying/00.png\n" + "".join(f"standing/{i:02}.png\n" for i in range(14)))
    with pytest.raises(RunError, match="photos have changed"):
        finetune(photos, tmp_path / "run", replace(TINY, epochs=1), splits=[tmp_path / "split.txt"], resume=True)


def test_a_run_that_could_not_begin_leaves_its_folder_free(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    broken = tmp_path / "photos" / "lying" / "broken.png"
    broken.write_bytes(b"no photo")
    recipe = replace(TINY, epochs=1)
    with pytest.raises(DataError, match=r"broken\.png"):
        finetune(tmp_path / "photos", tmp_path / "run", recipe)
    broken.unlink()
    with pytest.raises(RecipeError):
        finetune(tmp_path / "photos", tmp_path / "run", recipe, overrides={"mixup": 0.2, "batch_size": 7})
    assert finetune(tmp_path / "photos", tmp_path / "run", recipe).history


def test_a_run_that_has_ended_is_not_trained_again_for_want_of_checkpoints(photos: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=1, val_fraction=0.3)
    finetune(photos, tmp_path / "run", recipe)
    finetune(photos, tmp_path / "run", recipe, resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(RunError, match="has ended and its checkpoints are gone"):
        finetune(photos, tmp_path / "run", recipe, resume=True)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_photos_are_never_kept_smaller_than_they_are_trained_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides: list[int] = []

    class Dataset(training.PhotoDataset):
        def __init__(self, *args: Any, cache_side: int, **kwargs: Any) -> None:
            sides.append(cache_side)
            super().__init__(*args, cache_side=cache_side, **kwargs)

    monkeypatch.setattr(training, "PhotoDataset", Dataset)
    for cache_side in (0, 16, 48):
        finetune(photos, tmp_path / str(cache_side), replace(TINY, epochs=1, cache_side=cache_side))
    assert sides == [0, 32, 48]


def test_a_classifier_of_one_class_is_refused(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "lying", tmp_path / "photos" / "lying")
    (tmp_path / "photos" / "standing").mkdir()
    with pytest.raises(DataError, match=r"two classes or more in .*photos, got only lying"):
        finetune(tmp_path / "photos", tmp_path / "run", TINY)
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_when_the_photos_or_the_recipe_are_wrong(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        finetune(tmp_path / "nowhere", tmp_path / "run", TINY)
    with pytest.raises(RecipeError):
        finetune(photos, tmp_path / "run", TINY, overrides={"learning_rate": 1})
    with pytest.raises(RecipeError, match="opt = 'sgdd'"):
        training._create_optimizer(replace(TINY, opt="sgdd"), timm.create_model("resnet18"))
    assert not (tmp_path / "run").exists()


def test_balanced_sampling_draws_classes_alike_and_plain_sampling_every_photo_once() -> None:
    targets = [0] * 900 + [1] * 100
    plain = list(training.EpochSampler(targets, seed=3))
    assert sorted(plain) == list(range(1000)) and plain != sorted(plain)
    balanced = [targets[i] for i in training.EpochSampler(targets, seed=3, balance=1.0)]
    assert 430 < sum(balanced) < 570
    sampler = training.EpochSampler(targets, seed=3)
    sampler.epoch = 1
    assert list(sampler) != plain


def test_the_report_recipe_is_the_reports_training_to_the_letter() -> None:
    recipe = training.load_recipe("report")
    assert (recipe.arch, recipe.head_classes, recipe.start) == ("ghost_resnet50_cifar", 100, "")
    assert (recipe.opt, recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.epochs) == (
        "momentum",
        0.1,
        5e-4,
        4,
        10,
    )
    optimizer = training._create_optimizer(recipe, timm.create_model("resnet18"))
    assert type(optimizer) is torch.optim.SGD and len(optimizer.param_groups) == 1
    expected = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "dampening": 0.0}
    assert expected.items() <= optimizer.param_groups[0].items()
    transform: Any = training.train_transform(recipe, 32, (0.5,) * 3, (0.5,) * 3)
    steps = [type(step).__name__ for step in transform.transforms if type(step).__name__ != "RandomVerticalFlip"]
    assert steps == ["RandomCrop", "RandomHorizontalFlip", "RandomRotation", "ToTensor", "Normalize"]
    crop, rotation = transform.transforms[0], transform.transforms[3]
    assert (crop.size, crop.padding, rotation.degrees) == ((32, 32), 4, [-15.0, 15.0])
    assert transform.transforms[2].p == 0.0, "the report flips horizontally only"


DDP = """
import json, os, sys
from ghost_resnet import finetune

losses, (photos, out, recipe, stop, *options) = [], sys.argv[1:]

def on_progress(progress):
    if not progress.epoch_done:
        losses.append(progress.loss)
    elif progress.epoch + 1 == int(stop):
        print("LOSSES", json.dumps(losses), flush=True)
        os._exit(0)

finetune(photos, out, recipe, resume="--resume" in options, on_progress=on_progress)
if losses:
    print("LOSSES", json.dumps(losses))
"""


def launch(processes: int, script: Path, *arguments: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("LOSSES ")]
    assert len(lines) == 1, "the main process alone reports progress"
    return json.loads(lines[0].removeprefix("LOSSES "))


@pytest.mark.parametrize(
    ("workers", "device", "processes", "expected"),
    [
        (-1, "cpu", 1, 0),
        (-1, "cuda", 1, 6),
        (-1, "cuda", 2, 3),
        (-1, "cuda", 8, 0),
        (2, "cuda", 1, 2),
        (0, "cuda", 1, 0),
    ],
)
def test_workers_take_the_cores_only_where_a_gpu_leaves_them_free(
    workers: int, device: str, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "usable_cores", lambda: 6)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert training._workers(replace(TINY, workers=workers), accelerator) == expected  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_a_run_resumes_with_another_number(photos: Path, tmp_path: Path) -> None:
    """Without augmentation, whose draws differ by process, and with norms that do not look at the batch."""
    recipe, script = tmp_path / "recipe.toml", tmp_path / "train.py"
    still = {"crop": "padded", "crop_padding": 0, "crop_mode": "squash", "hflip": 0.0}
    model_args = {"layers": [1, 1, 1, 1], "norm_layer": "groupnorm1"}
    gentle = {"lr": 0.002, "warmup_epochs": 1, "epochs": 6, "batch_size": 4, "val_fraction": 0.25}
    recipe.write_text(replace(TINY, model_args=model_args, **still, **gentle).to_toml())
    script.write_text(DDP)

    def train(processes: int, out: str, stop: int = 0, *options: str) -> "np.typing.NDArray[np.float64]":
        return np.array(launch(processes, script, str(photos), str(tmp_path / out), str(recipe), str(stop), *options))

    one, two = train(1, "one"), train(2, "two")
    assert len(one) == len(two) >= 20
    assert np.abs(one - two).max() < 1e-4

    begun = train(1, "moved", 3)
    resumed = train(2, "moved", 0, "--resume")
    assert np.abs(one - np.concatenate([begun, resumed])).max() < 1e-4


def test_the_command_line_trains_and_says_where_the_run_is(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(TINY.to_toml())
    arguments = ["finetune", "--data", str(photos), "--recipe", str(recipe), "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, [*arguments, "--set", "epochs=1", "--set", "val_fraction=0.25"])
    assert result.exit_code == 0, result.output
    assert "Top 1 err" in result.stdout and str(tmp_path / "run") in result.stdout
    assert "epoch 1/1" in result.stderr and "val top-1" in result.stderr and "epoch" not in result.stdout
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2
    wrong = CliRunner().invoke(cli.app, [*arguments[:-1], str(tmp_path / "new"), "--set", "lr=fast"])
    assert wrong.exit_code == 2 and "lr must be float, got 'fast'" in wrong.stderr
