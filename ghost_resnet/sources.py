"""Where labelled photos come from: folders, tables, Hugging Face datasets, WebDataset shards.

Nothing here imports torch before a Hugging Face dataset is opened, which timm does.
"""

import csv
import logging
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .data import IMAGE_SUFFIXES, PackedPhoto, PhotoFile, Photos
from .errors import DataError
from .extras import require

logger = logging.getLogger(__name__)

TABLES = (".csv", ".parquet")
SHOWN = 10
"""So many of the things that are wrong are named."""


def load_photos(
    source: str | Path,
    *,
    splits: Sequence[str | Path] = (),
    val: str | Path | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Photos, Photos | None]:
    """Find labelled photos.

    Args:
        source: One of
            - a folder that holds one folder a class;
            - a `.csv` or `.parquet` file with the columns `path` (relative to the file) and `label`, and perhaps
              `split`, which says "train" or "val";
            - `hfds:NAME` or `hfds:NAME#SPLIT`: a Hugging Face dataset with the columns `image` and `label`, by its
              name on the hub or its folder; without SPLIT, "train". It is opened by timm's reader, and what
              the `datasets` library keeps in its own cache stays there;
            - `wds:SHARDS`: uncompressed WebDataset shards, a `.tar` file, a folder of them or a pattern with `*`.
              Each sample is a photo and a `.cls` file with its class; numbers are lines of the shards'
              `classnames.txt`, counted from 0, if there is one. Photos stay in the shards.
        splits: Of a folder only: split files to keep to.
        val: Validation photos: a split file of the folder, or another source.
        classes: Class names in the order wanted. None takes the labels, sorted.

    Returns:
        The photos, and the validation photos if `val` or the table's `split` names some.

    Raises:
        DataError: The photos are not as expected.
        MissingExtraError: The library that reads this source is not installed.
    """
    kind, _, name = str(source).partition(":")
    in_table = Path(source).suffix.lower() in TABLES and not Path(source).is_dir()
    if splits and (kind in ("hfds", "wds") or in_table):
        raise DataError(
            f"split files are for a folder of class folders, and {source} is none: "
            "use a table's column split, hfds:NAME#SPLIT, or other shards"
        )
    validation = None
    if kind == "hfds":
        photos = _from_hugging_face(name, classes)
    elif kind == "wds":
        photos = _from_shards(name, classes)
    elif in_table:
        photos, validation = _from_table(Path(source), classes)
    else:
        photos = Photos.from_folder(source, splits=splits, classes=classes)
    if val is None:
        return photos, validation
    if validation:
        raise DataError(f"{source} has validation photos in its column split: leave out {val}, or the column")
    if Path(source).is_dir() and Path(val).is_file() and Path(val).suffix.lower() not in TABLES:
        return photos, Photos.from_folder(source, splits=[val], classes=photos.classes)
    return photos, load_photos(val, classes=photos.classes)[0]


def _labelled(
    source: str | Path, files: Sequence[PhotoFile], labels: Sequence[str], classes: Sequence[str] | None
) -> Photos:
    """Photos of labels that are words."""
    if not files:
        raise DataError(f"no photos in {source}")
    if unlabelled := [str(file) for file, label in zip(files, labels, strict=True) if not label]:
        raise DataError(f"{source}: {_listing('photos have no label', unlabelled)}")
    order = tuple(classes) if classes is not None else tuple(sorted(set(labels)))
    if unknown := sorted(set(labels) - set(order)):
        raise DataError(
            f"{source} has the classes {', '.join(unknown)}, which are not among {', '.join(order)}: "
            "take a model that knows them, or remove these photos"
        )
    index = {label: i for i, label in enumerate(order)}
    return Photos(tuple(files), tuple(index[label] for label in labels), order)


def _listing(what: str, items: Sequence[str]) -> str:
    more = f"\nand {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {what}:\n" + "\n".join(items[:SHOWN]) + more


# Tables ---------------------------------------------------------------------------------------------------------------


