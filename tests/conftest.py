"""What all tests share: one torch thread, the folder of real photos, a browser, and the skip of tests without a GPU."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DATA = os.environ.get("GHOST_RESNET_DATA") or Path(__file__).parents[2] / "shared" / "data"

torch.set_num_threads(1)  # small tensors gain nothing from more, and pytest-xdist's workers would fight


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with `trashnet/` and `splits/`: $GHOST_RESNET_DATA, by default ../shared/data."""
    root = Path(DATA)
    if not (root / "trashnet").is_dir():
        pytest.skip(f"no photos: {root} has no trashnet/ (set GHOST_RESNET_DATA)")
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium, without a window, with a camera that is not one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no Chromium to open pages in")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small network that knows nothing but has opinions: six classes, eight outputs, 32 pixels."""
    import timm

    from ghost_resnet import hub

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("ghost_resnet50_cifar", layers=(1, 1, 1, 1), num_classes=8)
    model.fc.weight.data *= 300
    preprocessing = {
        "input_size": (3, 32, 32),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }
    labels = ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
    folder = tmp_path_factory.mktemp("runs") / "small"
    return hub.save_pretrained(model, folder, labels=labels, preprocessing=preprocessing, temperature=1.5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
