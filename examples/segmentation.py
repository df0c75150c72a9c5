"""Segment photos with a U-Net whose encoder is a Ghost-ResNet.

    pip install segmentation-models-pytorch
    python examples/segmentation.py my_masks runs/unet --classes 3 [--start runs/mine]

`my_masks/images/` holds the photos, `my_masks/masks/` a PNG of the same name for each, whose pixel values are
class numbers.
`--start` takes the encoder's weights from a classifier that `ghost-resnet finetune` or `ghost-resnet surgery` made.
"""

from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import typer
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize, to_tensor

import ghost_resnet  # noqa: F401  (registers the networks with timm)
from ghost_resnet import hub
from ghost_resnet.data import find_images, read_image


def main(data: Path, out: Path, classes: int = 2, start: str = "", epochs: int = 30, side: int = 256) -> None:
    """Train a U-Net and save it."""
    model = smp.Unet("tu-ghost_resnet50", encoder_weights=None, classes=classes)
    if start:
        fitting = model.encoder.model.load_state_dict(hub.load_model(start).state_dict(), strict=False)
        assert not fitting.missing_keys, f"{start} is not a ghost_resnet50"
    pairs = [load(path, data / "masks" / f"{path.stem}.png", side) for path in find_images(data / "images")]
    batches = torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True)
    dice = smp.losses.DiceLoss("multiclass")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for epoch in range(1, epochs + 1):
        losses = []
        for images, masks in batches:
            logits = model(images)
            loss = dice(logits, masks) + torch.nn.functional.cross_entropy(logits, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch} of {epochs}: loss {np.mean(losses):.3f}")
    model.save_pretrained(out)  # smp.from_pretrained(out) opens it


def load(photo: Path, mask: Path, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A photo `(3, side, side)`, normalised, and its mask `(side, side)` of class numbers."""
    image = normalize(to_tensor(read_image(photo).resize((side, side))), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    numbers = np.array(Image.open(mask).resize((side, side), Image.Resampling.NEAREST))
    return image, torch.from_numpy(numbers).long()


if __name__ == "__main__":
    typer.run(main)
