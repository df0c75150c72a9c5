"""What can be wrong with a set of photos, found before training starts."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt

from .data import PhotoFile, Photos, read_image
from .errors import DataError, UnreadableImageError

logger = logging.getLogger(__name__)

NEAR = 4
"""Photos whose 64-bit perceptual hashes differ in at most so many bits count as near-duplicates."""
FEW = 10
"""Classes with fewer photos than this are warned about."""
IMBALANCE = 10
"""Warn where the largest class has more than so many times the photos of the smallest."""


def perceptual_hashes(paths: Sequence[PhotoFile]) -> npt.NDArray[np.uint64]:
    """The 64-bit perceptual hash (DCT) of each photo.

    Raises:
        DataError: Some photos can't be read; all of them are named.
    """
    changed = [path.stat().st_mtime_ns if isinstance(path, Path) else 0 for path in paths]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash_file, paths, changed))
    if errors := [item for item in hashes if isinstance(item, UnreadableImageError)]:
        raise DataError(
            f"{len(errors)} of {len(paths)} photos can't be read; repair or remove them:\n"
            + "\n".join(map(str, errors))
        )
    return np.array(hashes, np.uint64)


@lru_cache(2**17)  # splitting and looking for problems hash the same photos
def _hash_file(path: PhotoFile, changed: int) -> np.uint64 | UnreadableImageError:
    try:
        bits = imagehash.phash(read_image(path, min_side=64)).hash
        return np.packbits(bits.ravel()).view(np.uint64)[0]
    except UnreadableImageError as error:
        return error


def near_duplicates(photo: np.uint64, others: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the others are near-duplicates of a photo, all given as their hashes."""
    return np.bitwise_count(others ^ photo) <= NEAR


def group_near_duplicates(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """The number of each photo's group, which near-duplicates share, and theirs, and so on."""
    distinct, which = np.unique(hashes, return_inverse=True)
    group, left = np.arange(len(distinct)), np.arange(len(distinct))
    while len(left):
        first, left = left[0], left[1:]
        reached = [first]
        while reached:
            near = near_duplicates(distinct[reached.pop()], distinct[left])
            group[left[near]] = first
            reached.extend(left[near])
            left = left[~near]
    return group[which]


def split_photos(photos: Photos, val_fraction: float, seed: int = 0) -> tuple[Photos, Photos]:
    """Split photos for training and validation, class by class, with near-duplicates on the same side.

    Photos of one object taken in a row look alike; were they on both sides, the validation figures would
    flatter the network.

    Args:
        photos: All photos.
        val_fraction: Share of each class to validate on, in (0, 1).
        seed: Decides which.

    Raises:
        DataError: A class has too few different photos to give one to either side.
    """
    group_of = group_near_duplicates(perceptual_hashes(photos.paths))
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(photos)):
        members[int(group_of[index])].append(int(index))
    wanted = {c: max(1, round(n * val_fraction)) for c, n in enumerate(photos.counts.values()) if n}
    taken = dict.fromkeys(wanted, 0)
    chosen: set[int] = set()
    for group in members.values():
        counts = np.bincount([photos.targets[i] for i in group], minlength=len(photos.classes))
        present = np.flatnonzero(counts).tolist()
        if all(taken[c] + counts[c] <= wanted[c] for c in present):
            chosen.update(group)
            for c in present:
                taken[c] += int(counts[c])
    if short := [photos.classes[c] for c in wanted if not 0 < taken[c] < photos.counts[photos.classes[c]]]:
        raise DataError(
            f"too few different photos of {', '.join(short)} to set some aside for validation: "
            "add photos, or name a validation list"
        )
    everything = range(len(photos))
    return photos.subset([i for i in everything if i not in chosen]), photos.subset(sorted(chosen))


def find_problems(train: Photos, val: Photos | None) -> list[str]:
    """Say in one sentence each what is suspect about the photos: leaks, contradictions, imbalance, too few."""
    problems = []
    counts = {name: n for name, n in train.counts.items() if n}
    if few := [name for name, n in counts.items() if n < FEW]:
        problems.append(f"fewer than {FEW} training photos of {', '.join(few)}: expect little, add photos")
    if max(counts.values()) > IMBALANCE * min(counts.values()):
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        problems.append(
            f"{counts[most]} training photos of {most} but {counts[least]} of {least}: "
            "set balance = 0.5 in the recipe, or add photos"
        )
    hashes = perceptual_hashes(train.paths)
    same: dict[int, list[int]] = defaultdict(list)
    for index, photo in enumerate(hashes.tolist()):
        same[photo].append(index)
    contradictions = [copies for copies in same.values() if len({train.targets[i] for i in copies}) > 1]
    if contradictions:
        pairs = sum(_pairs_of_two_classes([train.targets[i] for i in copies]) for copies in contradictions)
        i = contradictions[0][0]
        j = next(j for j in contradictions[0] if train.targets[j] != train.targets[i])
        problems.append(
            f"{pairs} pairs of the same photo in two classes, {train.paths[i]} and "
            f"{train.paths[j]} first: one label is wrong"
        )
    if val:
        alike = (near_duplicates(photo, hashes) for photo in perceptual_hashes(val.paths))
        leaks = [(i, int(mask.argmax())) for i, mask in enumerate(alike) if mask.any()]
        if leaks:
            i, j = leaks[0]
            problems.append(
                f"{len(leaks)} of {len(val)} validation photos look like a training photo, {val.paths[i]} like "
                f"{train.paths[j]} first: the validation figures will flatter"
            )
    return problems


def _pairs_of_two_classes(targets: Sequence[int]) -> int:
    return (len(targets) ** 2 - sum(count**2 for count in Counter(targets).values())) // 2
