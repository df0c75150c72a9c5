"""What a classifier says of images that show none of its classes.

    python benchmarks/strangers.py --model ghost_resnet50.trashnet --photos ../shared/data/imagenet-sample \
        --data ../shared/data/trashnet --list ../shared/data/splits/report-val.txt

prints a Markdown table with the answer and score for grey noise, coloured noise, a blank white page, a black image and
a photo of a dog, then a second one: for several thresholds, the share of the photos of `--photos` (other things) that
are answered with at least that score, beside the share of the photos of `--list` (its classes) that are, and how many
of those answers are right. A threshold is good if the first share is small and the second large.
"""

import argparse
from pathlib import Path

import numpy as np

from ghost_resnet import GarbageClassifier
from ghost_resnet.data import Photos, find_images

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as in `ghost-resnet predict`")
    parser.add_argument("--photos", required=True, type=Path, help="folder of photos of other things")
    parser.add_argument("--data", required=True, type=Path, help="folder of class folders")
    parser.add_argument("--list", required=True, type=Path, help="split file with photos of its classes")
    parser.add_argument("--dog", default="golden_retriever", help="part of the name of the dog's photo")
    args = parser.parse_args()
    classifier = GarbageClassifier.from_pretrained(args.model)

    rng = np.random.default_rng(0)
    others = list(find_images(args.photos))
    dog = next(path for path in others if args.dog in path.name)
    images = {
        "grey noise": rng.integers(0, 256, (384, 512), np.uint8),
        "coloured noise": rng.integers(0, 256, (384, 512, 3), np.uint8),
        "a blank white page": np.full((384, 512, 3), 255, np.uint8),
        "a black image": np.zeros((384, 512, 3), np.uint8),
        f"a dog ({dog.stem})": dog,
    }
    print("| image | answer | score |\n|---|---|---:|")
    for name, answer in zip(images, classifier.predict(list(images.values())), strict=True):
        print(f"| {name} | {answer.label} | {answer.score:.3f} |")

    known = Photos.from_folder(args.data, splits=[args.list], classes=classifier.labels)
    answers = classifier.predict(list(known.paths))
    truth = [known.classes[target] for target in known.targets]
    right = np.array([answer.label == label for answer, label in zip(answers, truth, strict=True)])
    own = np.array([answer.score for answer in answers])
    strange = np.array([answer.score for answer in classifier.predict(others) if not answer.error])
    print(f"\n| threshold | of {len(strange)} other photos | of {len(own)} photos of its classes | of these, right |")
    print("|---:|---:|---:|---:|")
    for threshold in THRESHOLDS:
        answered = own >= threshold
        rightly = f"{right[answered].mean():.1%}" if answered.any() else "-"
        print(f"| {threshold} | {(strange >= threshold).mean():.1%} | {answered.mean():.1%} | {rightly} |")


if __name__ == "__main__":
    main()
