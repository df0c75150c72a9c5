"""The command line: one thin command a function. Results go to stdout, everything else to stderr."""

import io
import itertools
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import DataError, GhostResNetError, OutputError, UnreadableImageError
from .extras import require
from .output import AnswerFile, Format, render

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

    from .classifier import Prediction
    from .training import Progress

app = typer.Typer(
    help="Ghost-ResNet image classifiers: predict, evaluate, fine-tune.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Model = Annotated[
    str | None,
    typer.Option(help="Weight tag, run or exported folder, weights file, hf-hub:owner/repo or local-dir:folder."),
]
Data = Annotated[
    str,
    typer.Option(
        help="Folder that holds one folder of photos a class; .csv or .parquet file with the columns path and label; "
        "hfds:NAME[#SPLIT]; wds:SHARDS."
    ),
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="Give no answer whose score is below this.")]
Splits = Annotated[
    list[Path] | None,
    typer.Option("--split", help="File with one class/photo.jpg of the folder a line; may be repeated."),
]


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more to stderr.")] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    if not verbose:
        warnings.simplefilter("ignore")  # Pillow's, of photos with odd metadata
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that is no UTF-8


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of photos, or URLs of photos.", metavar="PATH")],
    model: Model = None,
    output: Annotated[
        Format | None, typer.Option("--format", help="How answers are written; by default as --out ends, else text.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the answers to as they come.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a half-done --out.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, onnx or openvino; without it, what the model's file is for.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Compute in fp32, bf16 or fp16.")] = None,
    threshold: Threshold = 0.0,
) -> None:
    """Say what photos show.

    Exit status: 0 all answered; 1 some could not be read (each is named on stderr); 2 wrong use; 130 interrupted:
    what was written to --out stays, and --resume goes on with it.
    """
    from .classifier import GarbageClassifier

    with _errors_as_exit_2():
        output = output or _format_of(out)
        resumable = output in (Format.jsonl, Format.csv, Format.parquet)
        if resume and not (out and resumable):
            raise OutputError("--resume needs --out FILE, and jsonl, csv or parquet as --format")
        if output is Format.parquet:
            if not out:
                raise OutputError("parquet needs --out FILE")
            require("pyarrow.parquet", "data")  # now, not after the last photo
        photos = _photos(paths)
        if (first := next(photos, None)) is None:
            raise DataError(f"no photos in {', '.join(paths)}")
        photos = itertools.chain([first], photos)
        classifier = GarbageClassifier.from_pretrained(model, backend=backend, precision=precision, threshold=threshold)
        with ExitStack() as stack:
            failed = 0
            file = None
            if out and resumable:
                file = stack.enter_context(AnswerFile(out, output, classifier, resume=resume))
                photos, failed = file.remaining(photos), file.failed
            shown = out is not None or not sys.stdout.isatty()  # else the answers themselves show how far it is
            bar = stack.enter_context(_progress_bar(shown))
            task = bar.add_task("predict", total=None if bar.disable else _count(paths))
            named, given = itertools.tee(photos)  # drawn from together: no more than the stream's batches is kept

            def answers() -> "Iterator[tuple[str, Prediction]]":
                nonlocal failed
                for photo, prediction in zip(named, classifier.predict_stream(given), strict=True):
                    if prediction.error:
                        failed += 1
                        typer.echo(f"ghost-resnet: {prediction.error}", err=True)
                    yield str(photo), prediction
                    bar.update(task, advance=1)

            if file:
                for name, prediction in answers():
                    file.write(name, prediction)
            elif out:
                with out.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text:
                    for piece in render(output, answers()):
                        text.write(piece)
                        text.flush()
            else:
                for piece in render(output, answers()):
                    typer.echo(piece, nl=False)
    if failed:
        raise typer.Exit(1)


def _format_of(out: Path | None) -> Format:
    suffix = out.suffix.lower().removeprefix(".") if out else ""
    return Format(suffix) if suffix in Format.__members__ else Format.text


def _is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def _photos(paths: list[str]) -> Iterator[Path | str]:
    from .data import find_images

    for path in paths:
        if _is_url(path):
            yield path
        elif Path(path).is_dir():
            yield from find_images(Path(path))
        else:
            yield Path(path)


def _count(paths: list[str]) -> int:
    from .data import count_images

    return sum(count_images(Path(path)) if not _is_url(path) and Path(path).is_dir() else 1 for path in paths)


