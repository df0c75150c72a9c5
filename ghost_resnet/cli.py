"""The command line: one thin command a function. Results go to stdout, everything else to stderr."""

import csv
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import DataError, GhostResNetError

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


class Format(str, Enum):
    """How `predict` writes its answers."""

    text = "text"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


Model = Annotated[
    str | None,
    typer.Option(help="Weight tag, run folder, .safetensors file, hf-hub:owner/repo or local-dir:folder."),
]
Data = Annotated[Path, typer.Option(help="Folder that holds one folder of photos a class.")]
Splits = Annotated[
    list[Path] | None, typer.Option("--split", help="File with one class/photo.jpg a line; may be repeated.")
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
    paths: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.", metavar="PATH")],
    model: Model = None,
    output: Annotated[Format, typer.Option("--format", help="How answers are written.")] = Format.text,
) -> None:
    """Say what photos show.

    Exit status: 0 all answered; 1 some could not be read (each is named on stderr); 2 wrong use.
    """
    from .classifier import GarbageClassifier
    from .data import find_images

    with _errors_as_exit_2():
        photos = [photo for path in paths for photo in (find_images(path) if path.is_dir() else [path])]
        if not photos:
            raise DataError(f"no photos in {', '.join(map(str, paths))}")
        classifier = GarbageClassifier.from_pretrained(model)
        failed = 0
        answers = _named_errors(zip(photos, classifier.predict_stream(photos), strict=True))
        if output is Format.json:
            rows = [prediction.to_report() for _, prediction in answers]
            failed = sum("error" in row for row in rows)
            typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows, ensure_ascii=False))
        else:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            if output is Format.csv:
                writer.writerow(["path", "label", "score", "error"])
            for path, prediction in answers:
                failed += prediction.error is not None
                if output is Format.csv:
                    score = "" if prediction.error else f"{prediction.score:.6f}"
                    writer.writerow([path, prediction.label, score, prediction.error or ""])
                    sys.stdout.flush()
                elif output is Format.jsonl:
                    typer.echo(json.dumps({"path": str(path), **prediction.to_report()}, ensure_ascii=False))
                elif not prediction.error:
                    typer.echo(f"{path}: " + ", ".join(f"{label} {score:.3f}" for label, score in prediction.scores))
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    data: Data,
    splits: Splits = None,
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")] = None,
) -> None:
    """Measure a classifier on labelled photos: the report's lines and a table of the classes."""
    from .evaluation import evaluate as run
    from .files import write_text

    with _errors_as_exit_2(), _progress_bar() as bar:
        task = bar.add_task("evaluate", total=None)
        metrics = run(
            model,
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
    val: Annotated[Path | None, typer.Option(help="Split file with the validation photos.")] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a TOML file.")] = "default",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="key=value to change in the recipe; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train a classifier on a folder of photos."""
    from .recipes import parse_override
    from .training import finetune as run

    with _errors_as_exit_2():
        overrides = dict(map(parse_override, changes or []))
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
        typer.echo(convert(checkpoint, out, labels=labels.split(","), architecture=architecture))


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
def _progress_bar() -> Iterator["ProgressBar"]:
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
        disable=not console.is_terminal,
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


def _named_errors(answers: "Iterator[tuple[Path, Prediction]]") -> "Iterator[tuple[Path, Prediction]]":
    for path, prediction in answers:
        if prediction.error:
            typer.echo(f"ghost-resnet: {prediction.error}", err=True)
        yield path, prediction
