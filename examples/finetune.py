"""Fine-tune on your own photos, and test on some that training has never seen.

    python examples/finetune.py my_photos runs/mine

`my_photos` holds one folder of photos a class. `runs/mine` will hold the classifier and a report to look at
(report.html), and beside it lie the lists of the photos that were trained and tested on.
"""

import random
from pathlib import Path

import typer

import ghost_resnet
from ghost_resnet.data import find_images
from ghost_resnet.training import Progress


def main(photos: Path, out: Path, recipe: str = "default", epochs: int = 12, test_fraction: float = 0.2) -> None:
    """Train on most of the photos, test on the rest."""
    names = [path.relative_to(photos).as_posix() for path in find_images(photos)]
    random.Random(0).shuffle(names)
    tested = round(test_fraction * len(names))
    train_list, test_list = out.with_name(f"{out.name}-train.txt"), out.with_name(f"{out.name}-test.txt")
    out.parent.mkdir(parents=True, exist_ok=True)
    train_list.write_text("\n".join(names[tested:]), encoding="utf-8")
    test_list.write_text("\n".join(names[:tested]), encoding="utf-8")

    # Of the training photos, finetune holds out a part of its own to choose the best epoch.
    run = ghost_resnet.finetune(
        photos, out, recipe, splits=[train_list], overrides={"epochs": epochs}, on_progress=show
    )
    classifier = ghost_resnet.GarbageClassifier.from_pretrained(run.folder)
    print(ghost_resnet.evaluate(classifier, photos, splits=[test_list]).report())
    answers = classifier.predict_stream(photos / name for name in names[:tested])
    for name, answer in zip(names[:tested], answers, strict=True):
        if answer.label != Path(name).parts[0]:
            print(f"{name} was taken for {answer.label} ({answer.score:.2f})")


def show(progress: Progress) -> None:
    """Print a line at the end of each epoch."""
    if progress.epoch_done:
        print(f"epoch {progress.epoch + 1} of {progress.epochs}: loss {progress.loss:.3f}")


if __name__ == "__main__":
    typer.run(main)
