"""Files are written wholly or not at all."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ghost_resnet.files import atomic_path, file_name, remove_leftovers, write_text


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_text_is_written_as_utf_8_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "瓶.json"
    write_text(path, "été\n")
    write_text(str(path), "été 2\n")
    assert path.read_bytes() == "été 2\n".encode()
    assert names(path.parent) == [path.name]


def test_a_file_is_synced_through_a_handle_that_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: os.write(handle, b""))  # refused for readers, as Windows' fsync is
    write_text(tmp_path / "x", "x")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udcff")
    assert path.read_text() == "old" and names(tmp_path) == ["metrics.json"]


def test_the_new_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists() and temporary.parent == tmp_path and temporary.name.startswith(".")
    assert path.read_bytes() == b"half"


def test_a_target_that_is_a_folder_fails_cleanly(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "taken", "x")
    assert names(tmp_path) == ["taken"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x", "x")
        assert os.umask(umask) == umask  # and it is left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_threads_that_write_the_same_file_never_mix_nor_change_the_process(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    path = tmp_path / "x"
    texts = [str(number) * 5000 for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(path, text), texts * 5))
    assert os.umask(umask) == 0o027
    assert path.read_text() in texts and names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("metal", "metal"),
        ("Glas, grün", "Glas_ grün"),
        ("paper/card", "paper_card"),
        ("../../x", "_.._x"),
        ("/etc/passwd", "_etc_passwd"),
        ("C:\\x", "C__x"),
        (".hidden", "hidden"),
        ("..", "_"),
        ("", "_"),
        ("a\0b", "a_b"),
    ],
)
def test_any_text_makes_one_part_of_a_path(text: str, name: str, tmp_path: Path) -> None:
    assert file_name(text) == name
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {".gitignore", ".editor.settings", "model.safetensors", "x.12345678"}
    for name in kept:
        (tmp_path / name).touch()
    unfinished = [atomic_path(tmp_path / "model.safetensors") for _ in range(3)]
    for writing in unfinished:
        writing.__enter__().write_text("half")
    assert len(names(tmp_path)) == 7
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == kept


def test_a_file_has_the_permissions_of_any_new_file_even_if_its_writer_replaced_it(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_path(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.touch(0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
