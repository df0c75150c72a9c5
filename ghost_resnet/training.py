"""Fine-tuning: from photos to a run folder that holds a classifier. On accelerate and timm."""

import csv
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

from . import hub
from .data import PhotoDataset, Photos, Preprocessing
from .errors import RunError, TrainingError
from .evaluation import Metrics, compute_metrics
from .files import write_text
from .recipes import Recipe, load_recipe

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Progress:
    """Where a training run is; handed to the `on_progress` callback after every step and epoch."""

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
        metrics: On the validation photos; None if there were none.
        history: One row an epoch.
    """

    folder: Path
    recipe: Recipe
    metrics: Metrics | None
    history: list[dict[str, Any]]


@dataclass
class _State:
    """What a checkpoint holds beside weights and optimizer. accelerate saves it by `state_dict`."""

    epoch: int = 0
    update: int = 0
    best_top1: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def finetune(
    data: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "report",
    *,
    splits: Sequence[str | Path] = (),
    val: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a classifier on a folder of photos.

    A run that was killed goes on from its last finished epoch with `resume=True` and ends, on the CPU, with the
    same weights bit for bit as if it had not been interrupted: all that is random in an epoch follows from the
    recipe's seed and the epoch's number.

    Args:
        data: Folder that holds one folder a class.
        out: Run folder to make. It will hold `model.safetensors`, `config.json` (timm's format), `metrics.json`,
            `recipe.toml`, `history.csv` and `tensorboard/`.
        recipe: Name of a recipe, a TOML file, or a `Recipe`.
        splits: Split files with the training photos; none takes every photo in `data`.
        val: Split file with the validation photos. Without one the last weights are kept, else the best.
        overrides: Values that replace the recipe's.
        resume: Go on with the run in `out`.
        on_progress: Called after every step and, with `val_top1`, every epoch.

    Raises:
        DataError: The photos are not as expected.
        RecipeError: The recipe is not valid.
        RunError: `out` holds another run, or none to resume.
        TrainingError: The loss is not finite.
    """
    out = Path(out)
    recipe = load_recipe(recipe).replace(overrides or {})
    train_photos = Photos.from_folder(data, splits=splits)
    val_photos = Photos.from_folder(data, splits=[val], classes=train_photos.classes) if val else None
    _prepare_folder(out, recipe, resume)

    accelerator = Accelerator(
        mixed_precision=_mixed_precision(recipe.precision),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with="tensorboard",
        project_dir=out,
    )
    set_seed(recipe.seed)
    dataset = PhotoDataset(
        train_photos, None, cache_side=recipe.cache_side, squash=recipe.crop_mode == "squash"
    )
    mean, std = (
        dataset.pixel_statistics()
        if recipe.normalize == "data"
        else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    preprocessing = Preprocessing(
        (3, recipe.eval_size, recipe.eval_size),
        recipe.interpolation,
        recipe.crop_pct,
        recipe.crop_mode,
        mean,
        std,
    )
    mixing = recipe.mixup > 0 or recipe.cutmix > 0
    sampler = EpochSampler(train_photos.targets, recipe.seed, recipe.balance)
    loader = DataLoader(
        dataset,  # type: ignore[arg-type]  # any sequence will do
        batch_size=recipe.batch_size,
        sampler=sampler,
        num_workers=recipe.workers,
        drop_last=mixing,  # timm's Mixup pairs photos up
    )
    num_classes = recipe.head_classes or len(train_photos.classes)
    model: nn.Module = timm.create_model(recipe.arch, num_classes=num_classes, **recipe.model_args)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(
        model,
        recipe.opt,
        recipe.lr,
        recipe.weight_decay,
        recipe.momentum,
        filter_bias_and_bn=not recipe.decay_all,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        recipe.epochs,
        decay_milestones=list(recipe.milestones),
        decay_rate=recipe.decay_rate,
        warmup_lr=0.0,
        warmup_epochs=recipe.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    mixup = (
        Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)
        if mixing
        else None
    )
    criterion = (
        SoftTargetCrossEntropy() if mixing else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema = (
        ModelEmaV3(accelerator.unwrap_model(model), recipe.ema_decay, use_warmup=True)
        if recipe.ema_decay
        else None
    )
    state = _State()
    accelerator.register_for_checkpointing(state, scheduler, *([ema] if ema else []))
    if resume and (checkpoint := _last_checkpoint(out)):
        accelerator.load_state(str(checkpoint))
        logger.info("resuming after epoch %d", state.epoch)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": state.update}})

    evaluated = ema.module if ema else accelerator.unwrap_model(model)
    metrics = None
    while state.epoch < recipe.epochs:
        epoch, size = state.epoch, recipe.size_at(state.epoch)
        set_seed(recipe.seed + epoch, device_specific=True)
        sampler.epoch = epoch
        dataset.transform = train_transform(recipe, size, mean, std)
        scheduler.step_update(state.update)
        model.train()
        started, losses = time.monotonic(), []
        for step, (images, targets) in enumerate(loader):
            images = images.contiguous(memory_format=torch.channels_last)
            if mixup:
                images, targets = mixup(images, targets)
            with accelerator.autocast():
                loss = criterion(model(images), targets)
            accelerator.backward(loss)
            if recipe.clip_grad:
                accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            state.update += 1
            if ema:
                ema.update(accelerator.unwrap_model(model), step=state.update)
            lr = optimizer.param_groups[0]["lr"]
            scheduler.step_update(state.update)
            losses.append(accelerator.gather(loss.detach()).mean().item())
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss is {losses[-1]} in epoch {epoch + 1}, step {step + 1}; the last good state is in "
                    f"{out / CHECKPOINTS}: lower lr (now {recipe.lr:g}) or set clip_grad"
                )
            accelerator.log({"train/loss": losses[-1], "train/lr": lr}, step=state.update)
            if on_progress:
                speed = (step + 1) * recipe.batch_size / (time.monotonic() - started)
                on_progress(Progress(epoch, recipe.epochs, step + 1, len(loader), losses[-1], lr, speed))

        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "img_size": size,
            "lr": lr,
            "train_loss": float(np.mean(losses)),
            "images_per_second": len(losses) * recipe.batch_size / (time.monotonic() - started),
        }
        if val_photos:
            metrics = _validate(evaluated, val_photos, _at_size(preprocessing, size), accelerator)
            row |= {"val_top1": metrics.top1, "val_loss": metrics.loss, "val_macro_f1": metrics.macro_f1}
            accelerator.log(
                {f"val/{k[4:]}": v for k, v in row.items() if k.startswith("val_")}, step=state.update
            )
        state.history.append(row)
        state.epoch += 1
        is_best = metrics is None or (size == recipe.eval_size and metrics.top1 >= state.best_top1)
        if is_best and metrics:
            state.best_top1 = metrics.top1
        if accelerator.is_main_process:
            if is_best:
                hub.save_pretrained(
                    evaluated,
                    out,
                    labels=train_photos.classes,
                    preprocessing=asdict(preprocessing),
                )
                if metrics:
                    write_text(out / "metrics.json", json.dumps(metrics.to_dict(), indent=2))
            write_text(out / "history.csv", _to_csv(state.history))
        _save_checkpoint(accelerator, out, state.epoch)
        if on_progress:
            on_progress(
                Progress(
                    epoch,
                    recipe.epochs,
                    len(loader),
                    len(loader),
                    row["train_loss"],
                    lr,
                    row["images_per_second"],
                    epoch_done=True,
                    val_top1=row.get("val_top1"),
                )
            )
    accelerator.end_training()
    best = out / "metrics.json"
    return Run(
        out, recipe, Metrics.from_dict(json.loads(best.read_text())) if val_photos else None, state.history
    )


