"""Checkpoints of the report's own code become folders that this package opens."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from . import hub
from .errors import WeightsError
from .files import is_free


def convert(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    labels: Sequence[str],
    architecture: str = "ghost_resnet50_cifar",
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Turn a checkpoint of the report's own code into a folder as `hub.save_pretrained` writes it.

    That code is weiaicunzai/pytorch-cifar100's ResNet (`conv1`, `conv2_x` ... `conv5_x`, `fc`; in each block
    `residual_function` and `shortcut`) with a Ghost module for each block's first convolution. The paths and
    shortcuts of both networks' blocks have the same layers in the same order, whatever the parts of a Ghost
    module are called. So tensors are paired by their order, and the two of a pair must agree in kind
    (`weight`, `running_mean`, ...) and shape.

    Args:
        checkpoint: A `.pth` file. Only tensors are read from it; a file that needs more is refused.
        folder: Where to.
        labels: Names of the classes, in the order of the outputs.
        architecture: Network that the checkpoint is of.
        preprocessing: timm's data configuration that the network was trained with, if not its default.

    Returns:
        The folder.

    Raises:
        WeightsError: The file holds more than tensors, or does not fit the architecture; the folder holds something.
    """
    if not is_free(Path(folder)):
        raise WeightsError(f"expected a folder to make, or an empty one, got {folder}")
    state = _read(Path(checkpoint))
    if "fc.weight" not in state:
        raise WeightsError(f"expected the report's names (conv1, conv2_x, ..., fc) in {checkpoint}")
    model = timm.create_model(architecture, num_classes=len(state["fc.weight"]))
    expected = model.state_dict()
    ours, theirs = _by_part(expected), _by_part(state)
    misfit = f"{checkpoint} does not fit {architecture}: "
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise WeightsError(f"{misfit}only one of them has {', '.join(odd[:5])}")
    converted = {}
    for part in ours:
        if len(ours[part]) != len(theirs[part]):
            raise WeightsError(f"{misfit}expected {len(ours[part])} tensors in {part}, got {len(theirs[part])}")
        for name, given in zip(ours[part], theirs[part], strict=True):
            if name.split(".")[-1] != given.split(".")[-1] or expected[name].shape != state[given].shape:
                raise WeightsError(
                    f"{misfit}expected {name} of shape {list(expected[name].shape)}, "
                    f"got {given} of shape {list(state[given].shape)}"
                )
            converted[name] = state[given]
    model.load_state_dict(converted)
    return hub.save_pretrained(model, folder, labels=labels, preprocessing=preprocessing)


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # a file from anywhere can make it say anything
        raise WeightsError(f"expected a checkpoint of tensors only in {checkpoint}: {error}") from error
    for key in ("state_dict", "model_state_dict", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"expected a dictionary of tensors in {checkpoint}, got other things")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each part (stem, a block's path, its shortcut, head) in their order, in either naming."""
    parts: dict[str, list[str]] = {}
    for name in names:
        part = name.split(".")[0]
        if match := re.match(r"(?:conv([2-5])_x|layer([1-4]))\.(\d+)\.(shortcut|downsample)?", name):
            conv, layer, block, shortcut = match.groups()
            part = f"{'shortcut' if shortcut else 'path'} of block {block} of stage {layer or int(conv) - 1}"
        elif part in ("conv1", "bn1"):
            part = "stem"
        parts.setdefault(part, []).append(name)
    return parts
