"""Fine-tuning: from photos to a run folder that holds a classifier. On accelerate and timm."""

import csv
import errno
import hashlib
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

from . import hub
from .classifier import GarbageClassifier
from .data import PhotoDataset, Photos, Preprocessing, usable_cores
from .errors import DataError, RecipeError, RunError, TrainingError
from .evaluation import Metrics, compute_metrics, fit_temperature
from .files import remove_leftovers, write_text
from .hygiene import find_problems, split_photos
from .recipes import Recipe, load_recipe
from .report import write_report
from .sources import load_photos

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
HEAD_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
"""L2 penalties that `_fit_head` chooses among on the validation photos."""


@dataclass(frozen=True)
class Progress:
    """Where a training run is; handed to the `on_progress` callback after every step and every epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float
    epoch_done: bool = False
    val_top1: float | None = None


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: The run folder, which opens with `timm.create_model("local-dir:...", pretrained=True)`.
        recipe: What was done.
        metrics: Of the kept weights on the validation photos or, without any, on the training photos; its
            `measured_on` says which.
        history: One row an epoch.
    """

    folder: Path
    recipe: Recipe
    metrics: Metrics
    history: list[dict[str, Any]]


def finetune(
    data: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "default",
    *,
    splits: Sequence[str | Path] = (),
    val: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a classifier on labelled photos.

    A run that was killed goes on from its last finished epoch with `resume=True` and ends, on the CPU, with the
    same weights bit for bit as if it had not been interrupted: all that is random in an epoch follows from the
    recipe's seed and the epoch's number.

    Args:
        data: Folder that holds one folder a class, a .csv or .parquet file, `hfds:` or `wds:`; see
            `sources.load_photos`.
        out: Run folder to make. It will hold `model.safetensors`, `config.json` (timm's format), `metrics.json`,
            `recipe.toml`, `history.csv`, `tensorboard/` and, with validation photos, `report.html`.
        recipe: Name of a recipe, a TOML file, or a `Recipe`.
        splits: Split files with the training photos, if `data` is a folder; none takes every photo in it.
        val: Validation photos: a split file of the folder, or another source like `data`. Without it, those that
            a table's column `split` names, or else `recipe.val_fraction` of the training photos.
        overrides: Values that replace the recipe's.
        resume: Go on with the run in `out`.
        on_progress: Called after every step and every epoch, in the main process.

    Raises:
        DataError: The photos are not as expected.
        MissingExtraError: The library that reads `data` is not installed.
        RecipeError: The recipe is not valid.
        RunError: `out` holds another run, or none to resume, or can't be written.
        TrainingError: The loss is not finite, or memory runs out. The last good state is kept.
    """
    out = Path(out)
    recipe = load_recipe(recipe).replace(overrides or {})
    train_photos, val_photos = load_photos(data, splits=splits, val=val)
    measured_on = Path(val).name if val else f"val of {Path(data).name}" if val_photos else "the training photos"
    if not train_photos:
        raise DataError(f"all photos of {data} are for validation, none for training")
    if len(known := [name for name, count in train_photos.counts.items() if count]) < 2:
        raise DataError(
            f"expected training photos of two classes or more in {data}, got only {known[0]}: add photos of another"
        )
    if val_photos is None and recipe.val_fraction:
        train_photos, val_photos = split_photos(train_photos, recipe.val_fraction, recipe.seed)
        measured_on = f"{len(val_photos)} photos that were held out"

    AcceleratorState._reset_state()  # else a second run in this process could not have another precision
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(recipe.precision),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        gradient_accumulation_steps=recipe.accumulate,
        dynamo_backend="inductor" if recipe.compile else None,
        log_with="tensorboard",
        project_dir=out,
    )
    with _explained(out, recipe):
        fingerprint = _fingerprint(train_photos, val_photos)
        if accelerator.is_main_process:
            _check_folder(out, recipe, fingerprint, resume)
            for problem in find_problems(train_photos, val_photos):
                logger.warning(problem)
        accelerator.wait_for_everyone()
        job = _build(recipe, train_photos, val_photos, measured_on, accelerator, out)
        if accelerator.is_main_process:
            _prepare_folder(out, recipe, fingerprint, resume)
        if resume:
            job.resume()
        if recipe.fit_head and not job.state.history:
            _fit_head(job)
            _keep(job, {"epoch": 0, "img_size": recipe.img_size})
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": job.state.update + 1}})
        while not job.finished:
            _set_up_epoch(job)
            row = _train_epoch(job, on_progress)
            job.state.epoch += 1
            _keep(job, row)
            if on_progress and accelerator.is_main_process:
                on_progress(job.progress(job.steps, row, epoch_done=True))
        _finish(job)
        accelerator.end_training()
        return Run(out, recipe, job.best, job.state.history)


# Building -------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What a checkpoint holds beside weights, optimizer and schedule."""

    epoch: int = 0
    update: int = 0
    best_epoch: int = 0
    best_top1: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass
class _Job:
    """Everything that a training run works with."""

    recipe: Recipe
    accelerator: Accelerator
    out: Path
    preprocessing: Preprocessing
    dataset: PhotoDataset
    val_photos: Photos | None
    measured_on: str
    sampler: "EpochSampler"
    loader: DataLoader[Any]
    model: Any  # timm's networks have no types
    task: Any
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    optimizer: Any
    scheduler: Any
    state: _State

    @property
    def kept_model(self) -> Any:
        """The network that is measured and saved."""
        return self.ema.module if self.ema else self.model

    @property
    def steps(self) -> int:
        return len(self.loader)

    @property
    def finished(self) -> bool:
        smaller = sum(epochs for _, epochs in self.recipe.smaller_first)  # none of them can be the best
        waited = self.state.epoch - max(self.state.best_epoch, smaller)
        stop = bool(self.recipe.patience and self.state.best_top1 >= 0 and waited >= self.recipe.patience)
        return stop or self.state.epoch >= self.recipe.epochs

    @property
    def best(self) -> Metrics:
        """Metrics of the weights that are kept."""
        return Metrics.from_dict(json.loads((self.out / "metrics.json").read_text(encoding="utf-8")))

    def progress(self, step: int, row: Mapping[str, Any], *, epoch_done: bool = False) -> Progress:
        return Progress(
            self.state.epoch - epoch_done,
            self.recipe.epochs,
            step,
            self.steps,
            row["train_loss"],
            row["lr"],
            row["images_per_second"],
            epoch_done,
            row.get("val_top1"),
        )

    def resume(self) -> None:
        """Load the last checkpoint, if an epoch was finished."""
        last = max((self.out / CHECKPOINTS).glob("epoch-*"), default=None)
        if last:
            self.accelerator.load_state(str(last))
            logger.info("resuming after epoch %d", self.state.epoch)


def _build(
    recipe: Recipe,
    train_photos: Photos,
    val_photos: Photos | None,
    measured_on: str,
    accelerator: Accelerator,
    out: Path,
) -> _Job:
    set_seed(recipe.seed)
    squash = recipe.crop_mode == "squash"
    cache_side = max(recipe.cache_side, recipe.img_size) if recipe.cache_side else 0
    dataset = PhotoDataset(train_photos, None, cache_side=cache_side, squash=squash)
    imagenet = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = dataset.pixel_statistics() if recipe.normalize == "data" else imagenet
    size = (3, recipe.img_size, recipe.img_size)
    preprocessing = Preprocessing(size, recipe.interpolation, recipe.crop_pct, recipe.crop_mode, mean, std)

    num_classes = recipe.head_classes or len(train_photos.classes)
    model = _create_model(recipe, num_classes)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": mean, "std": std}
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(accelerator.device, memory_format=torch.channels_last)
    ema = ModelEmaV3(model, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None

    mixing = bool(recipe.mixup or recipe.cutmix)
    if mixing and (recipe.batch_size % 2 or recipe.batch_size > len(train_photos)):
        raise RecipeError(
            f"mixup and cutmix take pairs of photos: batch_size must be even and at most {len(train_photos)}, "
            f"the number of training photos; got {recipe.batch_size}"
        )
    if recipe.batch_size % accelerator.num_processes:
        raise RecipeError(
            f"batch_size = {recipe.batch_size} is that of all processes together and must be a multiple of their "
            f"number, {accelerator.num_processes}"
        )
    smoothing = recipe.label_smoothing
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=num_classes) if mixing else None
    few_left = len(train_photos) > recipe.batch_size and len(train_photos) % recipe.batch_size < recipe.batch_size / 2
    sampler = EpochSampler(train_photos.targets, recipe.seed, recipe.balance)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # any sequence will do
        batch_size=recipe.batch_size,
        sampler=sampler,
        num_workers=_workers(recipe, accelerator),
        pin_memory=accelerator.device.type == "cuda",
        drop_last=mixing or few_left,  # timm's Mixup pairs photos up; batch norm blows up on a handful of photos
    )
    task = _create_task(recipe, model, train_photos.classes, mixing, accelerator.device)
    optimizer = _create_optimizer(recipe, task.trainable_module)
    task.trainable_module, optimizer, loader = accelerator.prepare(task.trainable_module, optimizer, loader)
    scheduler, _ = create_scheduler_v2(
        optimizer.optimizer,
        recipe.sched,
        max(recipe.epochs, 1),
        decay_milestones=list(recipe.milestones),
        decay_rate=recipe.decay_rate,
        warmup_lr=0.0,
        warmup_epochs=recipe.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    state = _State()
    accelerator.register_for_checkpointing(state, scheduler, *([ema] if ema else []))
    return _Job(
        recipe,
        accelerator,
        out,
        preprocessing,
        dataset,
        val_photos,
        measured_on,
        sampler,
        loader,
        model,
        task,
        ema,
        mixup,
        optimizer,
        scheduler,
        state,
    )


def _workers(recipe: Recipe, accelerator: Accelerator) -> int:
    """On a GPU the processors are free to prepare images, and one of them can't keep up."""
    if recipe.workers >= 0:
        return recipe.workers
    return usable_cores() // accelerator.num_processes if accelerator.device.type == "cuda" else 0


def _create_model(recipe: Recipe, num_classes: int) -> Any:
    start = recipe.start
    if start == "auto":
        start = next((tag for tag, entry in hub.manifest().items() if entry.architecture == recipe.arch), "")
        if start:
            logger.info("starting from %s", start)
        elif recipe.epochs == 0:
            raise RecipeError(
                f"a head alone needs trained features, and the package has no weights of {recipe.arch}: "
                "name some by start, such as a folder made by `ghost-resnet surgery`, or train with epochs > 0"
            )
        else:
            logger.warning("starting from scratch, since the package has no weights of %s: expect less", recipe.arch)
    if not start:
        return timm.create_model(recipe.arch, num_classes=num_classes, **recipe.model_args)
    files = hub.resolve(start)
    if files.architecture != recipe.arch:
        raise RunError(f"{start} is a {files.architecture}, the recipe wants a {recipe.arch}: set arch or start")
    return hub.load_model(files, num_classes=num_classes, **recipe.model_args)


def _create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model,
            recipe.opt,
            recipe.lr,
            recipe.weight_decay,
            recipe.momentum,
            filter_bias_and_bn=not recipe.decay_all,
            layer_decay=recipe.layer_decay or None,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"timm can't make opt = {recipe.opt!r} with momentum = {recipe.momentum:g}: {error}"
        ) from error


def _create_task(recipe: Recipe, model: Any, classes: Sequence[str], mixing: bool, device: torch.device) -> Any:
    loss = {"soft_targets": mixing, "smoothing": recipe.label_smoothing}
    if not recipe.teacher:
        return ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    arch = recipe.teacher.partition(".")[0]
    if timm.is_model(arch) and not arch.startswith("ghost_resnet"):
        teacher = timm.create_model(recipe.teacher, pretrained=True)
        labels: Sequence[str] = ()
    else:
        files = hub.resolve(recipe.teacher)
        teacher, labels = hub.load_model(files), files.labels
    teacher.requires_grad_(False).to(device, memory_format=torch.channels_last)
    kwargs: dict[str, Any] = {
        "criterion_kwargs": loss,
        "task_loss_weight": 1 - recipe.teacher_weight,
        "distill_loss_weight": recipe.teacher_weight,
        "device": device,
        "verbose": False,
    }
    if tuple(labels) == tuple(classes) and teacher.num_classes == model.num_classes:
        return LogitDistillationTask(model, teacher, temperature=recipe.temperature, **kwargs)
    logger.info("%s has other classes and teaches by its features", recipe.teacher)
    return FeatureDistillationTask(model, teacher, **kwargs)


def _fingerprint(*lists: Photos | None) -> str:
    """A hash of which photos are used for what, and of their sizes."""
    digest = hashlib.sha256()
    for photos in filter(None, lists):
        for path, name, target in zip(photos.paths, photos.names, photos.targets, strict=True):
            size = path.stat().st_size if isinstance(path, Path) else path.size
            digest.update(f"{name}\t{photos.classes[target]}\t{size}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _check_folder(out: Path, recipe: Recipe, photos: str, resume: bool) -> None:
    saved, fingerprint = out / "recipe.toml", out / "photos.sha256"
    if resume:
        if not (saved.is_file() and fingerprint.is_file()):
            raise RunError(f"{out} holds no run to resume: start one without --resume")
        if load_recipe(saved) != recipe:
            raise RunError(f"{saved} is another recipe than the one given: resume with --recipe {saved}")
        if fingerprint.read_text(encoding="utf-8").strip() != photos:
            raise RunError(
                "the photos have changed since the run began, so it can't go on as it would have: "
                "bring them back, or start anew in another folder"
            )
        if (out / "report.html").exists() and not any((out / CHECKPOINTS).glob("epoch-*")):
            raise RunError(f"the run in {out} has ended and its checkpoints are gone: start anew in another folder")
    elif out.exists() and not all(_is_of_a_start(path) for path in out.iterdir()):
        raise RunError(f"{out} is not empty: resume the run in it with --resume, or take another folder")


def _prepare_folder(out: Path, recipe: Recipe, photos: str, resume: bool) -> None:
    """Write what a run is told from another by, once nothing is known to stand in its way."""
    if not resume:
        write_text(out / "photos.sha256", photos + "\n")
        write_text(out / "recipe.toml", recipe.to_toml())  # last: with it, there is a run to resume
    remove_leftovers(out)


def _is_of_a_start(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before there was anything to resume."""
    return path.name == "photos.sha256" or path.name.startswith((".photos.sha256.", ".recipe.toml."))


# Training -------------------------------------------------------------------------------------------------------------


def _set_up_epoch(job: _Job) -> None:
    """Make all that is random in the coming epoch a function of the seed and the epoch's number."""
    recipe, epoch = job.recipe, job.state.epoch
    set_seed(recipe.seed + epoch, device_specific=True)
    job.sampler.epoch = epoch
    size = recipe.size_at(epoch)
    job.dataset.transform = train_transform(recipe, size, job.preprocessing.mean, job.preprocessing.std)
    job.scheduler.step_update(job.state.update)
    job.task.train()


def _train_epoch(job: _Job, on_progress: Callable[[Progress], None] | None) -> dict[str, Any]:
    recipe, accelerator, state = job.recipe, job.accelerator, job.state
    started, total, row = time.monotonic(), 0.0, {}
    for step, (images, targets) in enumerate(job.loader, 1):
        images = images.contiguous(memory_format=torch.channels_last)
        if job.mixup:
            images, targets = job.mixup(images, targets)
        with accelerator.accumulate(job.task.trainable_module):
            with accelerator.autocast():
                loss = job.task(images, targets)["loss"]
            accelerator.backward(loss)
            if recipe.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(job.task.trainable_module.parameters(), recipe.clip_grad)
            job.optimizer.step()
            job.optimizer.zero_grad()
        state.update += 1
        if job.ema and accelerator.sync_gradients:
            job.ema.update(job.model, step=state.update // recipe.accumulate)
        value = accelerator.gather(loss.detach()).mean().item()
        if not math.isfinite(value):
            kept = "the last good weights are kept in" if (job.out / "model.safetensors").exists() else "none are in"
            raise TrainingError(
                f"the loss is {value} in epoch {state.epoch + 1}, step {step}; {kept} {job.out}: "
                f"lower lr (now {recipe.lr:g}) or set clip_grad, in a new run"
            )
        total += value
        row = {
            "epoch": state.epoch + 1,
            "img_size": recipe.size_at(state.epoch),
            "lr": max(group["lr"] for group in job.optimizer.param_groups),
            "train_loss": total / step,
            "images_per_second": min(step * recipe.batch_size, len(job.sampler)) / (time.monotonic() - started),
        }
        accelerator.log({"train/loss": value, "train/lr": row["lr"]}, step=state.update)
        job.scheduler.step_update(state.update)
        if on_progress and accelerator.is_main_process:
            on_progress(job.progress(step, {**row, "train_loss": value}))
    return row


def _fit_head(job: _Job) -> None:
    """Replace the head by the logistic regression that fits best on features computed once."""
    head = job.model.get_classifier()
    features, targets = _features(job, job.dataset.photos)
    mean, std = features.mean(0), features.std(0) + 1e-6
    counts = torch.bincount(targets, minlength=head.out_features).float()
    weight = counts.clamp_min(1) ** -job.recipe.balance
    val_features, val_targets = _features(job, job.val_photos) if job.val_photos else (features, targets)
    fits = []
    for decay in HEAD_DECAYS if job.val_photos else HEAD_DECAYS[1:2]:
        linear = _logistic_regression((features - mean) / std, targets, weight, decay)
        with torch.no_grad():
            fitted = linear((val_features - mean) / std)
        fits.append((nn.functional.cross_entropy(fitted, val_targets).item(), decay, linear))
    _, decay, best = min(fits, key=lambda fit: fit[0])
    logger.info("head fitted with an L2 penalty of %g", decay)
    with torch.no_grad():  # the standardisation goes into the head
        for model in (job.model, job.kept_model):
            head = model.get_classifier()
            head.weight.copy_(best.weight / std)
            head.bias.copy_(best.bias - (best.weight * mean / std).sum(1))


def _logistic_regression(
    features: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, decay: float
) -> nn.Linear:
    linear = nn.Linear(features.shape[1], len(weight), device=features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear(features), targets, weight)
        loss = loss + decay * linear.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def _features(job: _Job, photos: Photos) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features `(photos, features)` and targets."""

    def pooled(images: torch.Tensor) -> torch.Tensor:
        model: Any = job.model
        return model.forward_head(model.forward_features(images), pre_logits=True)

    features = torch.from_numpy(_run(job, pooled, photos, job.preprocessing))
    return features.to(job.accelerator.device), torch.tensor(photos.targets, device=job.accelerator.device)


@torch.no_grad()
def _run(
    job: _Job, network: Callable[[torch.Tensor], torch.Tensor], photos: Photos, preprocessing: Preprocessing
) -> Any:
    """The network's output for each photo, in order, on every process."""
    accelerator = job.accelerator
    for model in (job.model, job.kept_model):
        model.eval()
    mine = range(accelerator.process_index, len(photos), accelerator.num_processes)
    outputs: list[tuple[int, Any]] = []
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(mine), 32):
            indices = mine[start : start + 32]
            images = pool.map(preprocessing.read, (photos.paths[i] for i in indices))
            batch = torch.from_numpy(np.stack(list(images)))
            batch = batch.to(accelerator.device).contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                outputs.extend(zip(indices, network(batch).float().cpu().numpy(), strict=True))
    if accelerator.num_processes > 1:
        outputs = sorted(gather_object(outputs), key=lambda pair: pair[0])
    return np.stack([output for _, output in outputs])


def _measure(job: _Job, photos: Photos, size: int) -> Metrics:
    preprocessing = replace(job.preprocessing, input_size=(3, size, size))
    logits = _run(job, job.kept_model, photos, preprocessing)
    parameters = sum(p.numel() for p in job.model.parameters())
    metrics = compute_metrics(logits, photos.targets, photos.classes, parameters)
    return replace(metrics, measured_on=job.measured_on)


# Keeping --------------------------------------------------------------------------------------------------------------


def _keep(job: _Job, row: dict[str, Any]) -> None:
    """Measure an epoch's weights and log it; save them if they are the best, and the whole state."""
    state = job.state
    metrics = _measure(job, job.val_photos, row["img_size"]) if job.val_photos else None
    if metrics:
        row |= {"val_top1": metrics.top1, "val_loss": metrics.loss, "val_macro_f1": metrics.macro_f1}
        job.accelerator.log({f"val/{k[4:]}": v for k, v in row.items() if k.startswith("val_")}, step=state.update)
    state.history.append(row)
    at_final_size = row["img_size"] == job.recipe.img_size
    if is_best := metrics is None or (at_final_size and metrics.top1 >= state.best_top1):
        state.best_epoch = state.epoch
        state.best_top1 = metrics.top1 if metrics else -1.0
    if job.accelerator.is_main_process:
        if is_best:
            hub.save_pretrained(
                job.kept_model,
                job.out,
                labels=job.dataset.photos.classes,
                preprocessing=asdict(job.preprocessing),
            )
            if metrics:
                _write_metrics(job, metrics)
        write_text(job.out / "history.csv", _to_csv(state.history))
    _save_checkpoint(job)


def _write_metrics(job: _Job, metrics: Metrics) -> None:
    write_text(job.out / "metrics.json", json.dumps(metrics.to_dict(), indent=2))


def _finish(job: _Job) -> None:
    """Calibrate the saved classifier, measure it as a user would use it, and write `report.html`.

    Without validation photos there is nothing to calibrate or report on: it is only measured, on the training photos.
    """
    if job.accelerator.is_main_process:
        photos = job.val_photos or job.dataset.photos
        classifier = GarbageClassifier.from_pretrained(job.out)
        logits = np.stack([np.asarray(item) for item in classifier.logits_stream(photos.paths)])
        temperature = job.recipe.calibration
        if job.val_photos and not temperature:
            temperature = fit_temperature(logits, photos.targets)
        if temperature:
            hub.set_temperature(job.out, temperature)
            logits = logits / temperature
        metrics = compute_metrics(logits, photos.targets, photos.classes, classifier.parameters)
        _write_metrics(job, replace(metrics, measured_on=job.measured_on))
        if job.val_photos:
            write_report(
                job.out / "report.html",
                title=job.out.name,
                recipe=job.recipe,
                metrics=job.best,
                history=job.state.history,
                photos=photos,
                logits=logits,
                model=job.out,
            )
    job.accelerator.wait_for_everyone()


def _save_checkpoint(job: _Job) -> None:
    """Write the whole training state under a temporary name, rename it, then remove older ones."""
    accelerator = job.accelerator
    folder = job.out / CHECKPOINTS / f"epoch-{job.state.epoch:05}"
    temporary = folder.with_name(f".{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
        for older in folder.parent.iterdir():
            if older != folder:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def _to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_UNWRITABLE = "{} can't be written ({}): make room, then go on with --resume; what was finished before is intact"


@contextmanager
def _explained(out: Path, recipe: Recipe) -> Iterator[None]:
    """Turn what goes wrong on a machine into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise RunError(_UNWRITABLE.format(out, error.strerror)) from error
    except SafetensorError as error:
        raise RunError(_UNWRITABLE.format(out, error)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # torch.save's own, twice over
            raise RunError(_UNWRITABLE.format(out, "torch.save failed")) from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        half = max(1, recipe.batch_size // 2)
        raise TrainingError(
            f"memory ran out with batch_size = {recipe.batch_size}: start anew with "
            f"--set batch_size={half} --set accumulate={2 * recipe.accumulate}"
        ) from error
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):  # batch norm's own
            raise
        raise RecipeError(
            f"batch norm needs more than one value a channel, and one photo of img_size = {recipe.img_size} ends as "
            f"one: expected batches of two or more photos a process, or larger images; got batch_size = "
            f"{recipe.batch_size}"
        ) from error


# What is random -------------------------------------------------------------------------------------------------------


class EpochSampler(Sampler[int]):
    """A random order that follows from the seed and the epoch alone; optionally balances classes.

    Args:
        targets: The class of each photo.
        seed: Together with the attribute `epoch`, decides the order.
        balance: 0 draws each photo once; 1 draws, with replacement, every class equally often; between them, a
            class of n photos is drawn in proportion to `n ** (1 - balance)`.
    """

    def __init__(self, targets: Sequence[int], seed: int, balance: float = 0.0) -> None:
        self.targets, self.seed, self.balance, self.epoch = torch.tensor(targets), seed, balance, 0

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.balance:
            counts = torch.bincount(self.targets).double()
            weights = counts[self.targets] ** -self.balance
            order = torch.multinomial(weights, len(self), replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self), generator=generator)
        return iter(order.tolist())


def train_transform(
    recipe: Recipe, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any], torch.Tensor]:
    """The random transform of training photos to normalised tensors `(3, size, size)`."""
    if recipe.crop == "padded":
        return transforms.Compose(
            [
                transforms.RandomCrop(size, padding=recipe.crop_padding),
                transforms.RandomHorizontalFlip(recipe.hflip),
                transforms.RandomVerticalFlip(recipe.vflip),
                transforms.RandomRotation(recipe.rotation),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )
    return create_transform(
        size,
        is_training=True,
        scale=recipe.crop_scale,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.auto_augment or None,
        interpolation=recipe.interpolation,
        mean=mean,
        std=std,
        re_prob=recipe.random_erasing,
        re_mode="pixel",
    )


def supports_bf16() -> bool:
    """Whether bf16 is worth while here: on a GPU that has it, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _mixed_precision(precision: str) -> str:
    if precision == "auto":
        precision = "bf16" if supports_bf16() else "fp16" if torch.cuda.is_available() else "fp32"
    return "no" if precision == "fp32" else precision
