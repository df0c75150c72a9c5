"""The report of a training run: one HTML file that needs no network and no other file."""

import base64
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .data import Photos, read_image
from .errors import ConfigError, MissingExtraError
from .evaluation import Metrics
from .explain import Explainer
from .files import write_text
from .recipes import Recipe

logger = logging.getLogger(__name__)

WORST = 18
"""So many mistakes are shown."""
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may have $ in its name
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e9ef",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Mistake:
    """A photo that was taken for something else; `heat` shows what spoke for that, if it was asked."""

    path: str
    label: str
    predicted: str
    score: float
    thumbnail: str
    heat: str = ""


def write_report(
    path: Path,
    *,
    title: str,
    recipe: Recipe,
    metrics: Metrics,
    history: Sequence[Mapping[str, Any]],
    photos: Photos,
    logits: npt.NDArray[np.floating],
    model: Path,
) -> None:
    """Write the report of a run, wholly or not at all.

    Args:
        path: The HTML file.
        title: Its heading.
        recipe: What was done.
        metrics: Of the kept weights on the validation photos.
        history: One row an epoch, as in `history.csv`.
        photos: The validation photos.
        logits: The kept network's outputs for them, `(photos, outputs)`.
        model: Run folder of the kept network, to show where it looks if the extra `explain` is installed.
    """
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores = (scores / scores.sum(1, keepdims=True))[:, : len(photos.classes)]
    low, high = metrics.top1_interval
    speeds = [row["images_per_second"] for row in history if row.get("images_per_second")]
    figures = [
        ("Top-1 accuracy", f"{metrics.top1:.1%}", f"95 % interval {low:.1%} to {high:.1%}"),
        ("Top-5 accuracy", f"{metrics.top5:.1%}", ""),
        ("Macro F1", f"{metrics.macro_f1:.3f}", "mean over classes"),
        ("Calibration error", f"{metrics.ece:.3f}", "ECE, 15 bins"),
    ]
    if speeds:
        figures.append(("Training speed", f"{np.median(speeds):.0f}", "photos a second, median epoch"))
    with rc_context(STYLE):  # type: ignore[arg-type]
        plots = [
            ("Confusion", confusion_svg(metrics), "Rows are true classes, columns are answers."),
            ("Reliability", _reliability(scores, photos.targets), "Bars on the line: scores mean what they say."),
        ]
        if metrics.risk_coverage:
            note = "Errors among the answers if the least sure photos get none; labels are thresholds."
            plots.append(("Risk and coverage", _risk_coverage(metrics), note))
        if len(history) > 1:
            plots.append(("Loss", _curves(history, ("train_loss", "val_loss")), "Cross-entropy by epoch."))
            plots.append(("Validation accuracy", _curves(history, ("val_top1",)), "Top-1 by epoch."))
    html = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True
    ).get_template("report.html")
    write_text(
        path,
        html.render(
            title=title,
            architecture=recipe.arch,
            metrics=metrics,
            figures=figures,
            plots=plots,
            galleries=_galleries(photos, scores, _explainer(model)),
            recipe=recipe.to_toml(),
        ),
    )


def suspected_label_errors(scores: npt.NDArray[np.floating], targets: Sequence[int]) -> list[int]:
    """Photos whose label is probably wrong, most suspect first.

    A photo is suspect if the network takes it for another class with at least the mean score that photos of that
    class get (confident learning; Northcutt et al., 2021, https://arxiv.org/abs/1911.00068).

    Args:
        scores: Probabilities `(photos, classes)` from a network that did not train on these photos.
        targets: The label of each photo.

    Returns:
        Indices of photos.
    """
    truth = np.asarray(targets)
    usual = np.array([scores[truth == c, c].mean() if (truth == c).any() else 1.0 for c in range(scores.shape[1])])
    predicted = scores.argmax(1)
    confident = scores[np.arange(len(truth)), predicted] >= usual[predicted]
    own = scores[np.arange(len(truth)), truth]
    suspects = np.flatnonzero((predicted != truth) & confident)
    return suspects[np.argsort(own[suspects], kind="stable")].tolist()


