"""Find things in photos: torchvision's Faster R-CNN on a Ghost-ResNet's feature pyramid.

    python examples/detection.py my_boxes runs/detector.pt [--start runs/mine]

`my_boxes/` holds photos and `boxes.csv`, with a line for each thing:
photo,label,x1,y1,x2,y2 (pixels; x2 > x1, y2 > y1).
`--start` takes the backbone's weights from a classifier that `ghost-resnet finetune` or `ghost-resnet surgery` made.
"""

import csv
from collections import defaultdict
from pathlib import Path

import timm
import torch
import typer
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.transforms.functional import to_tensor

import ghost_resnet  # noqa: F401  (registers the networks with timm)
from ghost_resnet import hub
from ghost_resnet.data import read_image

STAGES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


def detector(labels: list[str], start: str = "", side: int = 640) -> FasterRCNN:
    """A Faster R-CNN; class 0 is the background, class 1 is `labels[0]`."""
    network = hub.load_model(start) if start else timm.create_model("ghost_resnet50")
    channels = [stage["num_chs"] for stage in network.feature_info[1:]]
    backbone = BackboneWithFPN(network, STAGES, channels, out_channels=256)
    return FasterRCNN(backbone, num_classes=len(labels) + 1, min_size=side, max_size=2 * side)


def target(things: list[tuple[str, list[float]]], labels: list[str]) -> dict[str, torch.Tensor]:
    """The things in a photo, as torchvision's detectors want them."""
    numbers = [labels.index(label) + 1 for label, _ in things]
    return {"boxes": torch.tensor([box for _, box in things]), "labels": torch.tensor(numbers)}


def main(data: Path, out: Path, start: str = "", epochs: int = 20, side: int = 640) -> None:
    """Train a detector, save it, and print what it finds in the photos."""
    things = defaultdict(list)
    for photo, label, *corners in csv.reader((data / "boxes.csv").read_text(encoding="utf-8").splitlines()[1:]):
        things[photo].append((label, [float(value) for value in corners]))
    labels = sorted({label for found in things.values() for label, _ in found})
    photos = list(things)
    model = detector(labels, start, side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in (photos[i : i + 4] for i in range(0, len(photos), 4)):
            images = [to_tensor(read_image(data / photo)) for photo in batch]
            loss = sum(model(images, [target(things[photo], labels) for photo in batch]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch} of {epochs}: loss {sum(losses) / len(losses):.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"labels": labels, "state_dict": model.state_dict()}, out)

    model.eval()
    for photo in photos:
        with torch.no_grad():
            (answer,) = model([to_tensor(read_image(data / photo))])
        for box, label, score in zip(answer["boxes"], answer["labels"], answer["scores"], strict=True):
            print(photo, labels[label - 1], f"{score:.2f}", *box.round().int().tolist())


if __name__ == "__main__":
    typer.run(main)