def _from_table(path: Path, classes: Sequence[str] | None) -> tuple[Photos, Photos | None]:
    if not path.is_file():
        raise DataError(f"no table at {path}: expected a file with the columns path and label")
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    wrong, numbers = [], dict[Path, int]()
    for number, row in enumerate(rows, 1):
        file = path.parent / row["path"]
        if not row["path"] or not row["label"]:
            wrong.append(f"row {number}: no {'label' if row['path'] else 'path'}")
        elif row["split"] not in ("train", "val"):
            wrong.append(f"row {number}: split must be train or val, got {row['split']!r}")
        elif file in numbers:
            wrong.append(f"row {number}: {row['path']} is in row {numbers[file]} already")
        elif not file.is_file():
            wrong.append(f"row {number}: no file {file}")
        numbers.setdefault(file, number)
    if wrong:
        raise DataError(f"{path}: {_listing(f'of {len(rows)} rows are wrong', wrong)}")
    photos = _labelled(path, [path.parent / row["path"] for row in rows], [row["label"] for row in rows], classes)
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    val = [i for i, row in enumerate(rows) if row["split"] == "val"]
    return photos.subset(train), photos.subset(val) if val else None


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            return [_row(row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV file in UTF-8, got {error}") from error


def _read_parquet(path: Path) -> list[dict[str, str]]:
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        table = pq.read_table(path)
        _check_columns(path, table.column_names)
        columns = [name for name in ("path", "label", "split") if name in table.column_names]
        strings = {name: table.column(name).cast(pa.string()).to_pylist() for name in columns}
    except pa.ArrowException as error:
        raise DataError(f"{path}: expected a Parquet file with text in path and label, got {error}") from error
    return [_row(dict(zip(columns, values, strict=True))) for values in zip(*strings.values(), strict=True)]


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise DataError(f"{path} has no column {' and no '.join(missing)}, only {', '.join(columns) or 'none at all'}")


def _row(row: dict[str, Any]) -> dict[str, str]:
    split = row.get("split", "train")  # None is an empty cell, which is wrong
    return {"path": row["path"] or "", "label": (row["label"] or "").strip(), "split": (split or "").strip()}


# Hugging Face datasets ------------------------------------------------------------------------------------------------


def _from_hugging_face(name: str, classes: Sequence[str] | None) -> Photos:
    require("datasets", "data")  # timm prints something if it is missing
    from timm.data.readers import create_reader

    name, _, split = name.partition("#")
    source = f"hfds:{name}#{split or 'train'}"
    try:
        reader = create_reader(f"hfds/{name}", split=split or "train")
    except Exception as error:  # `datasets` raises anything
        raise DataError(f"{source} can't be opened: {error}") from error
    columns = ", ".join(reader.dataset.column_names)  # timm adds an empty column image if there is none
    if "label" not in reader.dataset.column_names:
        raise DataError(f"{source}: expected a column label, found {columns}")
    names = {index: label for label, index in reader.class_to_idx.items()}
    labels = [
        names.get(target, "") if names else "" if target is None else str(target).strip()
        for target in reader.iter_targets()
    ]
    files: list[PhotoFile] = []
    for index, row in enumerate(reader.dataset):
        image = row["image"] or {}
        data, path = image.get("bytes"), image.get("path") or ""
        if not (data or path):
            raise DataError(
                f"{source}: expected a column image with one in each row, row {index} of {columns} has none"
            )
        if data:
            called = f"{source}/{index:06}{'-' if path else ''}{PurePosixPath(path).name}"
            files.append(PackedPhoto(called, len(data), partial(_row_bytes, reader.dataset, index)))
        else:
            files.append(Path(path))
    return _labelled(source, files, labels, classes)


def _row_bytes(dataset: Any, index: int) -> bytes:
    return dataset[index]["image"]["bytes"]


# WebDataset shards ----------------------------------------------------------------------------------------------------


def _from_shards(pattern: str, classes: Sequence[str] | None) -> Photos:
    path = Path(pattern)
    found = path.glob("*.tar") if path.is_dir() else path.parent.glob(path.name)
    shards = [path] if path.is_file() else sorted(found)
    if not shards:
        raise DataError(f"no shards at {pattern}: expected a .tar file, a folder of them, or a pattern with *")
    files: list[PhotoFile] = []
    labels: list[str] = []
    for shard in shards:
        names_file = shard.parent / "classnames.txt"
        names = names_file.read_text(encoding="utf-8").splitlines() if names_file.is_file() else []
        photos, classes_of = _read_shard(shard)
        for key, photo in photos.items():
            label = classes_of.get(key, "")
            if names and label.isdecimal():
                if int(label) >= len(names):
                    raise DataError(f"{photo}: class {label} is beyond the {len(names)} lines of {names_file}")
                label = names[int(label)]
            files.append(photo)
            labels.append(label)
    return _labelled(f"wds:{pattern}", files, labels, classes)


def _read_shard(shard: Path) -> tuple[dict[str, PackedPhoto], dict[str, str]]:
    """Photos and classes by the samples' keys: the names of the members up to the first dot of the last part."""
    photos: dict[str, PackedPhoto] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as archive:  # uncompressed, so that photos can be read where they are
            for member in archive:
                folder, slash, last = member.name.rpartition("/")
                stem, dot, extension = last.partition(".")
                key, suffix = folder + slash + stem, (dot + extension).lower()
                if not member.isreg() or not stem:
                    continue
                if suffix in IMAGE_SUFFIXES:
                    if key in photos:
                        raise DataError(f"{shard} has more than one photo of the sample {key}")
                    load = partial(_part_bytes, shard, member.offset_data, member.size)
                    photos[key] = PackedPhoto(f"{shard}/{member.name}", member.size, load)
                elif suffix == ".cls":
                    content = archive.extractfile(member)
                    labels[key] = content.read().decode().strip() if content else ""
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{shard}: expected an uncompressed .tar file of photos and .cls files, got {error}") from error
    return photos, labels


def _part_bytes(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
