"""Peak memory of a process that predicts very many photos.

    python benchmarks/predict_memory.py my_photos --photos 100000 --model runs/mine

makes a folder of links to the photos of `my_photos`, over and over, has `ghost-resnet predict` answer it with `--out`,
and prints how many were answered, in what time, and the peak resident memory of that process, in MB.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ghost_resnet.data import find_images


def measure(photos: Path, count: int, model: str | None, out: Path) -> tuple[int, float, float]:
    """Answers, seconds, and peak resident MB of a process that predicts `count` photos."""
    with tempfile.TemporaryDirectory() as folder:
        sources = itertools.cycle([path.resolve() for path in find_images(photos)])
        for number, source in enumerate(itertools.islice(sources, count)):
            Path(folder, f"{number:08}{source.suffix}").symlink_to(source)
        command = [sys.executable, "-m", "ghost_resnet", "predict", folder, "--out", str(out)]
        start = time.perf_counter()
        process = subprocess.Popen([*command, *(["--model", model] if model else [])])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"predict ended with status {os.waitstatus_to_exitcode(status)}")
    with out.open(encoding="utf-8") as lines:
        return sum(1 for _ in lines), seconds, usage.ru_maxrss / 1024  # KiB, but on a Mac bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers, seconds, peak = measure(args.folder, args.photos, args.model, Path(folder, "answers.jsonl"))
    print(f"{answers} photos in {seconds:.0f} s, peak {peak:.0f} MB")


if __name__ == "__main__":
    main()