def _explainer(model: Path) -> Explainer | None:
    try:
        return Explainer(model, device="cpu")
    except (MissingExtraError, ConfigError) as error:  # a report without heat is a report all the same
        logger.info("the report does not show where the network looks: %s", error)
        return None


def _galleries(
    photos: Photos, scores: npt.NDArray[np.floating], explainer: Explainer | None
) -> list[tuple[str, str, list[Mistake]]]:
    truth = np.array(photos.targets)
    wrong = np.flatnonzero(scores.argmax(1) != truth)
    worst = wrong[np.argsort(-scores[wrong].max(1), kind="stable")].tolist()
    suspects = suspected_label_errors(scores, photos.targets)
    heat = (
        "Below each, red is what spoke for the wrong answer (HiResCAM), and grey is not seen."
        if explainer
        else 'With "ghost-resnet[explain]" installed, this also shows what spoke for the wrong answer.'
    )
    return [
        (
            "Worst mistakes",
            f"{min(len(worst), WORST)} of {len(worst)}, the most confident first. {heat}",
            [_mistake(photos, i, scores[i], explainer) for i in worst[:WORST]],
        ),
        (
            "Suspected label errors",
            f"{min(len(suspects), WORST)} of {len(suspects)} photos that the network is as sure to be something else "
            "as it usually is when right. Look at them: the label or the network is wrong.",
            [_mistake(photos, i, scores[i], None) for i in suspects[:WORST]],
        ),
    ]


def _mistake(photos: Photos, index: int, scores: npt.NDArray[np.floating], explainer: Explainer | None) -> Mistake:
    path = photos.paths[index]
    predicted = photos.classes[int(scores.argmax())]
    return Mistake(
        photos.names[index],
        photos.classes[photos.targets[index]],
        predicted,
        float(scores.max()),
        _thumbnail(read_image(path, min_side=240)),
        _thumbnail(explainer.explain(path, predicted).overlay) if explainer else "",
    )


def _thumbnail(image: Image.Image) -> str:
    """A JPEG in base64."""
    image.thumbnail((320, 240))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80)
    return base64.b64encode(jpeg.getvalue()).decode()


def confusion_svg(metrics: Metrics) -> str:
    """The confusion matrix as SVG: rows are true classes, columns answers, the colour is the share of the row."""
    names, counts = list(metrics.per_class), np.array(metrics.confusion)[:, : len(metrics.per_class)]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel="truth")
    if len(names) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.5 else "#1c2430"
            axes.text(j, i, str(count), ha="center", va="center", color=colour)
    return to_svg(figure)


def _reliability(scores: npt.NDArray[np.floating], targets: Sequence[int], bins: int = 10) -> str:
    confidence, correct = scores.max(1), scores.argmax(1) == np.asarray(targets)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    used = np.unique(index)
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#5d6b7c", linestyle="--", linewidth=1)
    bars = axes.bar(
        (used + 0.5) / bins, [correct[index == b].mean() for b in used], 0.9 / bins, color="#1f77b4", alpha=0.85
    )
    axes.bar_label(bars, [str((index == b).sum()) for b in used], fontsize=8, color="#5d6b7c")
    axes.set(xlim=(0, 1), ylim=(0, 1.06), xlabel="score of the answer", ylabel="share that is right")
    return to_svg(figure)


def _risk_coverage(metrics: Metrics) -> str:
    points = [point for point in metrics.risk_coverage if point.accuracy is not None]
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    coverage, risk = [p.coverage for p in points], [1 - p.accuracy for p in points if p.accuracy is not None]
    axes.plot(coverage, risk, marker="o", markersize=3)
    for i in range(0, len(points), 4):
        axes.annotate(f"{points[i].threshold:.2f}", (coverage[i], risk[i]), (0, 6), textcoords="offset points")
    axes.set(xlim=(0, 1.06), xlabel="share of photos with an answer", ylabel="share of the answers that is wrong")
    axes.set_ylim(bottom=0)
    return to_svg(figure)


def _curves(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.legend(frameon=False)
    return to_svg(figure)


def to_svg(figure: Figure) -> str:
    """A figure as an `<svg>` element, without blanks at the ends of lines."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return re.sub(r"[ \t]+$", "", svg[svg.index("<svg") :], flags=re.MULTILINE)
