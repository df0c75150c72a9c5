"""Importing: cheap, in either order, and every promised name is there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ghost_resnet

ROOT = Path(ghost_resnet.__file__).parent
STUB = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
NAMES = [alias.asname or alias.name for node in STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("imports", ["import ghost_resnet, timm", "import timm, ghost_resnet"])
def test_networks_are_registered_in_either_order(imports: str) -> None:
    listed = run(f"{imports}; print(*timm.list_models('*ghost_resnet*'))").split()
    assert "ghost_resnet50" in listed and len(listed) == 6


def test_importing_the_package_alone_loads_nothing_heavy() -> None:
    loaded = run(
        "import sys; before = set(sys.modules); import ghost_resnet;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    ).split()
    assert "ghost_resnet" in loaded
    assert set(loaded) <= {"ghost_resnet", "lazy_loader", "wrapt"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_stub_resolves(name: str) -> None:
    assert getattr(ghost_resnet, name) is not None
    assert name in ghost_resnet.__all__ and name in dir(ghost_resnet)


def test_version_is_the_one_the_build_reads() -> None:
    assert f'__version__ = "{ghost_resnet.__version__}"' in (ROOT / "__init__.py").read_text(encoding="utf-8")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ghost_resnet.no_such_name