@app.command()
def evaluate(
    data: Data,
    splits: Splits = None,
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
    threshold: Threshold = 0.0,
) -> None:
    """Measure a classifier on labelled photos: the report's lines and a table of the classes."""
    from .classifier import GarbageClassifier
    from .evaluation import evaluate as run
    from .files import write_text

    with _errors_as_exit_2(), _progress_bar() as bar:
        task = bar.add_task("evaluate", total=None)
        metrics = run(
            GarbageClassifier.from_pretrained(model, threshold=threshold),
            data,
            splits=splits or (),
            on_progress=lambda n, of: bar.update(task, completed=n, total=of),
        )
        if output:
            write_text(output, json.dumps(metrics.to_dict(), indent=2))
    low, high = metrics.top1_interval
    typer.echo(metrics.report())
    typer.echo(
        f"Top 1 accuracy {metrics.top1:.4f} (95 % interval {low:.4f} to {high:.4f}), macro F1 {metrics.macro_f1:.4f}, "
        f"ECE {metrics.ece:.4f}, {metrics.photos} photos\n"
    )
    if threshold and metrics.selective:
        right = (
            "" if metrics.selective.accuracy is None else f", accuracy of the answers {metrics.selective.accuracy:.4f}"
        )
        typer.echo(f"Threshold {threshold:g}: coverage {metrics.selective.coverage:.4f}{right}\n")
    width = max(map(len, ("class", *metrics.per_class)))
    typer.echo(f"{'class':<{width}}  precision  recall      f1  photos")
    for name, figures in metrics.per_class.items():
        typer.echo(
            f"{name:<{width}}  {figures.precision:9.4f}  {figures.recall:6.4f}  {figures.f1:6.4f}  {figures.support:6d}"
        )


