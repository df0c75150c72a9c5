"""A page to try a classifier on: photos from disk, clipboard or camera, bars for the answers, heat maps.

Needs gradio and grad-cam: `pip install "ghost-resnet[demo]"`. The page asks nothing of any other machine.
"""

import base64
import io
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import jinja2
from PIL import Image

from . import hub
from .classifier import GarbageClassifier, Prediction
from .data import read_image
from .explain import OVERLAY_SIDE, Explainer

MAX_PHOTOS = 16
"""In one go."""
MAX_FILE_SIZE = 20 * 2**20
"""Bytes of an uploaded photo."""
KEPT_SECONDS = 3600
"""After so long, uploaded photos are deleted."""


def create_demo(model: str | Path | None = None) -> gr.Blocks:
    """Make the page as a gradio application, to be launched or mounted.

    Args:
        model: As for `GarbageClassifier.from_pretrained`. An exported one has no gradients, so that the page does
            not show where it looks.

    Raises:
        GhostResNetError: What `GarbageClassifier.from_pretrained` and `Explainer` raise.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # some of gradio's reports look here only
    classifier = GarbageClassifier.from_pretrained(model)
    files = hub.resolve(hub.default_tag() if model is None else model)
    explainer = Explainer(model) if files.weights.suffix == ".safetensors" else None
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True
    ).get_template("answers.html")

    def classify(photos: Sequence[tuple[str, str | None]] | None, heat: bool) -> str:
        """Answers as HTML."""
        if not all(_is_within(path, page.GRADIO_CACHE) for path, _ in photos or ()):  # gradio does not check all
            return template.render(problem="Only photos that were uploaded to this page are looked at.")
        paths = [Path(path) for path, _ in photos or ()]
        if len(paths) > MAX_PHOTOS:
            return template.render(problem=f"At most {MAX_PHOTOS} photos at once, please: there are {len(paths)}.")
        shown = explainer if heat else None
        answers = [
            (path.name, prediction, None if prediction.error else _picture(path, prediction, shown))
            for path, prediction in zip(paths, classifier.predict(paths), strict=True)
        ]
        return template.render(answers=answers, heat=shown is not None)

    with gr.Blocks(title="ghost-resnet", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# What is in the photo?\nThis classifier knows {', '.join(files.labels)}.")
        with gr.Row():
            with gr.Column(scale=2):
                photos = gr.Gallery(
                    label=f"Photos, {MAX_PHOTOS} at most",
                    file_types=["image"],
                    sources=["upload", "clipboard", "webcam"],
                    interactive=True,
                    columns=3,
                    object_fit="contain",
                    buttons=[],
                )
                heat = gr.Checkbox(
                    label="Show where the network looks",
                    info="Red speaks most for the answer (HiResCAM); dark grey is not seen.",
                    visible=explainer is not None,
                )
            with gr.Column(scale=3):
                answers = gr.HTML(template.render(), show_label=False, padding=False)
        with gr.Accordion("About the model", open=False):
            gr.Markdown(_about(files))
        gr.on(
            [photos.change, heat.change],
            classify,
            [photos, heat],
            answers,
            api_name="classify",
            concurrency_limit=2,
            trigger_mode="always_last",
            show_progress="minimal",
        )
    return page.queue(max_size=64)


def launch(
    model: str | Path | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    on_start: Callable[[str], object] | None = None,
) -> None:
    """Show the page until interrupted.

    Args:
        model: As for `GarbageClassifier.from_pretrained`.
        host: Address to listen at; None takes $GRADIO_SERVER_NAME, which hosted Spaces set, or else localhost.
        port: None takes $GRADIO_SERVER_PORT, or else the first that is free from 7860.
        on_start: Told the address when the page is there.

    Raises:
        OSError: The port is taken.
        GhostResNetError: As `create_demo`.
    """
    page = create_demo(model)
    system = ["system-ui", "sans-serif"]
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        max_file_size=MAX_FILE_SIZE,
        footer_links=[],
        theme=gr.themes.Soft(font=system, font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
    )
    if on_start:
        on_start(url.rstrip("/"))
    try:
        threading.Event().wait()  # gradio's own way prints
    finally:
        page.close(verbose=False)


def _is_within(path: str, folder: str) -> bool:
    """Whether a path is in a folder, by its name and with links followed; on the disk only the folder is looked at."""
    return all(Path(real(path)).is_relative_to(real(folder)) for real in (os.path.abspath, os.path.realpath))


def _picture(path: Path, prediction: Prediction, explainer: Explainer | None) -> str:
    """A photo, or where the network looks on it, as a JPEG in base64."""
    if explainer:
        image = explainer.explain(path, prediction.label).overlay
    else:
        image = read_image(path, min_side=OVERLAY_SIDE)
        image.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.BICUBIC)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return base64.b64encode(jpeg.getvalue()).decode()


def _about(files: hub.ModelFiles) -> str:
    """The model card in short, in Markdown, with a link to it where it is on a hub."""
    cfg = files.config["pretrained_cfg"]
    name = Path(files.source).name or files.source  # where on this machine it is, is nobody's business
    lines = [f"**{name}**, a `{files.architecture}`. {cfg.get('description') or ''}"]
    if cfg.get("license"):
        lines.append(f"Licence: {cfg['license']}.")
    entry = hub.manifest().get(files.source)
    repo = entry.hf_hub_id if entry else None
    if files.source.startswith("hf-hub:"):
        repo = files.source.removeprefix("hf-hub:").partition("@")[0]
    if repo:
        lines.append(f"[Model card](https://huggingface.co/{repo})")
    return "\n\n".join(lines)
