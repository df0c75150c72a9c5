"""The table of docs/ecosystem.md: runs the tests whose `ecosystem` marker names a library, prints a row for each.

    python benchmarks/ecosystem.py [-k NAME]

Arguments go to pytest. Its own output goes to stderr; the exit status is pytest's.
"""

import sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Table:
    """Collects a row for each test as pytest runs it."""

    def __init__(self) -> None:
        self.about: dict[str, tuple[str, str]] = {}
        self.result: dict[tuple[str, str], str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        def about(item: pytest.Item) -> tuple[str, str] | None:
            marker = item.get_closest_marker("ecosystem")
            if not marker or not marker.args or not isinstance(item, pytest.Function):
                return None
            return marker.args[0], (item.function.__doc__ or "").strip().rstrip(".")

        self.about = {item.nodeid: row for item in items if (row := about(item))}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.about])
        items[:] = [item for item in items if item.nodeid in self.about]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.about[report.nodeid]
        if report.failed:
            self.result[row] = "fails"
        elif report.skipped:
            self.result.setdefault(row, "not tried")
        elif report.when == "call":
            self.result.setdefault(row, "works")

    def __str__(self) -> str:
        lines = ["| library | version | what | result |", "|---|---|---|---|"]
        for (library, what), result in sorted(self.result.items(), key=lambda item: item[0][0]):
            try:
                found = version(library)
            except PackageNotFoundError:
                found = "not installed"
            lines.append(f"| {library} | {found} | {what} | {result} |")
        return "\n".join(lines)


if __name__ == "__main__":
    table = Table()
    with redirect_stdout(sys.stderr):
        code = pytest.main([str(ROOT / "tests"), "-m", "ecosystem", "-rs", *sys.argv[1:]], plugins=[table])
    print(table)
    sys.exit(code)