@app.command()
def finetune(
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder to make.")],
    splits: Splits = None,
    val: Annotated[
        str | None, typer.Option(help="Validation photos: a split file of the folder, or another source like --data.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a TOML file.")] = "default",
    teacher: Annotated[
        str | None,
        typer.Option(help="Network to learn from too: a name of timm's, such as resnet50.a1_in1k, or a run."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value to change in the recipe; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a classifier on labelled photos."""
    from .recipes import parse_override
    from .training import finetune as run

    with _errors_as_exit_2():
        overrides = dict(map(parse_override, changes or [])) | ({"teacher": teacher} if teacher else {})
        with _progress_bar() as bar:
            result = run(
                data,
                out,
                recipe,
                splits=splits or (),
                val=val,
                overrides=overrides,
                resume=resume,
                on_progress=_Reporter(bar),
            )
    if os.environ.get("RANK", "0") == "0":  # else a launcher started several processes, and another one says it
        typer.echo(f"on {result.metrics.measured_on}:\n{result.metrics.report()}\n{result.folder}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Weight tag, run folder, .safetensors file or hf-hub:owner/repo.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    output: Annotated[str, typer.Option("--format", help="onnx, openvino or pt2.")] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "fp32",
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photos to compare with PyTorch on, and to calibrate int8.")
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Pixels in, probabilities out, for use without this package.")
    ] = False,
) -> None:
    """Write a network for ONNX Runtime, OpenVINO or PyTorch programs, checked against PyTorch."""
    from .export import export as run

    with _errors_as_exit_2():
        typer.echo(run(model, out, format=output, precision=precision, photos=photos, standalone=standalone))


hub_app = typer.Typer(help="Weights: list, download, verify, push, convert.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
Source = Annotated[str, typer.Argument(help="Weight tag, run folder, .safetensors file or hf-hub:owner/repo@revision.")]
Cache = Annotated[Path | None, typer.Option(help="Cache of downloads in place of Hugging Face's.")]


@hub_app.command("list")
def hub_list(cache_dir: Cache = None) -> None:
    """List the weights that this version knows, and where they are."""
    from . import hub

    for tag, entry in hub.manifest().items():
        path = hub.local_file(tag, cache_dir=cache_dir)
        where = path or (f"hf-hub:{entry.hf_hub_id}" if entry.hf_hub_id else "not here")
        typer.echo(f"{tag}  {entry.size / 1e6:.1f} MB  {', '.join(entry.classes)}  {where}")


@hub_app.command("download")
def hub_download(source: Source, cache_dir: Cache = None) -> None:
    """Get weights if they are not here yet, verify them, and print where they are."""
    from . import hub

    with _errors_as_exit_2():
        typer.echo(hub.resolve(source, cache_dir=cache_dir).weights)


@hub_app.command("verify")
def hub_verify(
    sources: Annotated[
        list[str] | None, typer.Argument(help="What to verify; without it, every tag whose weights are here.")
    ] = None,
    cache_dir: Cache = None,
) -> None:
    """Verify weights: their hash, and that they are whole, finite and fit their network.

    Exit status: 0 all are good; 1 some are not (each is named on stderr).
    """
    from . import hub

    here = [tag for tag in hub.manifest() if hub.local_file(tag, cache_dir=cache_dir)]
    failed = False
    for source in sources or here:
        try:
            files = hub.resolve(source, cache_dir=cache_dir)
            hub.load_model(files)
            typer.echo(f"{source}: good ({files.weights})")
        except GhostResNetError as error:
            typer.echo(f"ghost-resnet: {error}", err=True)
            failed = True
    if failed:
        raise typer.Exit(1)


@hub_app.command("push")
def hub_push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(help="owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
) -> None:
    """Upload a model to the Hugging Face Hub and print the commit's address. Needs HF_TOKEN or `hf auth login`."""
    from . import hub

    with _errors_as_exit_2():
        typer.echo(hub.push_to_hub(source, repo_id, private=private, revision=revision))


@hub_app.command("convert")
def hub_convert(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth file of the report's own code; only tensors are read.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    labels: Annotated[str, typer.Option(help="Names of the classes in the order of the outputs, comma between.")],
    architecture: Annotated[str, typer.Option(help="Network that the checkpoint is of.")] = "ghost_resnet50_cifar",
) -> None:
    """Turn a checkpoint of the report's own code into a folder that everything here opens."""
    from .conversion import convert

    with _errors_as_exit_2():
        names = [name.strip() for name in labels.split(",")]
        typer.echo(convert(checkpoint, out, labels=names, architecture=architecture))


@hub_app.command("embed", hidden=True)
def hub_embed(
    run: Annotated[Path, typer.Argument(help="Run folder with metrics.json.")],
    tag: Annotated[str, typer.Argument(help="architecture.name")],
    origin: Annotated[str, typer.Option(help="How the weights came to be, one sentence.")],
    hf_hub_id: Annotated[str | None, typer.Option(help="owner/repo that holds, or will hold, the same file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or git tag of that repository.")] = None,
) -> None:
    """Take a run's weights into this checkout of the package, as fp16 (for maintainers)."""
    from . import hub

    with _errors_as_exit_2():
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        entry = hub.embed(
            run,
            tag,
            metrics=metrics,
            origin=origin,
            hf_hub_id=hf_hub_id,
            revision=revision,
        )
    typer.echo(f"{entry.embedded}  {entry.size / 1e6:.1f} MB  {entry.sha256}")


@app.command()
def surgery(
    resnet: Annotated[
        str, typer.Argument(help="A trained ResNet: a name of timm's, such as resnet50, a run folder or a file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    arch: Annotated[str, typer.Option(help="Ghost-ResNet to make, of the same depth.")] = "ghost_resnet50",
    photos: Annotated[
        Path | None, typer.Option(help="Photos to measure and distil with, without labels; none: weights alone.")
    ] = None,
    block_epochs: Annotated[int, typer.Option(help="Passes over the photos, block by block.")] = 4,
    logit_epochs: Annotated[int, typer.Option(help="Passes over the photos, end to end.")] = 2,
) -> None:
    """Turn a trained ResNet into a Ghost-ResNet that computes nearly the same."""
    from .surgery import convert

    with _errors_as_exit_2():
        folder = convert(resnet, out, arch=arch, photos=photos, block_epochs=block_epochs, logit_epochs=logit_epochs)
        typer.echo(folder)


Host = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")]


@app.command()
def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    max_batch: Annotated[int, typer.Option(min=1, help="Photos that go through the network at once.")] = 16,
    max_wait: Annotated[float, typer.Option(min=0, help="Seconds that a photo waits for others.")] = 0.005,
    max_queue: Annotated[int, typer.Option(min=1, help="Photos in hand; more are answered with 503.")] = 64,
    max_images: Annotated[int, typer.Option(min=1, help="Photos in one request.")] = 16,
    max_bytes: Annotated[int, typer.Option(min=1, help="Size of one request.")] = 20 * 2**20,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 30.0,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds after SIGTERM in which /health says 503 and photos are taken.")
    ] = 5.0,
) -> None:
    """Answer photos over HTTP: /predict, /health, /metrics, /docs."""
    with _errors_as_exit_2():
        require("fastapi", "serve")
        from .serve import Limits
        from .serve import serve as run

        run(
            model,
            host=host,
            port=port,
            limits=Limits(max_batch, max_wait, max_queue, max_images, max_bytes, timeout),
            drain=drain,
            on_start=lambda url: typer.echo(f"serving at {url}, documented at {url}/docs", err=True),
        )


@app.command()
def demo(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
) -> None:
    """Show a page to try a classifier on in a browser."""
    with _errors_as_exit_2():
        require("gradio", "demo")
        from .demo import launch

        launch(
            model,
            host=host,
            port=port,
            on_start=lambda url: typer.echo(f"the page is at {url}", err=True),
        )


@app.command()
def explain(
    photos: Annotated[list[Path], typer.Argument(help="Photos.", metavar="PHOTO")],
    out: Annotated[Path, typer.Option(help="Folder for the overlays.")],
    model: Model = None,
    label: Annotated[
        str | None, typer.Option("--class", help="Class to explain; without it, the answer to each photo.")
    ] = None,
) -> None:
    """Show where on a photo a network sees what it answers (HiResCAM).

    Exit status: 0 all explained; 1 some could not be read (each is named on stderr); 2 wrong use.
    """
    from .explain import Explainer
    from .files import atomic_path, file_name

    failed = False
    with _errors_as_exit_2():
        explainer = Explainer(model)
        for photo, name in zip(photos, _distinct_names(photos), strict=True):
            try:
                explanation = explainer.explain(photo, label)
            except UnreadableImageError as error:
                typer.echo(f"ghost-resnet: {error}", err=True)
                failed = True
                continue
            path = out / f"{name}.{file_name(explanation.label)}.png"
            with atomic_path(path) as temporary:
                explanation.overlay.save(temporary, "PNG")
            typer.echo(f"{photo}: {explanation.label}, {path}")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    photos: Annotated[Path, typer.Argument(help="Folder of photos, also for the calibration of int8.")],
    models: Annotated[
        list[str] | None, typer.Option("--model", help="As in predict; may be repeated. None: the package's own.")
    ] = None,
    size: Annotated[int, typer.Option(help="Side of every network's input, in pixels.")] = 224,
    backends: Annotated[str, typer.Option(help="Comma between.")] = "torch,onnx,openvino",
    rivals: Annotated[
        str, typer.Option(help="timm's networks to run from a plain script, and transformers for its pipeline; commas.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Turns that each contestant has.")] = 5,
    limit: Annotated[int, typer.Option(help="Photos a turn.")] = 256,
    output: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Also draw them, as SVG.")] = None,
) -> None:
    """Compare the speed of back ends, precisions and other networks on this machine, in turns.

    Ratios in brackets are to `plain resnet50`, a straightforward script with timm and PIL.
    """
    from . import hub
    from .benchmark import RIVALS, plot, to_markdown
    from .benchmark import bench as run
    from .files import write_text

    with _errors_as_exit_2():
        result = run(
            models or [hub.default_tag()],
            photos,
            size=size,
            rivals=rivals.split(",") if rivals else RIVALS,
            backends=backends.split(","),
            rounds=rounds,
            limit=limit,
            on_progress=lambda text: typer.echo(text, err=True),
        )
        if output:
            write_text(output, json.dumps(result, indent=2) + "\n")
        if picture:
            plot(result, picture)
    typer.echo(f"{result['machine']}, input {size} x {size}, {result['photos']} photos, {rounds} rounds\n")
    typer.echo(to_markdown(result))


class _Reporter:
    """Shows a training run as a bar on a terminal, as one line an epoch elsewhere."""

    def __init__(self, bar: "ProgressBar") -> None:
        self.bar = bar
        self.task = bar.add_task("starting", total=None)

    def __call__(self, progress: "Progress") -> None:
        text = f"epoch {progress.epoch + 1}/{progress.epochs}  loss {progress.loss:.4f}"
        done = progress.epoch * progress.steps + progress.step
        self.bar.update(self.task, description=text, completed=done, total=progress.epochs * progress.steps)
        if progress.epoch_done:
            val = "" if progress.val_top1 is None else f"  val top-1 {progress.val_top1:.4f}"
            typer.echo(f"{text}{val}  lr {progress.lr:.5f}  {progress.images_per_second:.1f} photos/s", err=True)


@contextmanager
def _progress_bar(shown: bool = True) -> Iterator["ProgressBar"]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as bar:
        yield bar


@contextmanager
def _errors_as_exit_2() -> Iterator[None]:
    try:
        yield
    except GhostResNetError as error:
        typer.echo(f"ghost-resnet: {error}", err=True)
        raise typer.Exit(2) from None
    except BrokenPipeError:  # the reader has had enough: typer ends quietly
        raise
    except OSError as error:
        typer.echo(f"ghost-resnet: {error}", err=True)
        raise typer.Exit(2) from None


def _distinct_names(paths: list[Path]) -> Iterator[str]:
    """The names of files without suffix, with a number where several are the same."""
    counts: Counter[str] = Counter()
    for path in paths:
        counts[path.stem.casefold()] += 1
        number = counts[path.stem.casefold()]
        yield path.stem if number == 1 else f"{path.stem}-{number}"
