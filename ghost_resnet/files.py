"""Writing files so that nothing half-written stays."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode  # those of any new file, unlike what tempfile or safetensors give
    try:
        yield temporary
        temporary.chmod(permissions)
        with temporary.open("r+b") as written:  # Windows syncs only what is open for writing
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends well, else remove it.

    `path` must be missing or an empty folder when the block ends.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()  # Windows does not rename onto a folder
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` as UTF-8, wholly or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def is_free(folder: Path) -> bool:
    """Whether a folder can be filled without mixing with what somebody else put there: it is missing or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def file_name(text: str) -> str:
    """A text, such as the name of a class, as one part of a path: no separators, nothing hidden, never empty."""
    return re.sub(r"[^\w\-. ]", "_", text).strip(". ") or "_"


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder that nobody else writes to."""
    for path in folder.glob(".*." + "[0-9a-f]" * 8):
        path.unlink()
