"""What is wrong with photos is found before training, and near-duplicates stay on one side of a split."""

import itertools
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ghost_resnet import hygiene
from ghost_resnet.data import PhotoFile, Photos
from ghost_resnet.errors import DataError
from ghost_resnet.hygiene import (
    find_problems,
    group_near_duplicates,
    near_duplicates,
    perceptual_hashes,
    split_photos,
)


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


def test_near_duplicates_are_those_within_four_bits_and_no_others() -> None:
    hashes = np.array([0, 0b1111, 0b11111, 2**63], np.uint64)
    assert near_duplicates(hashes[0], hashes).tolist() == [True, True, False, True]
    assert near_duplicates(hashes[1], hashes).tolist() == [True, True, True, False]


class Hashed:
    """Photos that are nothing but their hashes, in place of files."""

    def __init__(self, hashes: list[int], targets: list[int], classes: int = 3) -> None:
        paths = tuple(Path(f"{index}.jpg") for index in range(len(hashes)))
        self.photos = Photos(paths, tuple(targets), tuple("abcdef"[:classes]))
        self.hash_of = dict(zip(paths, hashes, strict=True))

    def __call__(self, paths: tuple[PhotoFile, ...]) -> npt.NDArray[np.uint64]:
        return np.array([self.hash_of[path] for path in paths if isinstance(path, Path)], np.uint64)


def differ(left: int, right: int) -> int:
    return (left ^ right).bit_count()


# Chains of near-duplicates: the bits of each hash are few, and so are the hashes.
HASHES = st.lists(st.integers(0, 63), max_size=8).map(lambda bits: sum(1 << bit for bit in set(bits)))
POOLS = st.lists(HASHES, min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(pool=POOLS, picks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=2, max_size=12))
def test_groups_copies_and_leaks_are_those_that_comparing_every_pair_finds(
    pool: list[int], picks: list[tuple[int, int]]
) -> None:
    hashes, targets = [pool[i % len(pool)] for i, _ in picks], [target for _, target in picks]
    everything = range(len(hashes))

    groups = [{i} for i in everything]
    for i, j in itertools.combinations(everything, 2):
        if differ(hashes[i], hashes[j]) <= 4 and groups[i] is not groups[j]:
            groups[i] |= groups[j]
            for k in groups[j]:
                groups[k] = groups[i]
    number = group_near_duplicates(np.array(hashes, np.uint64))
    assert [{j for j in everything if number[j] == number[i]} for i in everything] == groups

    source = Hashed(hashes, targets)
    half = len(hashes) // 2
    train, val = source.photos.subset(everything[:half]), source.photos.subset(everything[half:])
    copies = [
        (i, j) for i, j in itertools.combinations(range(half), 2) if hashes[i] == hashes[j] and targets[i] != targets[j]
    ]
    leaks = [(i, j) for i in everything[half:] for j in range(half) if differ(hashes[i], hashes[j]) <= 4]
    expected = []
    if copies:
        expected.append(
            f"{len(copies)} pairs of the same photo in two classes, {copies[0][0]}.jpg and {copies[0][1]}.jpg first"
        )
    if leaks:
        expected.append(
            f"{len({i for i, _ in leaks})} of {len(val)} validation photos look like a training photo, "
            f"{leaks[0][0]}.jpg like {leaks[0][1]}.jpg first"
        )
    with mock.patch.object(hygiene, "perceptual_hashes", source):
        problems = [problem for problem in find_problems(train, val) if "first: " in problem]
    assert [problem.partition(": ")[0] for problem in problems] == expected


def test_thousands_of_frames_of_a_few_things_take_little_memory() -> None:
    frames = [thing << 40 | 1 << bit for thing in (0xFF, 0xFF00, 0xFF0000, 0xFFFF00) for bit in (0, 1)] * 1000
    source = Hashed(frames, [0 if frame >> 40 & 0xFF00 else 1 for frame in frames], 2)
    mixed = Hashed([0] * 4000, [0, 1] * 2000, 2)
    tracemalloc.start()
    try:
        with mock.patch.object(hygiene, "perceptual_hashes", source):
            train, val = split_photos(source.photos, 0.5)
        with mock.patch.object(hygiene, "perceptual_hashes", mixed):
            problems = "\n".join(find_problems(mixed.photos, mixed.photos))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(train) == len(val) == 4000
    assert "4000000 pairs of the same photo in two classes, 0.jpg and 1.jpg first" in problems
    assert "4000 of 4000 validation photos look like a training photo, 0.jpg like 0.jpg first" in problems
    assert peak < 2**24
