"""The report of a run holds its figures, needs no other file, and finds the labels that are wrong."""

import base64
import html.parser
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image

from ghost_resnet import hub
from ghost_resnet.data import Photos
from ghost_resnet.evaluation import compute_metrics
from ghost_resnet.recipes import load_recipe
from ghost_resnet.report import _explainer, _galleries, suspected_label_errors, write_report

CLASSES = ("can", "jar <b>", "paper $_{$")


@pytest.fixture(scope="module")
def knows_nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small network of these classes."""
    model = timm.create_model("ghost_resnet50_cifar", layers=(1, 1, 1, 1), num_classes=3)
    preprocessing = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return hub.save_pretrained(
        model, tmp_path_factory.mktemp("runs") / "model", labels=CLASSES, preprocessing=preprocessing
    )


@pytest.fixture
def report(tmp_path: Path, knows_nothing: Path) -> Path:
    """The report of a network that is right on all but two of thirty photos."""
    paths = []
    for i in range(30):
        path = tmp_path / "photos" / CLASSES[i % 3] / f"photo & {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (8 * i, 100, 100)).save(path)
        paths.append(path)
    targets = [i % 3 for i in range(30)]
    logits = np.full((30, 3), -2.0, np.float32)
    logits[range(30), targets] = 2.0
    logits[4], logits[5] = (9.0, 0.0, 0.0), (1.0, 0.0, 0.9)
    write_report(
        tmp_path / "report.html",
        title="bins & more",
        recipe=load_recipe("report"),
        metrics=compute_metrics(logits, targets, CLASSES, 12345),
        history=[
            {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "val_top1": 0.5, "images_per_second": 7}
            for e in (1, 2)
        ],
        photos=Photos(tuple(paths), tuple(targets), CLASSES),
        logits=logits,
        model=knows_nothing,
    )
    return tmp_path / "report.html"


class Links(html.parser.HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def test_the_report_holds_the_figures_and_loads_nothing(report: Path) -> None:
    text = report.read_text()
    links = Links()
    links.feed(text)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert not re.search(r"url\((?!#|['\"]?data:)|@import|<script", text)
    assert "93.3%" in text and "12,345 parameters" in text and "bins &amp; more" in text
    assert "jar &lt;b&gt;" in text and "jar <b>" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    assert text.count("<svg") == 5 and "Risk and coverage" in text
    assert "jar &lt;b&gt;, taken for <b>can</b> (1.00)" in text and "photo &amp; 4.png" in text
    assert "2 of 2, the most confident first" in text and "1 of 1 photos" in text
    assert "arch = &#34;ghost_resnet50_cifar&#34;" in text


@pytest.mark.ecosystem
def test_the_worst_mistakes_show_what_spoke_for_them(report: Path) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="needs the extra `explain`")
    text = report.read_text()
    assert "red is what spoke for the wrong answer" in text and "[explain]" not in text
    overlays = re.findall(r'base64,([^"]+)" alt="what spoke for (\w+)"', text)
    assert [label for _, label in overlays] == ["can", "can"]
    assert all(Image.open(io.BytesIO(base64.b64decode(jpeg))).size == (40, 30) for jpeg, _ in overlays)


def test_a_report_without_the_library_says_what_is_missing(
    report: Path, tmp_path: Path, knows_nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert _explainer(knows_nothing) is None
    photos = Photos((tmp_path / "photos" / "can" / "photo & 0.png",), (1,), CLASSES)
    (_, note, mistakes), _ = _galleries(photos, np.array([[0.9, 0.1, 0.0]]), None)
    assert 'With "ghost-resnet[explain]" installed' in note and mistakes[0].heat == ""


def test_the_worst_mistakes_begin_with_the_answer_that_was_surest(report: Path, tmp_path: Path) -> None:
    paths = tuple(tmp_path / "photos" / "can" / f"photo & {i}.png" for i in (0, 3, 6))
    scores = np.array([[0.01, 0.5, 0.49], [0.2, 0.8, 0.0], [0.3, 0.0, 0.7]])
    (_, _, mistakes), _ = _galleries(Photos(paths, (0, 0, 0), CLASSES), scores, None)
    assert [mistake.score for mistake in mistakes] == [0.8, 0.7, 0.5]


def test_a_label_is_suspect_where_the_network_is_as_sure_of_another_as_it_usually_is_of_that() -> None:
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.05], [0.55, 0.45], [0.1, 0.9], [0.2, 0.8]])
    assert suspected_label_errors(scores, [0, 0, 1, 1, 1, 1]) == [2]
    assert suspected_label_errors(scores, [0, 0, 0, 0, 1, 1]) == []


@pytest.mark.slow
@pytest.mark.ecosystem
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_report_from_the_file_system(width: int, report: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 1000})
    asked: list[str] = []
    faults: list[str] = []
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.on("requestfailed", lambda sent: faults.append(sent.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(report.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()] and faults == []
    assert tab.locator("figure").count() == 3
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    pixels = np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB"))
    assert pixels.shape[1] == width and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    tab.close()
