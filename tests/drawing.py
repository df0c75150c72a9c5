"""Small photos that the tests draw."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth RGB picture, unlike any other seed's, that survives JPEG and scaling."""
    few = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    """Fill a folder of class folders with JPEGs, `counts` of each class."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(1, count + 1):
            draw(seed=1000 * label + number).save(root / name / f"{name}{number}.jpg", quality=90)
    return root
