"""What all tests share: one torch thread, the folder of real photos, and the skip of tests without a GPU."""

import os
from pathlib import Path

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
