"""Speed of classifiers side by side: back ends, precisions and other networks, in one interleaved run.

A figure of speed is worth something only beside a rival's from the same minute of the same machine, so the
contestants take turns, and each figure is the median of its rounds.
"""

from __future__ import annotations

import inspect
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform
from torch.utils.flop_counter import FlopCounterMode

from . import hub
from .classifier import GarbageClassifier
from .data import find_images
from .errors import BenchmarkError, GhostResNetError
from .export import export
from .files import write_text
from .report import to_svg
from .runtimes.torch import TorchRuntime

logger = logging.getLogger(__name__)

PLAIN = "resnet50"
"""The rival that every ratio is against: a plain script with PIL, timm's transform and this network in eager fp32."""
TRANSFORMERS = "transformers"
"""The rival that is the image-classification pipeline of the library transformers, with the network `PLAIN` in it."""
RIVALS = (PLAIN, "ghostnet_100", "mobilenetv3_large_100", "efficientnet_b0", TRANSFORMERS)
VARIANTS = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""Back ends and precisions in which our networks run; those that this machine lacks are left out."""
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
GEMM_SIDES = 256, 512, 1024, 2048
"""Sides of the matrices whose product gives the machine's peak, in turn, up to the first that takes `GEMM_SECONDS`."""
GEMM_SECONDS = 0.1

Batch = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Spread:
    """Median and range of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What one contestant does.

    Attributes:
        name: Network, back end, precision.
        precision: That it computes in.
        latency: Milliseconds for a batch of 1, the network alone.
        batch_size: The batch size of the highest throughput.
        throughput: Photos a second at that batch size, the network alone.
        folder: Photos a second from files, reading and decoding included.
        memory: Largest resident memory of a process that predicts the photos, in MB.
        cold_start: Seconds from starting a process to its answer for one photo.
        share_of_peak: Multiply-adds a second, of those of a large matrix product in the same precision, or in fp32
            where that is faster because PyTorch has no kernel of the precision for this CPU.
    """

    name: str
    precision: str
    latency: Spread
    batch_size: int
    throughput: Spread
    folder: Spread
    memory: float
    cold_start: Spread
    share_of_peak: float


@dataclass
class Contestant:
    """Something that answers photos.

    Attributes:
        name: Network, back end, precision.
        precision: That it computes in.
        multiply_adds: Of its network, a photo.
        network: Takes preprocessed photos `(N, 3, H, W)`.
        folder: Answers photo files, one after another.
        command: Answers the photos in the folder that is appended to it, in a process of its own.
    """

    name: str
    precision: str
    multiply_adds: int
    network: Callable[[Batch], object]
    folder: Callable[[Sequence[Path]], Iterable[object]]
    command: list[str]


