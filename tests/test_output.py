"""Files of answers: each photo once, whenever the process dies."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from drawing import draw
from typer.testing import CliRunner, Result

from ghost_resnet import GarbageClassifier
from ghost_resnet.cli import app
from ghost_resnet.data import Preprocessing
from ghost_resnet.errors import OutputError
from ghost_resnet.output import AnswerFile, Format

RAW = Preprocessing((3, 8, 8), "nearest", 1.0, mean=(0.0,) * 3, std=(1 / 255,) * 3)
RESUMABLE = ["jsonl", "csv", "parquet"]


class Echo:
    """A network whose outputs are a photo's first red values."""

    parameters = 1

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return batch[:, 0, 0, :2] / 50


def make(**changes: Any) -> GarbageClassifier:
    return GarbageClassifier(**{"runtime": Echo(), "labels": ["a", "b"], "preprocessing": RAW, **changes})


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Thirty photos; one can't be read, one has a name of two lines, one a name that is no UTF-8."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(30):
        draw(8, 8, number).save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes(b"no photo")
    (folder / "11.png").rename(folder / '11 "quoted",\nsecond line.png')
    (folder / "19.png").rename(os.fsdecode(os.fsencode(folder) + b"/19\xff.png"))
    return sorted(folder.iterdir())


def write(path: Path, kind: str, photos: list[Path], *, resume: bool = False, stop: int | None = None) -> int:
    """Write answers; die after `stop` of them. Returns how many were asked for."""
    asked = 0
    classifier = make()
    try:
        with AnswerFile(path, Format(kind), classifier, resume=resume) as file:
            for photo in file.remaining(photos):
                if asked == stop:
                    raise KeyboardInterrupt
                file.write(str(photo), classifier.predict(photo))
                asked += 1
    except KeyboardInterrupt:
        pass
    return asked


