"""Distillation: a Ghost-ResNet learns to do what the ResNet that it was made from does, from images alone."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from .data import PhotoDataset, Photos, Preprocessing
from .errors import SurgeryError
from .ghost_resnet import GhostResNet

__all__ = ["distill", "photo_batches"]

logger = logging.getLogger(__name__)

Batches = Tensor | Iterable[Any]
"""Preprocessed images: one tensor `(N, C, H, W)`, or an iterable of such batches or of `(batch, ...)` tuples."""


def distill(
    student: GhostResNet,
    teacher: nn.Module,
    batches: Batches,
    *,
    block_epochs: int = 4,
    logit_epochs: int = 2,
    block_lr: float = 3e-4,
    logit_lr: float = 3e-5,
    temperature: float = 2.0,
) -> None:
    """Train a network to do what the ResNet that it was made from does, on images without labels, in place.

    First block by block: of each block what is new, Ghost module and the batch norm after it, learns to give the
    teacher's features from the student's own (mean squared error, relative to their variance; no gradient goes on
    to the block before). Then end to end: all parameters, by the divergence of the softened predictions. Batch
    norms keep their statistics, so batches may be small. Adam, with a learning rate that falls along a cosine.

    Args:
        student: What `from_resnet` returned.
        teacher: The ResNet, of timm or torchvision, on the same device. It is put in evaluation mode.
        batches: Preprocessed images `(N, C, H, W)`, a tensor or something to be gone through once an epoch, such
            as a `DataLoader` (labels are left out). Fresh random crops each epoch help.
        block_epochs: Epochs block by block.
        logit_epochs: Epochs end to end.
        block_lr: Learning rate block by block.
        logit_lr: Learning rate end to end.
        temperature: Of the softmax end to end.

    Raises:
        SurgeryError: `batches` has no images, or can be gone through only once; the networks' blocks differ.
    """
    if blocks_of(student).keys() != blocks_of(teacher).keys():
        raise SurgeryError("expected the ResNet that the student was made from as its teacher: their blocks differ")

    teacher.eval()
    new = [p for block in blocks_of(student).values() for m in (block.conv1, block.bn1) for p in m.parameters()]
    _descend(student, new, lambda x: _block_loss(student, teacher, x), batches, block_epochs, block_lr)
    every = list(student.parameters())
    _descend(student, every, lambda x: _logit_loss(student, teacher, x, temperature), batches, logit_epochs, logit_lr)


def _block_loss(student: Any, teacher: nn.Module, images: Tensor) -> Tensor:
    """Mean over blocks of the squared error of the student's features, relative to the variance of the teacher's."""
    targets: dict[str, Tensor] = {}
    with torch.no_grad(), watch(teacher, "", targets.__setitem__):
        teacher(images)
        features = stem_features(student, images)
    losses = []
    for name, block in blocks_of(student).items():
        features = block(features.detach())
        losses.append(F.mse_loss(features, targets[name]) / targets[name].var().clamp_min(1e-12))
    return torch.stack(losses).mean()


def _logit_loss(student: nn.Module, teacher: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened predictions: Hinton et al., 2015, https://arxiv.org/abs/1503.02531."""
    with torch.no_grad():
        target = F.log_softmax(teacher(images) / temperature, dim=1)
    prediction = F.log_softmax(student(images) / temperature, dim=1)
    return F.kl_div(prediction, target, reduction="batchmean", log_target=True) * temperature**2


def _descend(
    student: nn.Module,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    batches: Batches,
    epochs: int,
    lr: float,
) -> None:
    if epochs > 1 and isinstance(batches, Iterator):
        raise SurgeryError("expected batches that can be gone through once an epoch, got an iterator")
    device = next(student.parameters()).device
    student.eval()
    optimizer = torch.optim.Adam(parameters, lr)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        losses = []
        for images in images_of(batches):
            optimizer.zero_grad()
            loss = loss_of(images.to(device))
            loss.backward(inputs=parameters)
            optimizer.step()
            losses.append(loss.item())
        if not losses:
            raise SurgeryError("expected at least one batch of images, got none")
        logger.info("epoch %d of %d: loss %.4g", epoch + 1, epochs, sum(losses) / len(losses))


def photo_batches(
    paths: Sequence[Path], preprocessing: Preprocessing, batch_size: int = 32, *, augment: bool = False
) -> DataLoader:
    """Batches `(images (N, C, H, W), ...)` of unlabelled photos, preprocessed.

    Args:
        paths: The photos.
        preprocessing: The ResNet's.
        batch_size: Photos a batch; the last may have fewer.
        augment: Shuffle, and take a random crop of half the photo or more, mirrored every other time.
    """
    crop = [RandomResizedCrop(preprocessing.resize, scale=(0.5, 1.0)), RandomHorizontalFlip()] if augment else []
    photos = Photos(tuple(paths), (0,) * len(paths), ("",))
    dataset: Any = PhotoDataset(photos, Compose([*crop, preprocessing]))
    return DataLoader(dataset, batch_size, shuffle=augment)


def blocks_of(network: nn.Module) -> dict[str, Any]:
    """The residual blocks of a ResNet of timm or torchvision by name, in order."""
    return {name: m for name, m in network.named_modules() if re.fullmatch(r"layer[1-4]\.\d+", name)}


def stem_features(network: Any, images: Tensor) -> Tensor:
    """What the first residual block is given."""
    return network.maxpool(network.act1(network.bn1(network.conv1(images))))


@contextmanager
def watch(network: nn.Module, part: str, visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `visit(block's name, output)` for what a part of each block, or with "" the block, gives."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: visit(name, output)

    parts = {name: block.get_submodule(part) for name, block in blocks_of(network).items()}
    handles = [module.register_forward_hook(hook(name)) for name, module in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def images_of(batches: Batches) -> Iterator[Tensor]:
    """The batches of images, without their labels."""
    for batch in batches.split(32) if isinstance(batches, Tensor) else batches:
        images = batch if isinstance(batch, Tensor) else batch[0]
        if images.ndim != 4:
            raise SurgeryError(f"expected batches of images (N, C, H, W), got shape {tuple(images.shape)}")
        yield images