def bench(
    models: Sequence[str],
    photos: str | Path,
    *,
    size: int = 224,
    rivals: Sequence[str] = RIVALS,
    backends: Sequence[str] = ("torch", "onnx", "openvino"),
    rounds: int = 5,
    limit: int = 256,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure models in every back end that is installed, and timm's networks in a plain script, taking turns.

    Args:
        models: What `hub.resolve` takes.
        photos: Folder of photos, which are also those that int8 is calibrated on.
        size: Side of every network's input, in pixels, so that all do the same work.
        rivals: Networks of timm, without weights, to run in eager fp32 from a plain script; "transformers" is that
            library's pipeline, left out where it is not installed.
        backends: Of "torch", "onnx", "openvino".
        rounds: Turns that each contestant has.
        limit: Photos a turn.
        on_progress: Called with what is being done.

    Returns:
        `machine`, `gemm` (multiply-adds a second by precision) and `rows`, as plain types.

    Raises:
        BenchmarkError: Nothing to compare.
        GhostResNetError: What `hub.resolve` and `export` raise.
    """
    say = on_progress or (lambda text: None)
    found = list(find_images(Path(photos)))
    paths = found[:: max(1, len(found) // limit)][:limit]  # of every class, if there are folders of them
    if not paths or not (models or rivals):
        raise BenchmarkError(f"expected photos in {photos} and something to run, got {len(paths)} photos")
    say("measuring the machine's matrix product")
    gemm = {precision: _gemm(precision) for precision in ("fp32", "bf16", "int8")}
    with TemporaryDirectory() as folder:
        work = Path(folder)
        few = _links(paths, work / "photos")
        one = _links(paths[:1], work / "photo")
        contestants = list(
            chain(
                (_plain(name, size, say) for name in rivals if name != TRANSFORMERS),
                _pipeline(size, say) if TRANSFORMERS in rivals else (),
                *(_ours(model, size, backends, photos, work / str(i), say) for i, model in enumerate(models)),
            )
        )
        best = {c.name: _best_batch_size(c, size) for c in contestants}
        values: dict[str, dict[str, list[float]]] = {
            c.name: {"latency": [], "throughput": [], "folder": [], "cold": [], "memory": []} for c in contestants
        }
        for turn in range(rounds):
            for c in contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]:
                say(f"round {turn + 1} of {rounds}: {c.name}")
                mine = values[c.name]
                mine["latency"].append(1e3 * _seconds(c.network, _batch(1, size), 0.7))
                mine["throughput"].append(best[c.name] / _seconds(c.network, _batch(best[c.name], size), 2.0))
                started = time.perf_counter()
                answered = sum(1 for _ in c.folder(paths))
                mine["folder"].append(answered / (time.perf_counter() - started))
                mine["cold"].append(_process([*c.command, str(one)])[0])
                if not mine["memory"]:
                    mine["memory"].append(_process([*c.command, str(few)])[1])
    rows = [_row(c, best[c.name], values[c.name], gemm) for c in contestants]
    return {
        "machine": f"{_cpu()}, {torch.get_num_threads()} cores, torch {torch.__version__}",
        "size": size,
        "photos": len(paths),
        "rounds": rounds,
        "gemm": gemm,
        "rows": [asdict(row) for row in rows],
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """A table of what `bench` returned, with each ratio to the plain rival if it took part."""
    plain = next((row for row in result["rows"] if row["name"] == f"plain {PLAIN}"), None)

    def ratio(row: Mapping[str, Any], name: str) -> str:
        if plain is None:
            return ""
        ours, theirs = row[name]["median"], plain[name]["median"]
        return f" ({theirs / ours if name == 'latency' else ours / theirs:.2f}x)"

    def cell(row: Mapping[str, Any], name: str, form: str) -> str:
        value = row[name]
        spread = f" [{value['low']:{form}} to {value['high']:{form}}]"
        return f"{value['median']:{form}}{spread}{ratio(row, name)}"

    lines = [
        "| what | latency at batch 1, ms | best batch | network alone, photos/s | of GEMM peak "
        "| from files, photos/s | first answer, s | memory, MB |",
        "|---|---|---:|---|---:|---|---|---:|",
    ]
    for row in result["rows"]:
        start = row["cold_start"]
        lines.append(
            f"| {row['name']} | {cell(row, 'latency', '.1f')} | {row['batch_size']} "
            f"| {cell(row, 'throughput', '.1f')} | {row['share_of_peak']:.0%} | {cell(row, 'folder', '.1f')} "
            f"| {start['median']:.2f} [{start['low']:.2f} to {start['high']:.2f}] | {row['memory']:.0f} |"
        )
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw photos a second from files of everything that took part, as SVG."""
    rows = result["rows"]
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    medians = [row["folder"]["median"] for row in rows]
    spread = [
        [row["folder"]["median"] - row["folder"]["low"] for row in rows],
        [row["folder"]["high"] - row["folder"]["median"] for row in rows],
    ]
    colours = ["#9aa7b5" if row["name"].startswith(("plain ", f"{TRANSFORMERS} ")) else "#1f77b4" for row in rows]
    bars = axes.barh([row["name"] for row in rows], medians, xerr=spread, color=colours, ecolor="#5d6b7c")
    axes.bar_label(bars, [f"{value:.0f}" for value in medians], padding=6, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"photos a second from files, input {result['size']} x {result['size']}")
    axes.spines[["top", "right"]].set_visible(False)
    write_text(path, to_svg(figure))


# Contestants ----------------------------------------------------------------------------------------------------------


def _ours(
    model: str, size: int, backends: Sequence[str], photos: str | Path, work: Path, say: Callable[[str], None]
) -> Iterator[Contestant]:
    files = hub.resolve(model)
    network = hub.load_model(files)
    source = hub.save_pretrained(
        network, work / "model", labels=files.labels, preprocessing={"input_size": (3, size, size)}
    )
    count = multiply_adds(network, size)
    for backend, precision in VARIANTS:
        if backend not in backends:
            continue
        say(f"preparing {files.architecture} {backend} {precision}")
        folder = source
        arguments = ["--backend", backend]
        try:
            if backend != "torch":
                stored = "int8" if precision == "int8" else "fp32"
                folder = work / f"{backend}-{stored}"
                if not folder.is_dir():
                    export(source, folder, format=backend, precision=stored, photos=photos)
            if precision == "bf16":
                arguments += ["--precision", precision]
            classifier = GarbageClassifier.from_pretrained(
                folder, backend=backend, precision=precision if precision == "bf16" else None
            )
            if isinstance(classifier.runtime, TorchRuntime):
                classifier.runtime.leave_thread()  # else it would slow the rivals down, which compute in this one
        except GhostResNetError as error:
            logger.warning("left out: %s in %s, %s: %s", files.architecture, backend, precision, error)
            continue
        yield Contestant(
            f"{files.architecture} {backend} {precision}",
            precision,
            count,
            classifier.runtime,
            classifier.predict_stream,
            [
                *(sys.executable, "-m", "ghost_resnet", "predict", "--model", str(folder)),
                *(*arguments, "--format", "jsonl"),
            ],
        )


_SCRIPT = """
import sys, torch, timm
from pathlib import Path
from PIL import Image
name, size, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = timm.create_model(name).eval()
transform = timm.data.create_transform((3, size, size))
paths = sorted(Path(sys.argv[4]).iterdir())
with torch.inference_mode():
    for start in range(0, len(paths), batch_size):
        images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
        print(model(torch.stack(images)).argmax(1).tolist())
"""


def _plain(name: str, size: int, say: Callable[[str], None]) -> Contestant:
    say(f"preparing {name}")
    model = timm.create_model(name).eval()
    transform = create_transform((3, size, size))

    @torch.inference_mode()
    def network(batch: Batch) -> object:
        return model(torch.from_numpy(batch)).numpy()

    def folder(paths: Sequence[Path]) -> Iterator[object]:
        for start in range(0, len(paths), 16):
            images = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + 16]]
            yield from network(torch.stack(images).numpy())  # type: ignore[misc]

    command = [sys.executable, "-c", _SCRIPT, name, str(size), "16"]
    return Contestant(f"plain {name}", "fp32", multiply_adds(model, size), network, folder, command)


