"""The package as a whole: what is promised in README, how modules depend on each other, what a release holds."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from typer.testing import CliRunner

import ghost_resnet
from ghost_resnet import hub
from ghost_resnet.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ghost_resnet"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPTS = Path(sys.executable).parent

# Top first: a module imports from lines below its own only.
LAYERS = (
    "__main__",
    "cli",
    "serve demo training benchmark",
    "report",
    "evaluation explain output",
    "classifier",
    "export",
    "runtimes",
    "surgery",
    "distillation conversion folding",
    "ghost_resnet",
    "hub",
    "hygiene sources",
    "data recipes layers",
    "extras files",
    "errors",
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
WITHOUT_TORCH = (
    *("cli", "output", "classifier", "data", "sources", "hub", "recipes", "runtimes", "export", "errors", "extras"),
    "files",
)


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command prints to stdout."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, f"{command} in {cwd}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def cells_of(line: str) -> list[str]:
    """The cells of a table's row."""
    return [cell.strip() for cell in line.strip("|").split("|")]


README_ROWS = [cells_of(line) for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]


def module_of(path: Path) -> str:
    """The first name below `ghost_resnet` of the module in a file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# Version and metadata


def test_version_is_the_same_everywhere() -> None:
    said = {
        "metadata": version("ghost-resnet"),
        "citation": re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1],
        "changelog": re.search(r"^## ([^,\n]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1],
    }
    assert said == dict.fromkeys(said, ghost_resnet.__version__)


def test_console_script_shows_its_commands() -> None:
    text = run(SCRIPTS / "ghost-resnet", "--help")
    for command in ("predict", "evaluate", "finetune"):
        assert command in text


@pytest.mark.slow
def test_type_checkers_see_the_types(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"  # other libraries' types are neither here nor there, and take long
    config.write_text("[mypy]\nfollow_imports = skip\n[mypy-ghost_resnet.*]\nfollow_imports = normal\n")
    code = "import ghost_resnet\nreveal_type(ghost_resnet.GarbageClassifier.predict_stream)"
    text = run(sys.executable, "-m", "mypy", "-c", code, cwd=tmp_path)
    assert "Iterator[ghost_resnet.classifier.Prediction]" in text


# Modules


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_a_docstring_with_a_summary(path: Path) -> None:
    def check(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> Iterator[str]:
        lines = (ast.get_docstring(node) or "").splitlines() or [""]
        if not lines[0].endswith((".", ":")) or (len(lines) > 1 and lines[1]):
            yield name
        for inner in node.body if not isinstance(node, ast.FunctionDef) else ():
            if isinstance(inner, ast.ClassDef | ast.FunctionDef) and not inner.name.startswith("_"):
                overload = any("overload" in ast.dump(decorator) for decorator in inner.decorator_list)
                if not overload and inner.name != "forward":  # torch.nn.Module documents it
                    yield from check(inner, f"{name}.{inner.name}")

    assert list(check(ast.parse(path.read_text(encoding="utf-8")), module_of(path))) == []


@pytest.mark.parametrize("path", MODULES[1:], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_from_lower_layers_only(path: Path) -> None:
    own = module_of(path)
    if own == "weights":
        pytest.skip("a folder of files")
    assert own in RANK, f"{own} has no place yet in LAYERS"
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghost_resnet."):
            names = [node.module.removeprefix("ghost_resnet.")]
        else:
            continue
        for name in (name.partition(".")[0] for name in names if name != "__version__"):
            assert RANK[name] > RANK[own] or name == own, f"line {node.lineno}: {own} imports {name}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_light_modules_import_without_torch(name: str) -> None:
    code = f"import sys, ghost_resnet.{name}; print(*sorted(sys.modules.keys() & {{'torch', 'torchvision', 'timm'}}))"
    assert run(sys.executable, "-c", code).split() == []


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from ghost_resnet.cli import app; app(['predict', '--help'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).split()[-1] == "False"


# Documentation


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder as README's reader has it: `my_photos/`, `photo.jpg`, and a checkout's hubconf.py."""
    random = np.random.default_rng(0)
    for name, level in [("glass", 60), ("metal", 160)]:
        (tmp_path / "my_photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(level, level + 90, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my_photos" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    (tmp_path / "hubconf.py").write_bytes((ROOT / "hubconf.py").read_bytes())
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("reader")
def test_readme_python_blocks_run() -> None:
    names: dict[str, object] = {}
    for code in blocks("README.md", "python"):
        exec(code, names)
    assert isinstance(names["model"], ghost_resnet.GhostResNet)


def test_tables_of_networks_hold_what_the_command_beside_them_prints(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for code in blocks("docs/models.md", "python"):
        exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines() if line in printed]
    assert table == printed and len(table) == len(timm.list_models("ghost_resnet*"))

    for cells in map(cells_of, printed):
        name, size, _classes, parameters, multiply_adds, *_ = cells
        giga = f"{int(multiply_adds.replace(',', '')) / 1e9:.3f} G"
        (in_readme,) = (row for row in README_ROWS if row[0] == name)
        assert in_readme[2:] == [parameters, size, giga]


@pytest.mark.usefixtures("reader")
def test_readme_command_lines_run() -> None:
    commands = [line.split() for block in blocks("README.md", "bash")[1:] for line in block.splitlines()]
    assert {"finetune", "evaluate", "predict"} <= {name for _, name, *_ in commands}
    for program, *arguments in commands:
        assert program == "ghost-resnet"
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}\n{done.output}"


def test_readme_and_ci_agree_on_the_two_commands() -> None:
    install, test = blocks("README.md", "bash")[0].splitlines()
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert install.startswith("pip install ") and test.startswith("pytest ")
    assert lines.index(install) < lines.index(test)
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_contributors_run_the_tests_that_readme_names() -> None:
    assert blocks("README.md", "bash")[0].splitlines()[1] in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_names_the_weights_that_there_are() -> None:
    if not hub.manifest():
        pytest.skip("no weights come with this version")
    named = re.findall(r"^- `(ghost_resnet\w+\.\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(hub.manifest())


# Release


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {"ghost_resnet/weights/manifest.json", "ghost_resnet/recipes/report.toml", "ghost_resnet/py.typed"} < packed
    assert wheel.stat().st_size < 100e6


@pytest.mark.slow
def test_package_index_takes_the_release(dist: Path) -> None:
    text = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    assert text.count("PASSED") == 2


@pytest.mark.slow
def test_wheel_works_on_its_own(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    code = (
        "import sys; sys.path.insert(0, 'site'); import ghost_resnet, timm; from ghost_resnet import hub, recipes\n"
        "recipes.load_recipe('report')\n"
        "for tag, entry in hub.manifest().items():\n"
        "    assert entry.embedded.is_file() or entry.hf_hub_id\n"
        "    if entry.embedded.is_file(): hub.load_model(tag)\n"
        "print(ghost_resnet.__file__, len(timm.list_models('ghost_resnet*')))"
    )
    origin, networks = run(sys.executable, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(tmp_path, origin).is_relative_to(tmp_path / "site")
    assert networks == "6"
