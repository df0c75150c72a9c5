"""Sort a folder of photos by what they show, however many there are.

    python examples/sort_photos.py photos sorted runs/mine

Copies each photo to `sorted/CLASS/`, those that the classifier is unsure of to `sorted/unsure/`, and writes all answers
to `sorted/answers.csv`. Photos that can't be read are named there, with the reason, and stop nothing.
"""

import csv
import shutil
from pathlib import Path

import typer

from ghost_resnet import GarbageClassifier
from ghost_resnet.data import find_images
from ghost_resnet.files import file_name


def main(photos: Path, out: Path, model: str, unsure_below: float = 0.5) -> None:
    """Copy each photo to a folder named after its class."""
    classifier = GarbageClassifier.from_pretrained(model)
    paths = list(find_images(photos))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["photo", "label", "score", "error"])
        for path, answer in zip(paths, classifier.predict_stream(paths), strict=True):  # lazy: memory stays small
            name = path.relative_to(photos)
            rows.writerow([name.as_posix(), answer.label, f"{answer.score:.3f}", answer.error or ""])
            if not answer.error:
                target = out / (file_name(answer.label) if answer.score >= unsure_below else "unsure") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)


if __name__ == "__main__":
    typer.run(main)