def _transformers_classifier(name: str, size: int) -> Any:
    """The pipeline of transformers around a network of timm's. Its source is also the start of a script."""
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor, pipeline

    about = {**timm.create_model(name).pretrained_cfg, "input_size": (3, size, size)}
    return pipeline(
        "image-classification",
        model=TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, pretrained_cfg=about)).eval(),
        image_processor=TimmWrapperImageProcessor(pretrained_cfg=about, architecture=name),
        device="cpu",
    )


_PIPELINE_SCRIPT = (
    "from typing import Any\n"
    + inspect.getsource(_transformers_classifier)
    + """
import sys
from pathlib import Path
name, size, batch_size, folder = sys.argv[1:]
print(_transformers_classifier(name, int(size))(sorted(map(str, Path(folder).iterdir())), batch_size=int(batch_size)))
"""
)


def _pipeline(size: int, say: Callable[[str], None]) -> Iterator[Contestant]:
    if find_spec("transformers") is None:
        logger.warning("left out: the pipeline of transformers, which is not installed")
        return
    say("preparing the pipeline of transformers")
    classifier = _transformers_classifier(PLAIN, size)

    @torch.inference_mode()
    def network(batch: Batch) -> object:
        return classifier.model(pixel_values=torch.from_numpy(batch)).logits.numpy()

    def folder(paths: Sequence[Path]) -> Iterable[object]:
        return classifier([str(path) for path in paths], batch_size=16)

    command = [sys.executable, "-c", _PIPELINE_SCRIPT, PLAIN, str(size), "16"]
    count = multiply_adds(timm.create_model(PLAIN), size)
    yield Contestant(f"transformers {PLAIN}", "fp32", count, network, folder, command)


