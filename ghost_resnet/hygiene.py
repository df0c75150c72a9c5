"""What can be wrong with a set of photos, found before training starts."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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


def near_duplicates(
    hashes: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64], distance: int = NEAR
) -> npt.NDArray[np.intp]:
    """Index pairs `(n, 2)` of photos whose hashes differ in at most `distance` bits."""
    pairs, rows = [], max(1, 2**24 // len(others))  # 128 MB at a time
    for start in range(0, len(hashes), rows):
        different = np.bitwise_count(hashes[start : start + rows, None] ^ others[None, :])
        found = np.argwhere(different <= distance)
        found[:, 0] += start
        pairs.append(found)
    return np.concatenate(pairs)


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
    hashes = perceptual_hashes(photos.paths)
    pairs = near_duplicates(hashes, hashes)
    links = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(photos), len(photos)))
    _, group_of = connected_components(links, directed=False)
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
    same = near_duplicates(hashes, hashes, 0)
    contradictions = [(i, j) for i, j in same if i < j and train.targets[i] != train.targets[j]]
    if contradictions:
        i, j = contradictions[0]
        problems.append(
            f"{len(contradictions)} pairs of the same photo in two classes, {train.paths[i]} and "
            f"{train.paths[j]} first: one label is wrong"
        )
    if val:
        leaks = near_duplicates(perceptual_hashes(val.paths), hashes)
        leaking = len(np.unique(leaks[:, 0]))
        if leaking:
            i, j = leaks[0]
            problems.append(
                f"{leaking} of {len(val)} validation photos look like a training photo, {val.paths[i]} like "
                f"{train.paths[j]} first: the validation figures will flatter"
            )
    return problems
