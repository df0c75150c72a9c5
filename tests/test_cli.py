"""The command line: results on stdout, all else on stderr, exit statuses that scripts can rely on."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from drawing import draw, write_folder
from typer.testing import CliRunner, Result

from ghost_resnet import GarbageClassifier, Prediction, hub
from ghost_resnet.cli import app
from ghost_resnet.evaluation import Metrics, evaluate

COMMAND = [sys.executable, "-c", "from ghost_resnet.cli import app; app()"]


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two good photos around a broken one."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in (1, 3):
        draw(seed=number).save(root / f"{number}.png")
    (root / "2.png").write_bytes((root / "1.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="session")
def classifier(run_folder: Path) -> GarbageClassifier:
    return GarbageClassifier.from_pretrained(run_folder)


# predict


def test_json_of_one_photo_is_the_report_s_shape(run_folder: Path, photos: Path, classifier: GarbageClassifier) -> None:
    result = call("predict", "--model", run_folder, "--format", "json", photos / "1.png")
    assert (result.exit_code, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert list(answer) == ["predicted_label", "scores"]
    assert answer == classifier.predict(photos / "1.png").to_report()
    assert len(answer["scores"]) == 5 and answer["scores"][0][0] == answer["predicted_label"]
    assert all(isinstance(score, str) and len(score) == 5 for _, score in answer["scores"])


def test_json_of_several_photos_is_a_list_of_them(
    run_folder: Path, photos: Path, classifier: GarbageClassifier
) -> None:
    paths = [photos / "3.png", photos / "1.png"]
    result = call("predict", "--model", run_folder, "--format", "json", *paths)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == [answer.to_report() for answer in classifier.predict(paths)]


def test_a_broken_photo_among_good_ones_is_named_and_the_good_ones_are_answered(
    run_folder: Path, photos: Path, classifier: GarbageClassifier
) -> None:
    first, _, third = (classifier.predict(photos / f"{number}.png") for number in (1, 2, 3))
    result = call("predict", "--model", run_folder, photos)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{photos / name}: " + ", ".join(f"{label} {score:.3f}" for label, score in answer.scores)
        for name, answer in (("1.png", first), ("3.png", third))
    ]
    assert result.stderr.startswith(f"ghost-resnet: {photos / '2.png'}: ") and result.stderr.count("\n") == 1


def test_json_jsonl_and_csv_keep_the_place_of_a_broken_photo(
    run_folder: Path, photos: Path, classifier: GarbageClassifier
) -> None:
    paths = [photos / f"{number}.png" for number in (1, 2, 3)]
    answers = classifier.predict(paths)
    reports = [answer.to_report() for answer in answers]
    assert "error" in reports[1]

    result = call("predict", "--model", run_folder, "--format", "json", photos)
    assert result.exit_code == 1 and json.loads(result.stdout) == reports

    result = call("predict", "--model", run_folder, "--format", "jsonl", photos)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == [{"path": str(path), **report} for path, report in zip(paths, reports, strict=True)]

    result = call("predict", "--model", run_folder, "--format", "csv", photos)
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert [row["label"] for row in rows] == [answer.label for answer in answers]
    assert [row["score"] for row in rows] == [f"{answers[0].score:.6f}", "", f"{answers[2].score:.6f}"]
    assert [row["error"] for row in rows] == ["", str(answers[1].error), ""]


def test_below_the_threshold_no_format_gives_a_label(
    run_folder: Path, photos: Path, classifier: GarbageClassifier
) -> None:
    answers = [classifier.predict(photos / name) for name in ("1.png", "3.png")]
    low, high = sorted(answer.score for answer in answers)
    arguments = ["--model", run_folder, "--threshold", (low + high) / 2, photos / "1.png", photos / "3.png"]
    labels = [answer.label if answer.score == high else None for answer in answers]
    assert [
        row["predicted_label"] for row in json.loads(call("predict", "--format", "json", *arguments).stdout)
    ] == labels
    rows = list(csv.DictReader(io.StringIO(call("predict", "--format", "csv", *arguments).stdout)))
    assert [row["label"] or None for row in rows] == labels and [row["error"] for row in rows] == ["", ""]
    lines = call("predict", *arguments).stdout.splitlines()
    assert [None if ": no answer, " in line else line.split()[1] for line in lines] == labels
    assert call("predict", "--threshold", "1.1", photos / "1.png").exit_code == 2


def test_paths_and_folders_are_taken_in_the_order_given(run_folder: Path, photos: Path) -> None:
    result = call("predict", "--model", run_folder, photos / "3.png", photos, "none.jpg")
    assert result.exit_code == 1
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [
        str(photos / name) for name in ("3.png", "1.png", "3.png")
    ]
    assert "none.jpg: can't be opened (No such file" in result.stderr


@pytest.mark.parametrize("kind", ["text", "json", "jsonl", "csv"])
def test_names_in_any_script_or_none_are_printed(kind: str, run_folder: Path, tmp_path: Path) -> None:
    good, odd = tmp_path / "бутылка, 瓶.png", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    draw().save(good)
    Path(odd).write_bytes(good.read_bytes())
    result = call("predict", "--model", run_folder, "--format", kind, good, odd)
    assert result.exit_code == 0 and not result.stderr
    if kind == "jsonl":
        assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [str(good), odd]
    elif kind == "csv":
        assert next(csv.DictReader(io.StringIO(result.stdout)))["path"] == str(good)
    elif kind == "text":
        assert result.stdout.startswith(f"{good}: ") and r"\udcff.png: " in result.stdout


def test_an_interrupted_command_exits_130(run_folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: GarbageClassifier, photos: Any) -> Any:
        yield Prediction("metal", 1.0, [("metal", 1.0)])
        raise KeyboardInterrupt

    monkeypatch.setattr(GarbageClassifier, "predict_stream", interrupted)
    result = call("predict", "--model", run_folder, photos)
    assert result.exit_code == 130
    assert result.stdout == f"{photos / '1.png'}: metal 1.000\n" and not result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--model", "no_such_model", "1.png"], "'no_such_model' is no tag"),
        (["predict", "--model", "{run}", "{empty}"], "no photos in {empty}"),
        (["predict", "--model", "{empty}", "1.png"], "expected model.safetensors in the folder {empty}"),
        (["evaluate", "--model", "no_such_model", "--data", "{empty}"], "'no_such_model' is no tag"),
        (["evaluate", "--model", "{run}", "--data", "{empty}"], "no photos under {empty}"),
        (["evaluate", "--model", "{run}", "--data", "{empty}/none"], "expected a folder of class folders"),
        (["evaluate", "--model", "{run}", "--data", "{empty}", "--split", "none.txt"], "no split file at none.txt"),
    ],
)
def test_wrong_use_is_one_sentence_on_stderr_and_exit_2(
    arguments: list[str], message: str, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": run_folder, "empty": tmp_path / "empty"}
    result = call(*(argument.format(**places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("ghost-resnet: ") and result.stderr.count("\n") == 1
    assert message.format(**places) in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["predict"], ["predict", "--format", "xml", "a.jpg"], ["predict", "--colour", "a.jpg"], ["evaluate"], ["guess"]],
    ids=" ".join,
)
def test_options_that_don_t_exist_exit_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "") and "Usage:" in result.stderr


def test_without_weights_of_its_own_a_model_must_be_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "manifest", dict)
    result = call("predict", photos)
    assert result.exit_code == 2 and "name a run folder" in result.stderr


# evaluate


def test_evaluate_prints_the_report_s_lines_and_a_row_for_each_class(
    run_folder: Path, tmp_path: Path, classifier: GarbageClassifier
) -> None:
    root = write_folder(tmp_path / "photos", {"glass": 3, "metal": 2})
    split, output = tmp_path / "split.txt", tmp_path / "out" / "metrics.json"
    split.write_text("glass/glass1.jpg\nglass/glass3.jpg\nmetal/metal2.jpg\n")
    result = call("evaluate", "--model", run_folder, "--data", root, "--split", split, "--json", output)
    assert (result.exit_code, result.stderr) == (0, "")
    expected = evaluate(classifier, root, splits=[split])
    lines = result.stdout.splitlines()
    assert lines[:3] == expected.report().splitlines()
    assert lines[0].startswith("Top 1 err: ") and lines[1].startswith("Top 5 err: ")
    assert lines[2] == f"Parameter numbers: {classifier.parameters}"
    assert f"Top 1 accuracy {expected.top1:.4f}" in lines[3] and "3 photos" in lines[3]
    assert lines[5].split() == ["class", "precision", "recall", "f1", "photos"]
    rows = {row.split()[0]: row.split()[1:] for row in lines[6:]}
    assert list(rows) == list(classifier.labels)
    for name, figures in expected.per_class.items():
        assert [float(cell) for cell in rows[name]] == pytest.approx(
            [figures.precision, figures.recall, figures.f1, figures.support], abs=5e-5
        )
    assert len({len(line) for line in lines[5:]}) == 1  # the columns are straight
    assert Metrics.from_dict(json.loads(output.read_text())) == expected


def test_evaluate_says_what_a_threshold_leaves(run_folder: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"glass": 2, "metal": 3})
    assert "Threshold" not in call("evaluate", "--model", run_folder, "--data", root).stdout
    scores = sorted(GarbageClassifier.from_pretrained(run_folder).predict(root.glob("*/*")), key=lambda p: p.score)
    threshold = (scores[1].score + scores[2].score) / 2
    arguments = ["evaluate", "--model", run_folder, "--data", root, "--json", tmp_path / "metrics.json", "--threshold"]
    result = call(*arguments, threshold)
    selective = Metrics.from_dict(json.loads((tmp_path / "metrics.json").read_text())).selective
    assert selective is not None and selective.coverage == 0.6
    assert (
        f"Threshold {threshold:g}: coverage 0.6000, accuracy of the answers {selective.accuracy:.4f}\n" in result.stdout
    )
    assert "coverage 0.0000\n" in call(*arguments, 1).stdout


def test_evaluate_names_photos_that_can_t_be_read_and_exits_2(run_folder: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"glass": 2})
    (root / "glass" / "glass2.jpg").write_bytes(b"")
    result = call("evaluate", "--model", run_folder, "--data", root)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"1 of 2 photos can't be read:\n{root / 'glass' / 'glass2.jpg'}: " in result.stderr


def test_a_file_that_can_t_be_written_is_a_sentence_too(run_folder: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"glass": 1})
    result = call("evaluate", "--model", run_folder, "--data", root, "--json", root)
    assert result.exit_code == 2
    assert "Is a directory" in result.stderr and result.stderr.count("\n") == 1


# As processes of their own


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_does_not_import_torch(flag: str) -> None:
    code = f"""
