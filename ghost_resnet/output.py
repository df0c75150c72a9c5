"""How answers are written: formats, and files that a later run continues."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .classifier import GarbageClassifier, Prediction
from .errors import OutputError
from .extras import require
from .files import atomic_path, write_text

Answers = Iterable[tuple[str, Prediction]]


class Format(str, Enum):
    """How `predict` writes its answers."""

    text = "text"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"


def written(name: str) -> str:
    """A file's name as it is written: what is no UTF-8 is escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def render(output: Format, answers: Answers) -> Iterator[str]:
    """Turn answers into pieces of text, one an answer, for every format but Parquet."""
    if output is Format.json:
        yield from _json(answers)
    else:
        head = _CSV_HEAD if output is Format.csv else ""
        for name, prediction in answers:
            yield head + _ROWS[output](name, prediction)
            head = ""


def _json(answers: Answers) -> Iterator[str]:
    """The report's shape: one answer as an object, several as a list."""
    first = None
    several = False
    for _, prediction in answers:
        row = json.dumps(prediction.to_report(), ensure_ascii=False)
        if first is None:
            first = row
        else:
            yield f", {row}" if several else f"[{first}, {row}"
            several = True
    yield "]\n" if several else f"{first}\n"


def _text_row(name: str, prediction: Prediction) -> str:
    if prediction.error:
        return ""
    start = "no answer, " if prediction.abstained else ""
    return f"{name}: {start}" + ", ".join(f"{label} {score:.3f}" for label, score in prediction.scores) + "\n"


def _jsonl_row(name: str, prediction: Prediction) -> str:
    return json.dumps({"path": name, **prediction.to_report()}, ensure_ascii=False) + "\n"


_CSV_HEAD = "path,label,score,error\n"


def _csv_row(name: str, prediction: Prediction) -> str:
    line = io.StringIO()
    score = "" if prediction.error else f"{prediction.score:.6f}"
    csv.writer(line, lineterminator="\n").writerow([name, prediction.label, score, prediction.error or ""])
    return line.getvalue()


def _journal_row(name: str, prediction: Prediction) -> str:
    error = None if prediction.error is None else str(prediction.error)
    row = {
        "path": written(name),
        "label": prediction.label or None,
        "score": None if error else prediction.score,
        "scores": [{"label": label, "score": score} for label, score in prediction.scores],
        "error": error and written(error),
    }
    return json.dumps(row) + "\n"


_ROWS: dict[Format, Callable[[str, Prediction], str]] = {
    Format.text: _text_row,
    Format.jsonl: _jsonl_row,
    Format.csv: _csv_row,
    Format.parquet: _journal_row,
}


