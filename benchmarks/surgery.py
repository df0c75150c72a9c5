"""How much of a trained ResNet is left after each step of the surgery.

    python benchmarks/surgery.py --teacher runs/resnet50 --data ../shared/data/trashnet \
        --train-list ../shared/data/splits/report-train.txt --val-list ../shared/data/splits/report-val.txt \
        --unlabelled ../shared/data/imagenet-sample --out runs/surgery

prints a Markdown table with a row for the ResNet, for the conversion by weights alone, with calibration on a few and
on many photos, and for each stage of distillation, as each is done. Calibration and distillation see the photos of
`--train-list`, not their classes. Columns: top-1 on `--val-list`; the share of photos of which the Ghost-ResNet says
what the ResNet says, and the divergence KL(ResNet, Ghost-ResNet) in nats, on `--val-list` and on the photos of
`--unlabelled`, which nothing is fitted to; seconds that the step took. `--out` keeps the result.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghost_resnet.data import Photos, Preprocessing, find_images
from ghost_resnet.distillation import distill, photo_batches
from ghost_resnet.hub import load_model, save_pretrained
from ghost_resnet.surgery import from_resnet


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_model(args.teacher).to(device)
    labels = teacher.pretrained_cfg["label_names"]
    preprocessing = Preprocessing.from_config(
        {**teacher.pretrained_cfg, **({"input_size": (3, args.size, args.size)} if args.size else {})}
    )
    train = Photos.from_folder(args.data, splits=[args.train_list], classes=labels).paths
    val = Photos.from_folder(args.data, splits=[args.val_list], classes=labels)
    unlabelled = list(itertools.islice(find_images(args.unlabelled), args.limit))
    crops = photo_batches(train, preprocessing, args.batch_size, augment=True)

    def logits(network: nn.Module, paths: list[Path] | tuple[Path, ...]) -> Tensor:
        network.eval()
        with torch.inference_mode():
            batches = photo_batches(paths, preprocessing, args.batch_size)
            return torch.cat([network(images.to(device)).cpu() for images, _ in batches])

    expected = [logits(teacher, paths) for paths in (val.paths, unlabelled)]

    def row(name: str, step: Callable[[], nn.Module]) -> nn.Module:
        started = time.monotonic()
        network = step()
        seconds = time.monotonic() - started
        got = [logits(network, paths) for paths in (val.paths, unlabelled)]
        top1 = (got[0].argmax(1) == torch.tensor(val.targets)).float().mean()
        cells = [f"{value:.4f}" for pair in map(compare, got, expected) for value in pair]
        print(f"| {name} | {top1:.2%} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
        return network

    def calibrated(count: int) -> nn.Module:
        some = [train[i] for i in torch.randperm(len(train))[:count]]
        return from_resnet(teacher, args.arch, photo_batches(some, preprocessing, args.batch_size))

    def distilled(block_epochs: int, logit_epochs: int) -> nn.Module:
        distill(student, teacher, crops, block_epochs=block_epochs, logit_epochs=logit_epochs)
        return student

    print(f"{len(train)} photos to fit, {len(val)} val, {len(unlabelled)} unlabelled; {preprocessing}; {device}\n")
    print("| step | top-1 val | agreement val | KL val | agreement unlabelled | KL unlabelled | seconds |")
    print("|---|---|---|---|---|---|---|")
    row("ResNet", lambda: teacher)
    row("weights only", lambda: from_resnet(teacher, args.arch))
    row("calibration, 8 photos", lambda: calibrated(8))
    student = row(f"calibration, {args.calibration} photos", lambda: calibrated(args.calibration))
    row(f"distillation, {args.block_epochs} epochs of blocks", lambda: distilled(args.block_epochs, 0))
    row(f"and {args.logit_epochs} epochs end to end", lambda: distilled(0, args.logit_epochs))
    if args.out:
        save_pretrained(student, args.out, labels=labels, preprocessing=vars(preprocessing))


def compare(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Share of rows with the same maximum, and mean divergence."""
    agreement = (got.argmax(1) == expected.argmax(1)).float().mean()
    divergence = F.kl_div(got.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean")
    return agreement.item(), divergence.item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher", required=True, help="run folder of a trained resnet26, 50, 101 or 152")
    parser.add_argument("--data", required=True, type=Path, help="folder of class folders")
    parser.add_argument("--train-list", required=True, type=Path)
    parser.add_argument("--val-list", required=True, type=Path)
    parser.add_argument("--unlabelled", required=True, type=Path, help="folder of other photos")
    parser.add_argument("--arch", default="ghost_resnet50")
    parser.add_argument("--calibration", type=int, default=256, help="photos to calibrate with")
    parser.add_argument("--block-epochs", type=int, default=4)
    parser.add_argument("--logit-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, help="side of the input, if not the teacher's")
    parser.add_argument("--limit", type=int, help="take so many unlabelled photos")
    parser.add_argument("--out", type=Path, help="folder for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
