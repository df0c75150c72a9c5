"""Measuring a classifier: the report's figures, and those that it lacks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from .classifier import GarbageClassifier
from .data import Photos
from .errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class, each in 0..1; `support` is its number of photos."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Metrics:
    """What a classifier does on a list of photos.

    Attributes:
        photos: Number of photos.
        top1: Share of photos whose most likely class is right, in 0..1.
        top1_interval: 95 % bootstrap interval of `top1` (percentile, 2,000 resamples).
        top5: Share of photos whose five most likely classes hold the right one.
        loss: Mean cross-entropy, in nats.
        macro_f1: Mean F1 of the classes that the photos show.
        ece: Expected calibration error, 15 bins (Guo et al., 2017).
        parameters: Number of parameters of the network.
        per_class: Figures of each class, in class order.
        confusion: `confusion[true][predicted]` counts photos; its last column counts outputs without a name.
        measured_on: Which photos these are.
    """

    photos: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    loss: float
    macro_f1: float
    ece: float
    parameters: int
    per_class: dict[str, ClassMetrics]
    confusion: list[list[int]]
    measured_on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Metrics":
        """The inverse of `to_dict`."""
        per_class = {name: ClassMetrics(**figures) for name, figures in values["per_class"].items()}
        return cls(**{**values, "per_class": per_class, "top1_interval": tuple(values["top1_interval"])})

    def report(self) -> str:
        """The three lines that the university report's test printed."""
        return f"Top 1 err: {1 - self.top1:.4f}\nTop 5 err: {1 - self.top5:.4f}\nParameter numbers: {self.parameters}"


def compute_metrics(
    logits: npt.NDArray[np.floating], targets: Sequence[int], classes: Sequence[str], parameters: int
) -> Metrics:
    """Compute metrics from a network's outputs.

    Args:
        logits: `(photos, outputs)`. There may be more outputs than classes: the report's network kept a head
            of 100 for its six. All of them compete.
        targets: The true class of each photo.
        classes: Class names; output i is class i.
        parameters: Number of parameters of the network, which is only passed on.
    """
    scores, truth = torch.from_numpy(np.asarray(logits, np.float32)), torch.tensor(targets)
    outputs, known = scores.shape[1], len(classes)
    correct = (scores.argmax(1) == truth).double().numpy()
    options: dict[str, Any] = {"num_classes": outputs, "validate_args": False}
    confusion = multiclass_confusion_matrix(scores, truth, **options)
    confusion = torch.cat([confusion[:known, :known], confusion[:known, known:].sum(1, keepdim=True)], 1)
    precision = multiclass_precision(scores, truth, average=None, **options)
    recall = multiclass_recall(scores, truth, average=None, **options)
    f1 = multiclass_f1_score(scores, truth, average=None, **options)
    support = torch.bincount(truth, minlength=outputs)
    present = support[:known] > 0
    return Metrics(
        photos=len(truth),
        top1=float(correct.mean()),
        top1_interval=_interval(correct),
        top5=float(multiclass_accuracy(scores, truth, average="micro", top_k=min(5, outputs), **options)),
        loss=float(torch.nn.functional.cross_entropy(scores, truth)),
        macro_f1=float(f1[:known][present].mean()),
        ece=float(multiclass_calibration_error(scores.softmax(1), truth, n_bins=15, **options)),
        parameters=parameters,
        per_class={
            name: ClassMetrics(float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, name in enumerate(classes)
        },
        confusion=confusion.tolist(),
    )


def _interval(correct: npt.NDArray[np.float64]) -> tuple[float, float]:
    # Photos drawn anew from these, with replacement, are right or wrong like flips of a coin.
    resampled = np.random.default_rng(0).binomial(len(correct), correct.mean(), size=2000) / len(correct)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def evaluate(
    source: str | Path | GarbageClassifier | None,
    data: str | Path,
    *,
    splits: Sequence[str | Path] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Measure a classifier on a folder of photos.

    Args:
        source: What `GarbageClassifier.from_pretrained` takes (None means the package's weights), or a classifier.
        data: Folder that holds one folder a class.
        splits: Split files to keep to; none takes every photo in `data`.
        on_progress: Called with the photos done and the photos in all.

    Raises:
        DataError: The photos are not as expected, or some can't be read.
    """
    classifier = source if isinstance(source, GarbageClassifier) else GarbageClassifier.from_pretrained(source)
    photos = Photos.from_folder(data, splits=splits, classes=classifier.labels)
    logits, errors = [], []
    for done, result in enumerate(classifier.logits_stream(photos.paths), 1):
        if isinstance(result, Exception):
            errors.append(str(result))
        else:
            logits.append(result)
        if on_progress:
            on_progress(done, len(photos))
    if errors:
        raise DataError(f"{len(errors)} of {len(photos)} photos can't be read:\n" + "\n".join(errors))
    scaled = np.stack(logits) / classifier.temperature
    metrics = compute_metrics(scaled, photos.targets, classifier.labels, classifier.parameters)
    names = [Path(split).name for split in splits]
    return replace(metrics, measured_on=", ".join(names) or f"all photos in {Path(data).name}")