def growing(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal") if path.suffix == ".parquet" else path


def rows(path: Path) -> Any:
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return path.read_bytes()


def table(path: Path) -> dict[str, float]:
    """The best score of each photo in a file of answers."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            found = [(row["path"], float(row["score"])) for row in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        lines = map(json.loads, path.read_text("utf-8").splitlines())
        found = [(row["path"], float(row["scores"][0][1])) for row in lines]
    else:
        found = [(row["path"], row["score"]) for row in rows(path)]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("kind", RESUMABLE)
def test_cut_anywhere_the_rest_is_asked_for_and_the_file_is_the_same(
    kind: str, photos: list[Path], tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    twice = [*photos, photos[3]]
    assert write(whole, kind, twice) == 31
    write(cut, kind, twice, stop=14)
    state, content = cut.with_name(f".{cut.name}.state"), growing(cut).read_bytes()
    kept = state.read_bytes()
    for length in [0, 1, *range(len(content) - 700, len(content) + 1, 23), len(content)]:
        cut.unlink(missing_ok=True)
        growing(cut).write_bytes(content[:length])
        state.write_bytes(kept)
        asked = write(cut, kind, twice, resume=True)
        assert 17 <= asked <= 31 and rows(cut) == rows(whole)
    assert asked == 17  # nothing was cut off
    assert not state.exists() and (kind != "parquet" or not growing(cut).exists())


@pytest.mark.parametrize("kind", RESUMABLE)
def test_photos_that_came_or_went_meanwhile_cost_no_other_its_answer(
    kind: str, photos: list[Path], tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"answers.{kind}"
    write(path, kind, photos[2:], stop=10)
    assert write(path, kind, [*photos[:5], *photos[6:]], resume=True) == 2 + len(photos) - 12


def test_rows_hold_what_they_say(photos: list[Path], tmp_path: Path) -> None:
    answers = make().predict(photos)
    for kind in ("jsonl", "csv"):
        write(tmp_path / f"a.{kind}", kind, photos)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert lines == [{"path": str(p), **a.to_report()} for p, a in zip(photos, answers, strict=True)]
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["path"] for row in table] == [str(p).encode("utf-8", "backslashreplace").decode() for p in photos]
    assert [row["label"] for row in table] == [answer.label for answer in answers]
    assert [bool(row["error"]) for row in table] == [bool(answer.error) for answer in answers]


def test_parquet_rows_hold_every_score(photos: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    write(path, "parquet", photos)
    for row, answer in zip(rows(path), make().predict(photos), strict=True):
        assert [(score["label"], score["score"]) for score in row["scores"]] == answer.scores
        assert (row["label"], row["score"]) == ((answer.label, answer.score) if not answer.error else (None, None))
        assert row["error"] == (str(answer.error) if answer.error else None)


class Other(Echo):
    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return super().__call__(batch) * 1.01


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"runtime": Other()}, "weights"),
        ({"labels": ["b", "a"]}, "labels"),
        ({"temperature": 2.0}, "temperature"),
        ({"threshold": 0.9}, "threshold"),
        ({"preprocessing": Preprocessing((3, 9, 9), "nearest", 1.0, mean=(0.0,) * 3, std=(1 / 255,) * 3)}, "preproc"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_begun_with_another_model_is_not_continued(
    changes: dict[str, Any], word: str, photos: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.csv"
    write(path, "csv", photos, stop=3)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=word):
        AnswerFile(path, Format.csv, make(**changes), resume=True)
    with pytest.raises(OutputError, match="format"):
        AnswerFile(path, Format.jsonl, make(), resume=True)
    with pytest.raises(OutputError, match="half done"):
        AnswerFile(path, Format.csv, make(), resume=False)
    assert path.read_bytes() == before


def test_a_finished_file_is_overwritten_but_not_resumed(photos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert write(path, "jsonl", photos[:3], resume=True) == 3  # nothing there yet
    with pytest.raises(OutputError, match="nothing to resume"):
        write(path, "jsonl", photos, resume=True)
    write(path, "jsonl", photos[:2])
    assert len(path.read_text("utf-8").splitlines()) == 2


def test_damage_that_no_killed_process_leaves_is_refused(photos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, "jsonl", photos, stop=5)
    path.write_bytes(path.read_bytes().replace(b"{", b"\0", 1))
    with pytest.raises(OutputError, match="damaged at byte 0"):
        write(path, "jsonl", photos, resume=True)


# Through the command line


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("kind", RESUMABLE)
def test_the_command_resumes_with_the_exit_status_of_the_whole(
    kind: str, photos: list[Path], run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    command = ["predict", "--model", run_folder, photos[0].parent]
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    result = call(*command, "--out", whole)
    assert (result.exit_code, result.stdout) == (1, "") and "07.png" in result.stderr

    original = AnswerFile.write

    def interrupted(self: AnswerFile, name: str, prediction: Any) -> None:
        if "20.png" in name:
            raise KeyboardInterrupt
        original(self, name, prediction)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", interrupted)
        assert call(*command, "--out", cut).exit_code == 130
    result = call(*command, "--out", cut, "--resume")
    assert (result.exit_code, result.stderr) == (1, "") and rows(cut) == rows(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "a.txt"], "--resume needs --out"),
        (["--format", "parquet"], "parquet needs --out"),
        (["--out", "."], "is no regular file"),
    ],
)
def test_options_that_do_not_go_together_exit_2(
    options: list[str], message: str, photos: list[Path], run_folder: Path
) -> None:
    kind = ["--format", "csv"] if options == ["--out", "."] else []
    result = call("predict", "--model", run_folder, photos[0], *options, *kind)
    assert result.exit_code == 2 and message in result.stderr


def test_json_and_text_go_to_a_file_too(photos: list[Path], run_folder: Path, tmp_path: Path) -> None:
    for kind in ("json", "text"):
        out = tmp_path / f"a.{kind}"
        to_file = call("predict", "--model", run_folder, photos[0].parent, "--out", out)
        to_stdout = call("predict", "--model", run_folder, photos[0].parent, "--format", kind)
        assert to_file.stdout == "" and out.read_text("utf-8") == to_stdout.stdout != ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMABLE)
def test_killed_at_any_moment_and_resumed_no_photo_is_lost_or_repeated(
    kind: str, run_folder: Path, tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(400):
        draw(64, 48, number).save(folder / f"{number:03}.jpg")
    code = "from ghost_resnet.cli import app; app()"
    command = [sys.executable, "-c", code, "predict", "--model", str(run_folder), str(folder), "--resume", "--out"]
    whole, cut = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
    subprocess.run([*command, whole], check=True)
    moment = random.Random(0)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen([*command, str(cut)])
        size = growing(cut).stat().st_size if growing(cut).exists() else 0
        while process.poll() is None and (not growing(cut).exists() or growing(cut).stat().st_size <= size):
            time.sleep(0.005)
        time.sleep(moment.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if not cut.with_name(f".{cut.name}.state").exists():
            break
    else:
        subprocess.run([*command, str(cut)], check=True)
    assert kills > 1
    ours, expected = table(cut), table(whole)
    assert list(ours) == list(expected) and len(ours) == 400
    assert list(ours.values()) == pytest.approx(list(expected.values()), abs=1.1e-3)  # other batches round otherwise


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photos(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from predict_memory import measure

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        draw(512, 384, number).save(folder / f"{number}.jpg")
    answers, peaks = [], []
    for count in (500, 2000):
        answered, _, peak = measure(folder, count, str(run_folder), tmp_path / f"{count}.jsonl")
        answers.append(answered)
        peaks.append(peak)
    assert answers == [500, 2000]
    assert peaks[1] < peaks[0] + 30  # MB; 1,500 decoded photos would be 900
