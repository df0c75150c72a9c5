"""How much the hash check adds to the first load of a tag's weights.

Each load is the first of a fresh process, timed from after the imports to the model being ready. Loads with and
without the check take turns, with the file in the page cache and, by `--cold`, dropped from it before each.

    python benchmarks/load_weights.py [TAG] [--rounds 15] [--cold]
"""

import argparse
import os
import statistics
import subprocess
import sys

from ghost_resnet import hub

LOAD = """
import sys, time
import ghost_resnet, timm
from ghost_resnet import hub
if sys.argv[2] == "unchecked":
    hub._verify = lambda *_: None
wall, cpu = time.perf_counter(), time.process_time()
timm.create_model(sys.argv[1], pretrained=True)
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def load(tag: str, how: str) -> list[float]:
    """Seconds of the clock and of the processor."""
    command = [sys.executable, "-c", LOAD, tag, how]
    return [float(n) for n in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tag", nargs="?", help="default: the package's first")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each load")
    options = parser.parse_args()
    tag = options.tag or hub.default_tag()
    path = hub.resolve(tag).weights
    times: dict[str, list[list[float]]] = {"unchecked": [], "checked": []}
    for number in range(options.rounds):
        for how in ("unchecked", "checked") if number % 2 else ("checked", "unchecked"):
            if options.cold:
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            times[how].append(load(tag, how))
    print(f"{tag}, {path.stat().st_size / 1e6:.1f} MB, {'cold' if options.cold else 'warm'}, {options.rounds} rounds")
    for name, unit, pick in (
        ("clock, median", 0, statistics.median),
        ("clock, best", 0, min),
        ("processor, median", 1, statistics.median),
    ):
        without, checked = (pick(row[unit] for row in times[how]) for how in times)
        print(f"{name:17}  without {without:.3f} s  with {checked:.3f} s  ratio {checked / without:.3f} (1.15 allowed)")


if __name__ == "__main__":
    main()
