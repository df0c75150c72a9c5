"""Labelled photos from tables, Hugging Face datasets and shards are the same photos as from a folder."""

import csv
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawing import draw, encode, write_folder
from PIL import Image
from typer.testing import CliRunner

from ghost_resnet import cli, evaluate, finetune
from ghost_resnet.data import PackedPhoto, PhotoDataset, Photos, read_image
from ghost_resnet.errors import DataError, MissingExtraError, RunError
from ghost_resnet.hygiene import find_problems, perceptual_hashes, split_photos
from ghost_resnet.recipes import Recipe
from ghost_resnet.sources import load_photos

COUNTS = {"metal": 6, "glass": 5}
TINY = Recipe(
    arch="ghost_resnet50_s4",
    model_args={"layers": [1, 1, 1, 1]},
    img_size=32,
    epochs=1,
    batch_size=5,
    val_fraction=0.4,
    precision="fp32",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", COUNTS)


def rows_of(folder: Path, base: Path) -> list[dict[str, str]]:
    paths = sorted(folder.glob("*/*.jpg"))
    return [{"path": path.relative_to(base).as_posix(), "label": path.parent.name} for path in paths]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_csv(folder: Path) -> str:
    return str(write_csv(folder.parent / "photos.csv", rows_of(folder, folder.parent)))


def as_parquet(folder: Path) -> str:
    return str(write_parquet(folder.parent / "photos.parquet", rows_of(folder, folder.parent)))


def as_shards(folder: Path) -> str:
    names = ["zinc", "metal", "glass"]
    members: dict[str, bytes] = {}
    for number, path in enumerate(sorted(folder.glob("*/*.jpg"))):
        members[f"{number:03}.jpg"] = path.read_bytes()
        members[f"{number:03}.cls"] = b"%d\n" % names.index(path.parent.name)
        members[f"{number:03}.json"] = b"{}"
    halves = [dict(list(members.items())[:15]), dict(list(members.items())[15:])]
    for number, half in enumerate(halves):
        write_shard(folder.parent / "shards" / f"train-{number}.tar", half)
    (folder.parent / "shards" / "classnames.txt").write_text("\n".join(names))
    return f"wds:{folder.parent / 'shards'}"


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library `datasets` with a cache of its own and no network."""
    if request.node.get_closest_marker("ecosystem"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def as_hf_folder(folder: Path) -> str:
    return f"hfds:{folder}"


def as_hf_parquet(folder: Path, labels: str = "numbers") -> str:
    import datasets

    paths = sorted(folder.glob("*/*.jpg"))
    kind = datasets.ClassLabel(names=["zinc", "metal", "glass"]) if labels == "numbers" else datasets.Value("string")
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [path.parent.name for path in paths],
    }
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    out = folder.parent / "hub"
    out.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(out / "train-0.parquet"))
    return f"hfds:{out}"


SOURCES = [
    pytest.param(as_csv, id="csv"),
    pytest.param(as_shards, id="shards"),
    pytest.param(as_parquet, id="parquet", marks=pytest.mark.ecosystem),
    pytest.param(as_hf_folder, id="hf-folder", marks=pytest.mark.ecosystem),
    pytest.param(as_hf_parquet, id="hf-parquet", marks=pytest.mark.ecosystem),
    pytest.param(lambda folder: as_hf_parquet(folder, "strings"), id="hf-strings", marks=pytest.mark.ecosystem),
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_photos_and_labels_as_the_folder(make: Callable[[Path], str], folder: Path) -> None:
    expected = Photos.from_folder(folder)
    photos, val = load_photos(make(folder))
    assert val is None
    assert photos.classes == ("glass", "metal") and photos.targets == expected.targets
    for path, same in zip(photos.paths, expected.paths, strict=True):
        assert read_image(path).tobytes() == read_image(same).tobytes()
        assert (path.size if isinstance(path, PackedPhoto) else path.stat().st_size) == same.stat().st_size
    assert len(set(photos.names)) == len(photos)
    np.testing.assert_array_equal(perceptual_hashes(photos.paths), perceptual_hashes(expected.paths))
    assert load_photos(make_again(make, folder), classes=["metal", "tin", "glass"])[0].targets == tuple(
        {0: 2, 1: 0}[target] for target in expected.targets
    )


def make_again(make: Callable[[Path], str], folder: Path) -> str:
    for path in folder.parent.glob("hub/*"):
        path.unlink()
        path.parent.rmdir()
    return make(folder)


@pytest.mark.parametrize("make", [SOURCES[1], SOURCES[4]])
def test_a_model_is_trained_resumed_and_measured_from_every_source(
    make: Callable[[Path], str], folder: Path, tmp_path: Path
) -> None:
    source = make(folder)
    run = finetune(source, tmp_path / "run", TINY)
    finetune(source, tmp_path / "run", TINY, resume=True)  # these are the same photos
    assert run.metrics.photos == 4 and (run.folder / "report.html").is_file()
    assert evaluate(run.folder, source).top1 == evaluate(run.folder, folder).top1


def test_packed_photos_are_split_hashed_cached_and_named_like_files(folder: Path) -> None:
    photos, _ = load_photos(as_shards(folder))
    shard = folder.parent / "shards" / "train-0.tar"
    assert str(photos.paths[0]) == f"{shard}/000.jpg" and photos.names[0] == "train-0.tar/000.jpg"
    train, val = split_photos(photos, 0.4)
    assert set(train.paths) | set(val.paths) == set(photos.paths)
    leaking = find_problems(train, photos.subset([photos.paths.index(train.paths[0])]))
    assert any("1 of 1 validation photos look like a training photo" in problem for problem in leaking)
    cached = PhotoDataset(photos, None, cache_side=16)
    assert cached.read(3).size == Image.fromarray(np.asarray(PhotoDataset(photos, None).read(3))).resize((19, 16)).size
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 11 photos can't be read(.|\n)*train-0.tar/000.jpg: "):
        PhotoDataset(photos, None, cache_side=16)


def test_other_photos_in_a_shard_are_noticed_on_resume(folder: Path, tmp_path: Path) -> None:
    source = as_shards(folder)
    finetune(source, tmp_path / "run", TINY)
    for path in folder.glob("glass/*"):
        path.write_bytes(encode(draw(40, 40, seed=70 + int(path.stem[-1])), "JPEG"))
    as_shards(folder)
    with pytest.raises(RunError, match="photos have changed"):
        finetune(source, tmp_path / "run", TINY, resume=True)


# Tables


def test_paths_are_relative_to_the_table_and_labels_need_no_folders(folder: Path, monkeypatch: Any) -> None:
    rows = [{"label": " tin ", "path": "metal1.jpg", "by": "x"}, {"label": "5", "path": "./metal2.jpg", "by": "y"}]
    table = write_csv(folder / "metal" / "list.CSV", rows)
    monkeypatch.chdir(folder)
    photos, _ = load_photos(Path("metal/list.CSV"))
    assert photos.classes == ("5", "tin") and photos.targets == (1, 0)
    assert photos.paths[0] == Path("metal/metal1.jpg")
    assert load_photos(table)[0].paths[1] == folder / "metal" / "metal2.jpg"


@pytest.mark.parametrize("kind", [write_csv, pytest.param(write_parquet, marks=pytest.mark.ecosystem)])
def test_the_column_split_separates_training_from_validation(
    kind: Callable[[Path, Any], Path], folder: Path, tmp_path: Path
) -> None:
    rows = [{**row, "split": "val" if "1" in row["path"] else "train"} for row in rows_of(folder, tmp_path)]
    table = kind(tmp_path / f"photos.{kind.__name__.removeprefix('write_')}", rows)
    train, val = load_photos(table)
    assert (
        len(train) == 9
        and val is not None
        and [path.name for path in val.paths if isinstance(path, Path)]
        == [
            "glass1.jpg",
            "metal1.jpg",
        ]
    )
    assert train.classes == val.classes == ("glass", "metal")
    run = finetune(table, tmp_path / "run", TINY)
    measured = evaluate(run.folder, table)
    assert measured.photos == run.metrics.photos == 2
    assert measured.measured_on == run.metrics.measured_on == f"val of {table.name}"
    with pytest.raises(DataError, match="has validation photos in its column split"):
        finetune(table, tmp_path / "two", TINY, val=table)
    only = kind(tmp_path / f"val.{table.suffix[1:]}", [{**row, "split": "val"} for row in rows])
    with pytest.raises(DataError, match="none for training"):
        finetune(only, tmp_path / "three", TINY)


@pytest.mark.parametrize("kind", [write_csv, pytest.param(write_parquet, marks=pytest.mark.ecosystem)])
def test_what_is_wrong_with_a_table_is_said_row_by_row(
    kind: Callable[[Path, Any], Path], folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"path": "photos/metal/metal1.jpg", "label": "metal", "split": "train"},
        {"path": "photos/metal/metal2.jpg", "label": " ", "split": "train"},
        {"path": "", "label": "metal", "split": "train"},
        {"path": "photos/metal/metal9.jpg", "label": "metal", "split": "val"},
        {"path": "photos/./metal/metal1.jpg", "label": "glass", "split": "val"},
        {"path": "photos/metal/metal3.jpg", "label": "metal", "split": "test"},
        {"path": "photos/metal/metal4.jpg", "label": "metal", "split": ""},
    ]
    table = kind(tmp_path / f"photos.{kind.__name__.removeprefix('write_')}", rows)
    with pytest.raises(DataError) as error:
        load_photos(table)
    assert str(error.value).splitlines() == [
        f"{table}: 6 of 7 rows are wrong:",
        "row 2: no label",
        "row 3: no path",
        f"row 4: no file {tmp_path / 'photos/metal/metal9.jpg'}",
        "row 5: photos/./metal/metal1.jpg is in row 1 already",
        "row 6: split must be train or val, got 'test'",
        "row 7: split must be train or val, got ''",
    ]
    with pytest.raises(DataError, match="30 of 30 rows are wrong") as error:
        load_photos(kind(table, [{"path": f"{i}.jpg", "label": "x"} for i in range(30)]))
    assert str(error.value).splitlines()[-2:] == [f"row 10: no file {tmp_path / '9.jpg'}", "and 20 more"]


@pytest.mark.parametrize("kind", [write_csv, pytest.param(write_parquet, marks=pytest.mark.ecosystem)])
def test_a_missing_column_is_named_with_those_that_there_are(kind: Callable[[Path, Any], Path], tmp_path: Path) -> None:
    table = kind(tmp_path / f"photos.{kind.__name__.removeprefix('write_')}", [{"file": "a.jpg", "label": "x"}])
    with pytest.raises(DataError, match=r"has no column path, only file, label"):
        load_photos(table)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.csv", None),
        ("empty.csv", b""),
        ("header.csv", b"path,label\n"),
        ("binary.csv", b"path,label\n\xff\xfe,x\n"),
        pytest.param("no.parquet", b"PAR1", marks=pytest.mark.ecosystem),
    ],
)
def test_a_table_that_is_none_is_named(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=name):
        load_photos(tmp_path / name)


# Shards


def test_shards_are_a_file_a_folder_or_a_pattern_and_labels_may_be_words(folder: Path, tmp_path: Path) -> None:
    photo = (folder / "metal" / "metal1.jpg").read_bytes()
    shards = tmp_path / "some"
    write_shard(shards / "b-0.tar", {"x/a.jpg": photo, "x/a.cls": b"tin", "y/a.PNG": photo, "y/a.cls": "é".encode()})
    write_shard(shards / "a-0.tar", {"a.v1.jpg": photo, "k.cls": b"12", "k.webp": photo, "k.txt": b"no photo"})
    photos, _ = load_photos(f"wds:{shards}")
    assert photos.names == ("a-0.tar/k.webp", "x/a.jpg", "y/a.PNG") and photos.classes == ("12", "tin", "é")
    assert len(load_photos(f"wds:{shards / 'b-0.tar'}")[0]) == len(load_photos(f"wds:{shards}/b-*.tar")[0]) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"x"}, r"1 photos have no label:\n.*/bad\.tar/a\.jpg"),
        ({"a.cls": b"1"}, "no photos in"),
        ({"a.jpg": b"x", "a.png": b"y", "a.cls": b"1"}, "more than one photo of the sample a"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "expected an uncompressed .tar file"),
    ],
)
def test_a_shard_that_is_not_as_it_should_be_is_named(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=message):
        load_photos(f"wds:{shard}")


def test_compressed_missing_and_misnumbered_shards_are_refused(tmp_path: Path) -> None:
    members = {"a.jpg": encode(draw(), "JPEG"), "a.cls": b"2"}
    write_shard(tmp_path / "packed.tar", members, "w:gz")
    with pytest.raises(DataError, match="expected an uncompressed"):
        load_photos(f"wds:{tmp_path / 'packed.tar'}")
    with pytest.raises(DataError, match=r"no shards at .*none-"):
        load_photos(f"wds:{tmp_path}/none-*.tar")
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"class 2 is beyond the 2 lines of .*classnames\.txt"):
        load_photos(f"wds:{write_shard(tmp_path / 'packed.tar', members)}")


# Hugging Face datasets


@pytest.mark.ecosystem
def test_a_split_of_a_hugging_face_dataset_is_named_after_a_hash_sign(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    write_folder(root / "train", {"a": 2, "b": 2})
    write_folder(root / "test", {"b": 3, "a": 1})
    photos, val = load_photos(f"hfds:{root}", val=f"hfds:{root}#test")
    assert photos.counts == {"a": 2, "b": 2} and val is not None and val.counts == {"a": 1, "b": 3}
    with pytest.raises(DataError, match=r"hfds:.*#dev can't be opened: Unknown split"):
        load_photos(f"hfds:{root}#dev")


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "can't be opened: Couldn't find any data file"),
        ({"picture": "x", "label": "x"}, "expected a column image with one in each row, row 0 of picture, label"),
        ({"image": {"bytes": b"x", "path": ""}}, "expected a column label, found image"),
        ({"image": None, "label": "x"}, "expected a column image with one in each row, row 0 of image, label has none"),
        ({"image": {"bytes": b"x", "path": ""}, "label": None}, "1 photos have no label"),
    ],
)
def test_a_dataset_that_can_not_be_used_is_named(row: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    import datasets

    root = tmp_path / "dataset"
    if row:
        root.mkdir()
        kinds = {"image": datasets.Image(), "label": datasets.Value("string"), "picture": datasets.Value("string")}
        features = datasets.Features({name: kinds[name] for name in row})
        datasets.Dataset.from_list([row], features).to_parquet(str(root / "train.parquet"))
    with pytest.raises(DataError, match=message) as error:
        load_photos(f"hfds:{root}")
    assert str(error.value).startswith(f"hfds:{root}#train")


def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "photos.parquet").touch()
    for library, source in {"datasets": "hfds:x", "pyarrow": str(tmp_path / "photos.parquet")}.items():
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtraError, match=rf'{library}.* pip install "ghost-resnet\[data\]"'):
            load_photos(source)


# Split files and validation photos


def test_split_files_are_refused_where_there_is_no_folder(folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_text("metal/metal1.jpg\n")
    for source in (as_csv(folder), as_shards(folder), "hfds:somebody/something"):
        with pytest.raises(DataError, match=f"split files are for a folder of class folders, and {source} is none"):
            load_photos(source, splits=[split])
        wrong = CliRunner().invoke(cli.app, ["finetune", "--data", source, "--split", str(split), "--out", "x"])
        assert wrong.exit_code == 2 and "split files are for a folder" in wrong.stderr


def test_validation_photos_are_a_list_of_the_folder_or_another_source(folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_text("metal/metal1.jpg\n")
    assert [len(photos or ()) for photos in load_photos(folder, val=split)] == [11, 1]
    other = write_folder(tmp_path / "other", {"metal": 2})
    for val in (other, as_csv(other), as_shards(other)):
        train, photos = load_photos(folder, val=val)
        assert photos is not None and len(photos) == 2 and photos.classes == train.classes
    assert [len(photos or ()) for photos in load_photos(as_csv(folder), val=as_shards(folder))] == [11, 11]
    write_folder(other / "more", {"wood": 1})
    with pytest.raises(DataError, match="has the classes more, which are not among glass, metal"):
        load_photos(folder, val=other)
