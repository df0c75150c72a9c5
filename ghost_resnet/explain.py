"""Which part of a photo speaks for a class: HiResCAM (Draelos and Carin, 2020, https://arxiv.org/abs/2011.08891).

Needs the library grad-cam: `pip install "ghost-resnet[explain]"`.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance
from scipy.ndimage import convolve1d
from torch import Tensor, nn

from . import hub
from .data import ImageSource, Preprocessing, read_image
from .errors import ConfigError, LabelError
from .extras import require

OVERLAY_SIDE = 640
"""Overlays are at most so many pixels wide and high."""
COLOURS = matplotlib.colormaps["turbo"]
OPACITY = 0.65
"""Of the colours where the heat is greatest; there are none where there is no heat."""


@dataclass(frozen=True)
class Explanation:
    """Where a network looks.

    Attributes:
        label: The class that the heat speaks for.
        overlay: The photo with the heat on it, at most `OVERLAY_SIDE` pixels wide and high. What the network does
            not see, since preprocessing cuts it off, is grey and dark.
        heat: float32 `(height, width)` of the overlay: 1 where most speaks for the class, 0 where least of what the
            network sees, or nothing, and 0 everywhere if no place speaks more for it than another.
    """

    label: str
    overlay: Image.Image
    heat: npt.NDArray[np.float32]


class Explainer:
    """Shows which part of a photo speaks for a class, at the last convolutional stage but one. Threads may share it.

    Args:
        source: As for `GarbageClassifier.from_pretrained`; its weights must be a .safetensors file.
        device: Such as "cpu" or "cuda:1"; None takes a GPU if there is one.

    Raises:
        MissingExtraError: grad-cam is not installed.
        ConfigError: Not a convolutional network, or one without class names.
        GhostResNetError: What `hub.load_model` raises.
    """

    def __init__(self, source: str | Path | None = None, *, device: str | None = None) -> None:
        HiResCAM: Any = require("pytorch_grad_cam", "explain").HiResCAM
        files = hub.resolve(hub.default_tag() if source is None else source)
        if not files.labels:
            raise ConfigError("this model names no classes: expected 'label_names' in its config.json")
        self.labels = files.labels
        self.preprocessing = Preprocessing.from_config(files.config["pretrained_cfg"])
        model = hub.load_model(files).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        stage = _stage(model, files.architecture, self.preprocessing.input_size)

        class SmoothCAM(HiResCAM):
            """Without the grid of dots that gradients are behind a convolution of stride 2."""

            def get_cam_image(self, *args: Any) -> npt.NDArray[np.float32]:
                maps = super().get_cam_image(*args)
                for axis in (-2, -1):
                    maps = convolve1d(maps, (0.25, 0.5, 0.25), axis, mode="mirror")
                return maps

        self._cam = SmoothCAM(model, [stage])
        self._lock = threading.Lock()  # grad-cam keeps activations in the object

    def explain(self, photo: ImageSource, label: str | None = None) -> Explanation:
        """Show which part of a photo speaks for a class.

        Args:
            photo: A path, the bytes of an image file, an open binary file, a PIL image or a uint8 array.
            label: The class; None takes the network's own answer.

        Raises:
            UnreadableImageError: The photo can't be read.
            LabelError: The model has no such class.
        """
        if label is not None and label not in self.labels:
            raise LabelError(f"expected a class of this model ({', '.join(self.labels)}), got {label!r}")
        image = read_image(photo)
        batch = torch.from_numpy(self.preprocessing(image))[None]
        asked = None if label is None else self.labels.index(label)
        answer = 0

        def target(outputs: Tensor) -> Tensor:
            nonlocal answer
            answer = int(outputs[: len(self.labels)].argmax()) if asked is None else asked
            return outputs[answer]

        with self._lock, torch.enable_grad():
            (seen,) = self._cam(batch, [target])
            self._cam.activations_and_grads.clear()  # else grad-cam prints a traceback when Python ends
        image.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
        left, top, right, bottom = _field_of_view(self.preprocessing, image.size)
        patch = Image.fromarray(seen).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        heat = np.zeros((image.height, image.width), np.float32)
        heat[top:bottom, left:right] = np.asarray(patch).clip(0, 1)
        return Explanation(self.labels[answer], _overlay(image, heat, (left, top, right, bottom)), heat)


def _stage(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> nn.Module:
    """The last stage but one of a convolutional network of timm's, the only part of which gradients are asked.

    The last stage has too few places for that, 4 x 4 for 128 pixels, and each sees most of the photo.
    """
    network: Any = model
    device = next(model.parameters()).device
    with torch.inference_mode():
        features = network.forward_features(torch.zeros(1, *input_size, device=device))
    if features.ndim != 4 or features.shape[1] != network.num_features:
        raise ConfigError(f"expected a network that ends in convolutional feature maps, as HiResCAM needs, got {name}")
    stage = model.get_submodule(network.feature_info[-2]["module"])
    model.requires_grad_(False)
    stage.requires_grad_(True)
    return stage


def _field_of_view(preprocessing: Preprocessing, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what the network sees of a photo of that size, in pixels."""
    share = preprocessing.input_size[1] / preprocessing.resize
    width, height = size if preprocessing.crop_mode == "squash" else (min(size), min(size))
    width, height = max(1, round(width * share)), max(1, round(height * share))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _overlay(photo: Image.Image, heat: npt.NDArray[np.float32], seen: tuple[int, int, int, int]) -> Image.Image:
    unseen = ImageEnhance.Brightness(photo.convert("L").convert("RGB")).enhance(0.5)
    unseen.paste(photo.crop(seen), seen)
    colours = Image.fromarray(COLOURS(heat, bytes=True)[..., :3])
    opacity = Image.fromarray((heat * OPACITY * 255).astype(np.uint8))
    return Image.composite(colours, unseen, opacity)
