"""How much the HTTP service costs beside a bare loop of the same model, with batching on and off.

Starts `ghost-resnet serve` on the loopback in a process of its own, once for each setting, and asks it from as many
clients at once as named, each on a connection of its own that it keeps. The bare loop answers the same photo, one
after another, in this process. Prints a Markdown table; run it on a quiet machine.

    python benchmarks/serve_load.py [--model M] [--photo FILE] [--clients 1 8 32] [--seconds 15]
"""

import argparse
import io
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from ghost_resnet import GarbageClassifier

BATCHING = {"off": ["--max-batch", "1", "--max-wait", "0"], "on": []}


def drawn_photo() -> bytes:
    """A JPEG of 512 x 384 pixels, TrashNet's size."""
    few = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(few).resize((512, 384), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(ask: Callable[[], bool], seconds: float) -> tuple[list[float], int]:
    """Seconds of each answer, and how many were lost, asking again and again for so long."""
    times, lost = [], 0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        if ask():
            times.append(time.perf_counter() - start)
        else:
            lost += 1
    return times, lost


def row(name: str, batching: str, clients: int, times: list[float], lost: int, seconds: float) -> str:
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return f"| {name} | {batching} | {clients} | {len(times) / seconds:.1f} | {p50:.1f} | {p99:.1f} | {lost} |"


def load(url: str, photo: bytes, expected: dict, clients: int, seconds: float) -> tuple[list[float], int]:
    """As `measure`, by many clients at once."""
    results: list[tuple[list[float], int]] = []

    def client() -> None:
        with httpx.Client(timeout=120) as http:

            def ask() -> bool:
                try:
                    return http.post(f"{url}/predict", files={"images": photo}).json() == expected
                except (httpx.HTTPError, ValueError):
                    return False

            ask()  # the connection
            results.append(measure(ask, seconds))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [t for times, _ in results for t in times], sum(lost for _, lost in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="default: the package's")
    parser.add_argument("--photo", type=Path, help="default: a drawn one of TrashNet's size")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=15)
    options = parser.parse_args()
    photo = options.photo.read_bytes() if options.photo else drawn_photo()

    print("| what | batching | clients | answers/s | p50 ms | p99 ms | lost |\n|---|---|---:|---:|---:|---:|---:|")
    classifier = GarbageClassifier.from_pretrained(options.model)
    expected = classifier.predict(photo).to_report()
    times, lost = measure(lambda: classifier.predict(photo).to_report() == expected, options.seconds)
    print(row("bare loop", "", 1, times, lost, options.seconds), flush=True)

    model = ["--model", options.model] if options.model else []
    for batching, arguments in BATCHING.items():
        command = [sys.executable, "-m", "ghost_resnet", "serve", "--port", "0", "--drain", "0", *model, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        while httpx.get(f"{url}/health", timeout=60).status_code != 200:
            time.sleep(0.1)
        for clients in options.clients:
            times, lost = load(url, photo, expected, clients, options.seconds)
            print(row("service", batching, clients, times, lost, options.seconds), flush=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    main()