class EpochSampler(Sampler[int]):
    """A random order that follows from the seed and the epoch alone; optionally balances classes.

    Args:
        targets: The class of each photo.
        seed: Together with `epoch`, decides the order.
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
    """The random transform of training photos to normalised `(3, size, size)` tensors."""
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


def _at_size(preprocessing: Preprocessing, size: int) -> Preprocessing:
    return Preprocessing(**{**asdict(preprocessing), "input_size": (3, size, size)})


def _prepare_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    saved = out / "recipe.toml"
    if resume:
        if not saved.is_file():
            raise RunError(f"{out} holds no run to resume: start one without --resume")
        if load_recipe(saved) != recipe:
            raise RunError(f"{saved} is another recipe than the one given: resume with --recipe {saved}")
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: resume the run in it with --resume, or take another folder")
    write_text(saved, recipe.to_toml())


def _last_checkpoint(out: Path) -> Path | None:
    return max((out / CHECKPOINTS).glob("epoch-*"), default=None)


def _save_checkpoint(accelerator: Accelerator, out: Path, epoch: int) -> None:
    """Write the whole training state under a temporary name, rename it, then remove older ones."""
    folder = out / CHECKPOINTS / f"epoch-{epoch:05}"
    temporary = folder.with_name(f".{folder.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        temporary.replace(folder)
        for older in (out / CHECKPOINTS).iterdir():
            if older != folder:
                shutil.rmtree(older)


@torch.no_grad()
def _validate(
    model: nn.Module, photos: Photos, preprocessing: Preprocessing, accelerator: Accelerator
) -> Metrics:
    was_training = model.training
    model.eval()
    logits = []
    for start in range(0, len(photos), 32):
        batch = np.stack([preprocessing.read(path) for path in photos.paths[start : start + 32]])
        images = torch.from_numpy(batch).to(accelerator.device).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits.append(model(images).float().cpu())
    model.train(was_training)
    parameters = sum(p.numel() for p in model.parameters())
    return compute_metrics(torch.cat(logits).numpy(), photos.targets, photos.classes, parameters)


def _to_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
