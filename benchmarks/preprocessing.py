"""What reading a photo costs, against PIL and timm's transform.

    python benchmarks/preprocessing.py my_photos --sides 128 224

prints photos a second on one core, from the file to the network's input, medians of interleaved rounds: for timm's
evaluation transform on PIL's image; for `Preprocessing` on the photo decoded whole, at twice the scale that is needed
at least, and at the scale itself, which `Preprocessing.read` takes; and the mean absolute difference of each from
timm's result, in units of the network's input.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data import create_transform

from ghost_resnet.data import Preprocessing, find_images, read_image


def scaled(preprocessing: Preprocessing, times: int | None, path: Path) -> npt.NDArray[np.float32]:
    """A photo that is decoded at so many times the scale that is needed at least."""
    return preprocessing(read_image(path, min_side=times and times * preprocessing.resize))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = list(find_images(args.folder))
    paths = list(islice(found, 0, None, max(1, len(found) // args.photos)))
    for side in args.sides:
        preprocessing = Preprocessing((3, side, side))
        transform = create_transform((3, side, side), interpolation="bicubic", crop_pct=preprocessing.crop_pct)

        ways: dict[str, Callable[[Path], Any]] = {
            "timm": lambda path, transform=transform: transform(Image.open(path).convert("RGB")).numpy(),
            "whole": partial(scaled, preprocessing, None),
            "2x": partial(scaled, preprocessing, 2),
            "1x": partial(scaled, preprocessing, 1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.thread_time()
                for path in paths:
                    way(path)
                seconds[name].append(time.thread_time() - start)
        for name, way in ways.items():
            difference = np.mean([np.abs(way(path) - ways["timm"](path)).mean() for path in paths[::10]])
            rate = len(paths) / statistics.median(seconds[name])
            print(f"{side:4d}  {name:5}  {rate:6.0f} photos/s  {1000 / rate:5.2f} ms  difference {difference:.5f}")


if __name__ == "__main__":
    main()