class AnswerFile:
    """A file of answers, which grows by a line an answer and which a later run can continue.

    Beside it, `.NAME.state` says what the answers are of until all are written. A Parquet file can't grow, so
    answers go to `.NAME.journal`, JSON lines, and the file is made of them at the end.

    Args:
        path: The file.
        output: "jsonl", "csv" or "parquet".
        classifier: What answers.
        resume: Continue a file that is half done, if there is one. None of its photos is asked for again.

    Raises:
        OutputError: There is a half-done file and it is not to be resumed, or was made by another model or in
            another format; there is a file, but it is not known to be half done; it is no regular file.

    Attributes:
        failed: How many answers in the file are errors.
    """

    def __init__(self, path: Path, output: Format, classifier: GarbageClassifier, *, resume: bool) -> None:
        self.path = path.resolve()
        self.output = output
        self.failed = 0
        self._done: Counter[str] = Counter()
        self._state = self.path.with_name(f".{self.path.name}.state")
        journal = self.path.with_name(f".{self.path.name}.journal")
        self._growing = journal if output is Format.parquet else self.path
        if self.path.exists() and not self.path.is_file():
            raise OutputError(f"{path} is no regular file: expected the name of a file to write")
        state = {"format": output.value, **_identity(classifier)}
        if self._state.exists():
            if not resume:
                raise OutputError(f"{path} is half done: continue it with --resume, or remove it and {self._state}")
            self._check(state)
            self._take_up()
        elif resume and self.path.exists():
            raise OutputError(f"{path} is not half done, so there is nothing to resume: remove it to start anew")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # before there is a state, or old answers could be taken for new ones
            journal.unlink(missing_ok=True)
            write_text(self._state, json.dumps(state))
        self._file = self._growing.open("a", encoding="utf-8", errors="backslashreplace", newline="")
        if output is Format.csv and not self._file.tell():
            self._file.write(_CSV_HEAD)

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            if self.output is Format.parquet:
                _write_parquet(self._growing, self.path)
                self._growing.unlink()
            self._state.unlink()

    def remaining(self, photos: Iterable[Path | str]) -> Iterator[Path | str]:
        """The photos that the file has no answer for; one that is listed twice needs two."""
        for photo in photos:
            if self._done[key := written(str(photo))] > 0:
                self._done[key] -= 1
            else:
                yield photo

    def write(self, name: str, prediction: Prediction) -> None:
        """Add an answer, so that it is there even if this process is killed next."""
        self._file.write(_ROWS[self.output](name, prediction))
        self._file.flush()

    def _check(self, state: dict[str, Any]) -> None:
        try:
            before = json.loads(self._state.read_text(encoding="utf-8"))
            changed = [key for key in state if key != "outputs" and before[key] != state[key]]
            outputs, then = np.array(state["outputs"]), np.array(before["outputs"], np.float64)
            if outputs.shape != then.shape or np.abs(outputs - then).max() > 1e-3 * max(1.0, np.abs(then).max()):
                changed.append("weights")
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{self._state} is damaged ({error!r}): remove it and {self.path.name}") from error
        if changed:
            raise OutputError(
                f"{self.path} was begun with other {', '.join(changed)}: "
                "go on as it was begun, or write to another file"
            )

    def _take_up(self) -> None:
        """Count the photos that are answered, and cut off a line that was not finished."""
        if not self._growing.exists():
            return
        end = 0
        with self._growing.open("rb") as file:
            for whole, name, failed in (_csv_answers if self.output is Format.csv else _json_answers)(file):
                end = whole
                if name is not None:
                    self._done[name] += 1
                    self.failed += failed
        os.truncate(self._growing, end)


def _identity(classifier: GarbageClassifier) -> dict[str, Any]:
    """What tells a classifier from another, wherever its files are: its outputs for a picture, among others."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    outputs = next(classifier.logits_stream([picture]))
    assert isinstance(outputs, np.ndarray)
    return {
        "labels": list(classifier.labels),
        "preprocessing": repr(classifier.preprocessing),
        "temperature": classifier.temperature,
        "threshold": classifier.threshold,
        "outputs": outputs.astype(float).tolist(),
    }


def _json_answers(file: BinaryIO) -> Iterator[tuple[int, str | None, bool]]:
    """Where each whole line ends, which photo it is of, and whether it is an error."""
    end = 0
    for line in file:
        if line.endswith(b"\n"):
            end += len(line)
            try:
                row = json.loads(line)
                yield end, written(row["path"]), bool(row.get("error"))
            except (ValueError, TypeError, KeyError) as error:
                raise OutputError(f"{file.name}: damaged at byte {end - len(line)} ({error!r})") from error


def _csv_answers(file: BinaryIO) -> Iterator[tuple[int, str | None, bool]]:
    """As `_json_answers`; a row may have several lines, as a name may."""
    end, last = 0, b""

    def lines() -> Iterator[str]:
        nonlocal end, last
        for last in file:
            end += len(last)
            yield last.decode("utf-8", "replace")

    rows = csv.reader(lines(), strict=True)
    try:
        for number, row in enumerate(rows):
            if last.endswith(b"\n"):
                yield end, row[0] if number else None, bool(number and row[3])
    except (csv.Error, IndexError) as error:
        if file.read(1):  # else the last row ends within quotes
            raise OutputError(f"{file.name}: damaged before byte {end} ({error})") from error


def _write_parquet(journal: Path, path: Path) -> None:
    pa, pq = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    scores = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float64())]))
    columns = [("path", pa.string()), ("label", pa.string()), ("score", pa.float64())]
    schema = pa.schema([*columns, ("scores", scores), ("error", pa.string())])
    with (
        journal.open(encoding="utf-8") as lines,
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema) as writer,
    ):
        while rows := [json.loads(line) for _, line in zip(range(10_000), lines, strict=False)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
