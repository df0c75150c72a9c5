"""The pages in docs/: their code runs, and what they list is there.

A comment on the line before a block, which readers don't see, says what is special about it:
`<!-- not run: why -->`, or `<!-- extra: module -->` if it needs a library that an extra brings.
"""

import ast
import re
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from drawing import draw, write_folder
from typer.testing import CliRunner

import ghost_resnet
from ghost_resnet import hub
from ghost_resnet.cli import app

ROOT = Path(__file__).parents[1]
RUN_BY_TEST_PACKAGE = {"models.md"}


class Block(NamedTuple):
    note: str
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are marked as Python or as commands of a shell."""
    found = re.findall(
        r"^(?:<!-- ([^\n]*) -->\n)?( *)```(python|bash)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S
    )
    return [
        Block(note, language, re.sub(rf"^{indent}", "", code, flags=re.M)) for note, indent, language, code in found
    ]


def pages() -> list[object]:
    found = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if (own := blocks(page)) and page.name not in RUN_BY_TEST_PACKAGE:
            slow = [pytest.mark.slow] if any("finetune" in block.code for block in own) else []
            extra = [pytest.mark.ecosystem] if any(block.note.startswith("extra: ") for block in own) else []
            found.append(pytest.param(page, id=page.name, marks=[*slow, *extra]))
    return found


def no_network(*_arguments: object, **_more: object) -> None:
    raise OSError("the code of a page needs no network")


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Work in a folder as the reader of a page has it; gives the names that a page takes for granted."""
    for name in ("my_photos", "my_bins"):
        write_folder(tmp_path / name, {"glass": 4, "metal": 4})
    draw().save(tmp_path / "photo.jpg")
    model = timm.create_model("ghost_resnet50", num_classes=2, layers=(1, 1, 1, 1))
    hub.save_pretrained(model, tmp_path / "runs" / "mine", labels=["glass", "metal"])
    (tmp_path / "val.txt").write_text("glass/glass1.jpg\nmetal/metal1.jpg\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    paths = ["photo.jpg"]
    return {"ghost_resnet": ghost_resnet, "timm": timm, "torch": torch, "model": model, "paths": paths}


@pytest.mark.parametrize("page", pages())
def test_code_in_docs_runs(page: Path, reader: dict[str, object]) -> None:
    for note, language, code in blocks(page):
        if note.startswith("not run: "):
            continue
        if note.startswith("extra: "):
            pytest.importorskip(note.removeprefix("extra: "))
        if language == "python":
            exec(compile(code, page.name, "exec"), reader)
            continue
        for line in code.splitlines():
            program, *arguments = line.split()
            assert program == "ghost-resnet"
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}\n{done.output}"


def test_every_row_of_the_ecosystem_has_its_test_and_the_other_way_round() -> None:
    tests = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.ecosystem":
                    tests.add((ast.literal_eval(mark.args[0]), (ast.get_docstring(node) or "").rstrip(".")))
    lines = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert {(library, what) for library, _version, what, _result in rows} == tests
    assert all(what for _, what in tests) and len(rows) == len(tests)