def multiply_adds(network: torch.nn.Module, size: int) -> int:
    """Multiply-adds of a network's convolutions and matrix products for one photo `(3, size, size)`."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() // 2


# Measuring ------------------------------------------------------------------------------------------------------------


def _batch(batch_size: int, size: int) -> Batch:
    return np.random.default_rng(0).standard_normal((batch_size, 3, size, size), np.float32)


def _seconds(network: Callable[[Batch], object], batch: Batch, at_least: float) -> float:
    """Median seconds a call, over calls that take so long in all."""
    network(batch)
    times: list[float] = []
    while sum(times) < at_least:
        started = time.perf_counter()
        network(batch)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _best_batch_size(contestant: Contestant, size: int) -> int:
    return min(BATCH_SIZES, key=lambda n: _seconds(contestant.network, _batch(n, size), 0.5) / n)


_WATCH = """
import json, platform, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - started
unit = 1 if platform.system() == "Darwin" else 1024
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e6]))
sys.exit(done.returncode)
"""


def _process(command: list[str]) -> tuple[float, float]:
    """Wall seconds and largest resident memory in MB of a process.

    Another small one watches it, since a process begins with the largest memory of the one that it is forked from.
    """
    done = subprocess.run([sys.executable, "-c", _WATCH, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[:6])} ... failed: {done.stderr.strip()[-500:]}")
    seconds, memory = json.loads(done.stdout)
    return seconds, memory


def _gemm(precision: str) -> float:
    """Multiply-adds a second of a large matrix product, the best of five.

    Where PyTorch has no kernel for this CPU, its loops would take minutes over a large one, so sides grow up to the
    first that takes its time.
    """
    speed = 0.0
    for side in GEMM_SIDES:
        multiply = _product(precision, side)
        multiply()
        seconds = min(timeit.repeat(multiply, number=1, repeat=5))
        speed = side**3 / seconds
        if seconds > GEMM_SECONDS:
            break
    return speed


def _product(precision: str, side: int) -> Callable[[], object]:
    if precision == "int8":
        a, b = (torch.randint(-128, 127, (side, side), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b)  # the only int8 product that torch has
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, y = (torch.randn(side, side).to(dtype) for _ in range(2))
    return lambda: x @ y


def _row(
    contestant: Contestant, batch_size: int, values: Mapping[str, Sequence[float]], gemm: Mapping[str, float]
) -> Row:
    throughput = Spread.of(values["throughput"])
    return Row(
        contestant.name,
        contestant.precision,
        Spread.of(values["latency"]),
        batch_size,
        throughput,
        Spread.of(values["folder"]),
        values["memory"][0],
        Spread.of(values["cold"]),
        throughput.median * contestant.multiply_adds / max(gemm["fp32"], gemm[contestant.precision]),
    )


def _links(paths: Sequence[Path], folder: Path) -> Path:
    folder.mkdir()
    for i, path in enumerate(paths):
        (folder / f"{i:05}{path.suffix}").symlink_to(path.resolve())
    return folder


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
