"""What is wrong with photos is found before training, and near-duplicates stay on one side of a split."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ghost_resnet.data import Photos
from ghost_resnet.errors import DataError
from ghost_resnet.hygiene import find_problems, near_duplicates, perceptual_hashes, split_photos


def draw(path: Path, seed: int, shift: int = 0, quality: int = 95) -> None:
    """A picture of a few shapes that the seed decides; a shift or a low quality makes it a near-duplicate."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 72), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = rng.integers(0, 60, 4).tolist()
        box = (x + shift, y, x + shift + width + 8, y + height + 8)
        pen.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty objects, each of which was photographed three times."""
    root = tmp_path_factory.mktemp("photos")
    for c, label in enumerate(("bottle", "can")):
        for thing in range(20):
            for shot in range(3):
                draw(root / label / f"{thing:02}-{shot}.jpg", 100 * c + thing, quality=95 - 30 * shot)
    return root


def things(photos: Photos) -> set[tuple[str, str]]:
    return {(path.parent.name, path.name[:2]) for path in photos.paths}


@pytest.mark.parametrize("seed", range(3))
def test_a_split_keeps_near_duplicates_together_and_every_class_in_proportion(folder: Path, seed: int) -> None:
    photos = Photos.from_folder(folder)
    train, val = split_photos(photos, 0.2, seed)
    assert not things(train) & things(val)
    assert sorted(train.paths + val.paths) == sorted(photos.paths)
    assert train.classes == val.classes == photos.classes
    assert all(9 <= count <= 12 for count in val.counts.values()), val.counts
    again = split_photos(photos, 0.2, seed)
    assert again == (train, val)
    assert split_photos(photos, 0.2, seed + 10) != (train, val)


def test_a_class_whose_photos_are_all_alike_can_not_be_split(tmp_path: Path, folder: Path) -> None:
    for i in range(6):
        draw(tmp_path / "same" / f"{i}.jpg", 1)
        draw(tmp_path / "different" / f"{i}.jpg", 10 + i)
    with pytest.raises(DataError, match="too few different photos of same"):
        split_photos(Photos.from_folder(tmp_path), 0.2)


def test_all_unreadable_photos_are_named_before_training(tmp_path: Path) -> None:
    draw(tmp_path / "good" / "1.jpg", 1)
    for name in ("2.jpg", "3.jpg"):
        (tmp_path / "good" / name).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2 of 3 photos can't be read(.|\n)*2\.jpg(.|\n)*3\.jpg"):
        perceptual_hashes(Photos.from_folder(tmp_path).paths)


def test_leaks_contradictions_imbalance_and_small_classes_are_each_said_in_a_sentence(tmp_path: Path) -> None:
    for i in range(33):
        draw(tmp_path / "many" / f"{i:02}.jpg", i)
    for i in range(3):
        draw(tmp_path / "few" / f"{i}.jpg", 50 + i)
    assert find_problems(Photos.from_folder(tmp_path).subset(range(3, 36)), None) == []

    (tmp_path / "few" / "2.jpg").write_bytes((tmp_path / "many" / "07.jpg").read_bytes())
    draw(tmp_path / "leak" / "many" / "copy.jpg", 20, quality=60)
    everything = Photos.from_folder(tmp_path, classes=("few", "leak", "many"))
    train = everything.subset([i for i, p in enumerate(everything.paths) if "leak" not in p.parts])
    val = everything.subset([i for i, p in enumerate(everything.paths) if "leak" in p.parts])
    problems = "\n".join(find_problems(train, val))
    assert "fewer than 10 training photos of few" in problems
    assert "33 training photos of many but 3 of few" in problems
    assert "1 pairs of the same photo in two classes" in problems and "2.jpg" in problems
    assert "1 of 1 validation photos look like a training photo" in problems and "20.jpg" in problems


def test_near_duplicates_are_those_within_the_distance_and_no_others() -> None:
    hashes = np.array([0, 0b1111, 0b11111, 2**63], np.uint64)
    found = {(int(i), int(j)) for i, j in near_duplicates(hashes, hashes, 4) if i < j}
    assert found == {(0, 1), (1, 2), (0, 3)}
    many = np.arange(3000, dtype=np.uint64) << np.uint64(20)
    naive = {(i, j) for i in range(0, 3000, 500) for j in range(3000) if (int(many[i]) ^ int(many[j])).bit_count() <= 2}
    assert {(int(i), int(j)) for i, j in near_duplicates(many, many, 2) if i % 500 == 0} == naive
