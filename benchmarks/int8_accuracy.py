"""What int8 costs: answers of exported networks beside those of the network that they come from, on this CPU.

    python benchmarks/int8_accuracy.py --model ghost_resnet50.trashnet --exported onnx8 openvino8 \
        --data ../shared/data/trashnet --list ../shared/data/splits/report-val.txt \
        --photos ../shared/data/imagenet-sample --limit 250

prints a Markdown table with a row for each: top-1 accuracy on the photos of `--list`; and there and on `--limit` photos
of `--photos` (other things, taken evenly) the share of photos with the same most likely class as the original's, and
the mean divergence (Kullback-Leibler, in nats) of the probabilities from the original's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ghost_resnet import GarbageClassifier
from ghost_resnet.data import Photos, find_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as in `ghost-resnet predict`")
    parser.add_argument("--exported", required=True, nargs="+", help="folders made by `ghost-resnet export`")
    parser.add_argument("--data", required=True, type=Path, help="folder of class folders")
    parser.add_argument("--list", required=True, type=Path, help="split file with photos of its classes")
    parser.add_argument("--photos", required=True, type=Path, help="folder of photos of other things")
    parser.add_argument("--limit", type=int, default=250, help="how many of these")
    args = parser.parse_args()
    found = list(find_images(args.photos))
    others = found[:: max(1, len(found) // args.limit)][: args.limit]
    original = GarbageClassifier.from_pretrained(args.model)
    known = Photos.from_folder(args.data, splits=[args.list], classes=original.labels)
    targets = torch.tensor(known.targets)
    expected = [log_probabilities(original, paths) for paths in (known.paths, others)]

    print(f"| network | top-1, {len(targets)} photos | agreement, divergence | {len(others)} others: both |")
    print("|---|---:|---|---|")
    print(f"| {args.model} | {accuracy(expected[0], targets):.3f} | | |")
    for name in args.exported:
        classifier = GarbageClassifier.from_pretrained(name)
        got = [log_probabilities(classifier, paths) for paths in (known.paths, others)]
        cells = [f"{agreement(a, b):.3f}, {divergence(a, b):.4f}" for a, b in zip(got, expected, strict=True)]
        print(f"| {name} | {accuracy(got[0], targets):.3f} | {cells[0]} | {cells[1]} |", flush=True)


def log_probabilities(classifier: GarbageClassifier, paths: Sequence[Path]) -> Tensor:
    logits = torch.stack([torch.as_tensor(row) for row in classifier.logits_stream(paths)])
    return (logits / classifier.temperature).log_softmax(1)


def accuracy(answers: Tensor, targets: Tensor) -> float:
    return float((answers.argmax(1) == targets).float().mean())


def agreement(answers: Tensor, expected: Tensor) -> float:
    return accuracy(answers, expected.argmax(1))


def divergence(answers: Tensor, expected: Tensor) -> float:
    return float(kl_div(answers, expected, reduction="batchmean", log_target=True))


if __name__ == "__main__":
    main()
