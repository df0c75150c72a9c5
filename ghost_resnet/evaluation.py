"""Measuring a classifier: the report's figures, and those that it lacks."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from .classifier import GarbageClassifier
from .errors import DataError, OverflowedError
from .sources import load_photos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMetrics:
    """Figures of one class, each in 0..1; `support` is its number of photos."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Selective:
    """What a classifier does that abstains where its score is below a threshold.

    Attributes:
        threshold: In 0..1.
        coverage: Share of the photos that get an answer.
        accuracy: Share of the answers that are right; None if there are none.
    """

    threshold: float
    coverage: float
    accuracy: float | None


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
        selective: With the classifier's threshold.
        risk_coverage: With the thresholds that leave 100 %, 95 %, ... 5 % of the photos an answer
            (El-Yaniv and Wiener, 2010, https://www.jmlr.org/papers/v11/el-yaniv10a.html); fewer where scores are tied.
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
    selective: Selective | None = None
    risk_coverage: list[Selective] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Metrics":
        """The inverse of `to_dict`."""
        typed = {
            "per_class": {name: ClassMetrics(**figures) for name, figures in values["per_class"].items()},
            "top1_interval": tuple(values["top1_interval"]),
            "selective": Selective(**values["selective"]) if values.get("selective") else None,
            "risk_coverage": [Selective(**point) for point in values.get("risk_coverage", [])],
        }
        return cls(**{**values, **typed})

    def threshold_for(self, accuracy: float) -> float | None:
        """The threshold that leaves the most answers of which at least this share is right, on these photos.

        It is one of `risk_coverage`, and picked on the photos that it is measured on: on others expect a little less.

        Args:
            accuracy: In 0..1.

        Returns:
            The threshold, or None if none gets there.
        """
        enough = [point for point in self.risk_coverage if point.accuracy is not None and point.accuracy >= accuracy]
        return max(enough, key=lambda point: point.coverage).threshold if enough else None

    def report(self) -> str:
        """The three lines that the university report's test printed."""
        return f"Top 1 err: {1 - self.top1:.4f}\nTop 5 err: {1 - self.top5:.4f}\nParameter numbers: {self.parameters}"


def compute_metrics(
    logits: npt.NDArray[np.floating],
    targets: Sequence[int],
    classes: Sequence[str],
    parameters: int,
    threshold: float = 0.0,
) -> Metrics:
    """Compute metrics from a network's outputs.

    Args:
        logits: `(photos, outputs)`. There may be more outputs than classes: the report's network kept a head
            of 100 for its six. All of them compete.
        targets: The true class of each photo.
        classes: Class names; output i is class i.
        parameters: Number of parameters of the network, which is only passed on.
        threshold: Below it the classifier abstains, in 0..1. Only `selective` looks at it.
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
    named = scores.double().softmax(1)[:, :known].numpy()  # the classifier never answers with another output
    confidence, right = named.max(1), named.argmax(1) == truth.numpy()
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
        selective=_selective(confidence, right, threshold),
        risk_coverage=_risk_coverage(confidence, right),
    )


def fit_temperature(logits: npt.NDArray[np.floating], targets: Sequence[int]) -> float:
    """The temperature that calibrates a network's outputs (Guo et al., 2017): the logits are to be divided by it.

    It is the most likely one given these photos and, so that a few photos that are all answered rightly don't make
    the scores all 1, a prior: its logarithm is normally distributed with standard deviation 0.5.

    Args:
        logits: `(photos, outputs)`, of photos that the network did not train on.
        targets: The true class of each photo.
    """
    scores, truth = torch.from_numpy(np.asarray(logits, np.float64)), torch.tensor(targets)

    def cost(log_temperature: float) -> float:
        loss = torch.nn.functional.cross_entropy(scores / math.exp(log_temperature), truth, reduction="sum")
        return float(loss) + log_temperature**2 / (2 * 0.5**2)

    return math.exp(minimize_scalar(cost, bounds=(-3, 3), method="bounded").x)


def _selective(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], threshold: float) -> Selective:
    answered = confidence >= threshold
    accuracy = float(right[answered].mean()) if answered.any() else None
    return Selective(float(threshold), float(answered.mean()), accuracy)


def _risk_coverage(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[Selective]:
    falling = np.sort(confidence)[::-1]
    thresholds = [falling[math.ceil(len(falling) * percent / 100) - 1] for percent in range(100, 0, -5)]
    return [_selective(confidence, right, threshold) for threshold in dict.fromkeys(thresholds)]


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
    """Measure a classifier on labelled photos.

    Args:
        source: What `GarbageClassifier.from_pretrained` takes (None means the package's weights), or a classifier,
            whose threshold `Metrics.selective` looks at.
        data: Folder that holds one folder a class, a .csv or .parquet file, `hfds:` or `wds:`; see
            `sources.load_photos`. Of a table with the column `split`, the rows with "val" are taken.
        splits: Split files to keep to, if `data` is a folder; none takes every photo in it.
        on_progress: Called with the photos done and the photos in all.

    Raises:
        DataError: The photos are not as expected, or some can't be read.
        OverflowedError: The network gives no finite numbers for a photo.
        MissingExtraError: The library that reads `data` is not installed.
    """
    classifier = source if isinstance(source, GarbageClassifier) else GarbageClassifier.from_pretrained(source)
    everything, val = load_photos(data, splits=splits, classes=classifier.labels)
    photos = val or everything
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
    outputs = np.stack(logits)
    if broken := int((~np.isfinite(outputs).all(1)).sum()):
        raise OverflowedError(
            f"the network gives no finite numbers for {broken} of {len(photos)} photos: its weights are damaged, or "
            "the precision that it computes in is too low for them"
        )
    scaled = outputs / classifier.temperature
    metrics = compute_metrics(scaled, photos.targets, classifier.labels, classifier.parameters, classifier.threshold)
    names = [Path(split).name for split in splits]
    return replace(metrics, measured_on=", ".join(names) or f"{'val of' if val else 'all photos in'} {Path(data).name}")
