"""A training run is killed at a random moment, resumed, and compared with one that was left alone.

    python benchmarks/resume.py [--runs 10] [--seed 0] [--out FOLDER]

trains a small network on drawn photos once without interruption, then RUNS times with signal 9 in an epoch (a random
share of the time that the one before took), while a checkpoint is written, or at the start (a random share of the time
that the first epoch took to end); each is resumed with `--resume`, or begun anew where there was nothing yet. Prints a
Markdown table: the moment, what was on the disk then, and whether in the end the weights' sha256 is that of the
uninterrupted run. The exit status is 1 if any differs.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ghost_resnet.recipes import Recipe

RECIPE = Recipe(
    arch="ghost_resnet50_s4",
    model_args={"layers": [1, 1, 1, 1]},
    img_size=48,
    cache_side=48,
    random_erasing=0.3,
    epochs=4,
    batch_size=8,
    opt="adamw",
    lr=1e-3,
    ema_decay=0.9,
    val_fraction=0.2,
    precision="fp32",
)
MOMENTS = "epoch", "checkpoint", "start"
POLL = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp())
    draw_photos(out / "photos")
    (out / "recipe.toml").write_text(RECIPE.to_toml(), encoding="utf-8")

    child = train(out, out / "whole")
    first = watch(out / "whole", 1, child)[-1]
    if child.wait():
        sys.exit(f"training failed: see {out / 'log.txt'}")
    whole = sha256(out / "whole")
    rng = np.random.default_rng(options.seed)
    print(f"Seed {options.seed}; uninterrupted: sha256 {whole[:16]}\n")
    print("| run | moment | killed after | finished epochs | half-written | sha256 after resuming | same |")
    print("|---|---|---|---|---|---|---|")
    same = True
    for number in range(options.runs):
        run = out / f"run-{number}"
        moment = MOMENTS[number % len(MOMENTS)]
        started, child, share = time.monotonic(), train(out, run), rng.uniform()
        if moment == "start":
            time.sleep(share * first)
        elif moment == "epoch":
            *_, before, last = times = watch(run, int(rng.integers(2, RECIPE.epochs)), child)
            first = times[0]
            time.sleep(share * (last - before))
        else:
            wait_for(run / "checkpoints" / f".epoch-{rng.integers(1, RECIPE.epochs):05}", child)
            time.sleep(share * 0.05)
        child.send_signal(signal.SIGKILL)
        killed = "had ended" if child.wait() == 0 else f"{time.monotonic() - started:.2f} s"
        finished = max((int(p.name.removeprefix("epoch-")) for p in run.glob("checkpoints/epoch-*")), default=0)
        torn = sorted({path.name.rsplit(".", 1)[0] if path.is_file() else path.name for path in run.rglob(".*")})
        train(out, run, resume=(run / "recipe.toml").exists()).wait()
        digest = sha256(run)
        same &= digest == whole
        print(
            f"| {number + 1} | {moment} | {killed} | {finished} | {', '.join(torn) or '-'} | {digest[:16]} "
            f"| {'yes' if digest == whole else 'NO'} |",
            flush=True,
        )
    if not options.out:
        shutil.rmtree(out)
    sys.exit(0 if same else 1)


def draw_photos(root: Path) -> None:
    """Two classes of thirty photos, each of a few random colours."""
    rng = np.random.default_rng(0)
    for label, width in {"coarse": 3, "fine": 9}.items():
        (root / label).mkdir(parents=True)
        for number in range(30):
            colours = Image.fromarray(rng.integers(0, 256, (width, width, 3), np.uint8))
            colours.resize((64, 48), Image.Resampling.BICUBIC).save(root / label / f"{number:02}.png")


def train(out: Path, run: Path, *, resume: bool = False) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ghost_resnet", "finetune", "--data", out / "photos"]
    command += ["--recipe", out / "recipe.toml", "--out", run, *(["--resume"] if resume else [])]
    with (out / "log.txt").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
        )


def watch(run: Path, epochs: int, child: "subprocess.Popen[bytes]") -> list[float]:
    """Seconds after which the checkpoint of each of the first epochs was there."""
    started, times = time.monotonic(), []
    for epoch in range(1, epochs + 1):
        wait_for(run / "checkpoints" / f"epoch-{epoch:05}", child)
        times.append(time.monotonic() - started)
    return times


def wait_for(path: Path, child: "subprocess.Popen[bytes]") -> None:
    while not path.exists() and child.poll() is None:
        time.sleep(POLL)


def sha256(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