import sys
from ghost_resnet.cli import app
for command in ([], ["predict"], ["evaluate"], ["finetune"]):
    try:
        app([*command, {flag!r}])
    except SystemExit as end:
        assert not end.code
assert not {{"torch", "timm", "torchvision"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage:") == 4 and not done.stderr


@pytest.mark.parametrize("kind", ["text", "csv"])
def test_a_reader_that_has_had_enough_ends_the_command_quietly(kind: str, run_folder: Path, tmp_path: Path) -> None:
    draw().save(tmp_path / "1.png")
    (tmp_path / "notes.txt").touch()
    command = [*COMMAND, "predict", "--model", str(run_folder), "--format", kind, str(tmp_path)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        left_out = f"WARNING: 1 in {tmp_path} left out that are no photos, {tmp_path}/notes.txt first\n"
        assert process.stderr.read() == left_out
        assert process.wait(60) == 1


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """So many photos that their answers overflow a pipe that nobody empties."""
    folder = tmp_path / "many"
    folder.mkdir()
    draw(32, 32).save(folder / "0.png")
    for number in range(1, 1500):
        (folder / f"{number}.png").symlink_to("0.png")
    return folder


def test_control_c_exits_130_without_a_traceback(run_folder: Path, many: Path) -> None:
    command = [*COMMAND, "predict", "--model", str(run_folder), str(many)]
    listening = {"preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}  # a background job ignores it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **listening) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(str(many / "0.png"))
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()


def test_real_photos_and_a_broken_one(run_folder: Path, data_root: Path, tmp_path: Path) -> None:
    metal = data_root / "trashnet" / "metal"
    broken = tmp_path / "cut.jpg"
    broken.write_bytes((metal / "metal1.jpg").read_bytes()[:5000])
    result = call(
        "predict", "--model", run_folder, "--format", "jsonl", metal / "metal1.jpg", broken, metal / "metal2.jpg"
    )
    assert result.exit_code == 1 and str(broken) in result.stderr
    first, cut, second = map(json.loads, result.stdout.splitlines())
    assert cut["predicted_label"] is None and first["predicted_label"] and second["predicted_label"]
    assert first["scores"] != second["scores"]
