"""Metrics against values worked out by hand, and evaluation of a classifier on a folder of photos."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from drawing import write_folder
from PIL import Image

import ghost_resnet
from ghost_resnet import GarbageClassifier, Metrics
from ghost_resnet.data import Photos, Preprocessing
from ghost_resnet.errors import DataError, OverflowedError, SourceError
from ghost_resnet.evaluation import ClassMetrics, Selective, compute_metrics, evaluate, fit_temperature


def calibrated_outputs(photos: int, seed: int) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Outputs whose softmax is the probability of each class, and classes drawn with it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (photos, 4))
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return logits, [int(rng.choice(4, p=row)) for row in scores]


def outputs_for(predicted: list[int], outputs: int, margin: float = 5.0) -> npt.NDArray[np.float32]:
    """Outputs whose largest is the predicted class, and whose others fall with the class's number."""
    logits = np.tile(-np.arange(outputs, dtype=np.float32) / 10, (len(predicted), 1))
    logits[range(len(predicted)), predicted] = margin
    return logits


def test_counts_and_rates_by_hand() -> None:
    #            a  a  a  a  b  b  c
    targets = [0, 0, 0, 0, 1, 1, 2]
    predicted = [0, 0, 0, 1, 1, 2, 0]
    metrics = compute_metrics(outputs_for(predicted, 3), targets, ["a", "b", "c"], 12)
    assert metrics.photos == 7 and metrics.parameters == 12
    assert metrics.confusion == [[3, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]]
    assert metrics.top1 == pytest.approx(4 / 7)
    assert metrics.top5 == 1.0  # of three classes, five hold every one
    assert metrics.per_class["a"] == ClassMetrics(*map(pytest.approx, (3 / 4, 3 / 4, 3 / 4)), support=4)
    assert metrics.per_class["b"] == ClassMetrics(*map(pytest.approx, (1 / 2, 1 / 2, 1 / 2)), support=2)
    assert metrics.per_class["c"] == ClassMetrics(0.0, 0.0, 0.0, support=1)
    assert metrics.macro_f1 == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_network_that_is_too_sure_or_not_sure_enough(factor: float) -> None:
    logits, targets = calibrated_outputs(3000, seed=0)
    assert fit_temperature(logits * factor, targets) == pytest.approx(factor, rel=0.1)


def test_a_few_photos_that_are_all_answered_rightly_do_not_make_the_scores_all_one() -> None:
    logits = outputs_for([0, 1, 2, 0], 3, margin=1.0)
    temperature = fit_temperature(logits, [0, 1, 2, 0])
    scores = torch.from_numpy(logits / temperature).softmax(1).amax(1)
    assert 0.25 < temperature < 1 and scores.max() < 0.95


def test_outputs_without_a_name_compete_and_have_a_column_of_their_own() -> None:
    """The report's network: a head of 100 for six classes."""
    targets = [0, 0, 1, 1]
    predicted = [0, 57, 99, 1]
    metrics = compute_metrics(outputs_for(predicted, 100), targets, ["a", "b"], 0)
    assert metrics.confusion == [[1, 0, 1], [0, 1, 1]]
    assert metrics.top1 == 0.5
    assert list(metrics.per_class) == ["a", "b"]
    assert metrics.per_class["a"] == ClassMetrics(1.0, 0.5, pytest.approx(2 / 3), 2)
    assert metrics.macro_f1 == pytest.approx(2 / 3)


def test_top_five_counts_the_right_class_among_the_five_likeliest_outputs() -> None:
    logits = np.array([[9, 8, 7, 6, 5, 4, 3]] * 7, np.float32)
    metrics = compute_metrics(logits, range(7), list("abcdefg"), 0)
    assert metrics.top1 == pytest.approx(1 / 7) and metrics.top5 == pytest.approx(5 / 7)


def test_classes_without_photos_count_for_nothing_in_macro_f1_but_are_listed() -> None:
    metrics = compute_metrics(outputs_for([0, 1, 1, 2], 4), [0, 1, 1, 1], ["a", "b", "c", "d"], 0)
    assert metrics.per_class["d"].support == metrics.per_class["c"].support == 0
    assert metrics.confusion[2] == metrics.confusion[3] == [0] * 5
    assert metrics.macro_f1 == pytest.approx((1 + 2 * (2 / 3) / (1 + 2 / 3)) / 2)


def test_loss_is_the_mean_cross_entropy() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    assert compute_metrics(logits, [0, 2], list("abc"), 0).loss == pytest.approx(-np.log([0.5, 0.1]).mean())


def test_calibration_error_of_a_case_worked_out_by_hand() -> None:
    """Ten photos at 0.9 confidence of which six are right, and ten at 0.6 of which all are."""
    probabilities = [[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10
    targets = [0] * 6 + [1] * 4 + [0] * 10
    metrics = compute_metrics(np.log(np.array(probabilities)), targets, ["a", "b"], 0)
    assert metrics.ece == pytest.approx((abs(0.9 - 0.6) + abs(0.6 - 1.0)) / 2, abs=1e-6)


def test_a_perfectly_calibrated_classifier_has_no_calibration_error() -> None:
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert compute_metrics(logits, [0, 0, 0, 1], ["a", "b"], 0).ece == pytest.approx(0, abs=1e-6)


def test_outputs_between_0_and_1_are_not_taken_for_probabilities() -> None:
    metrics = compute_metrics(np.array([[1.0, 0.0]] * 4), [0] * 4, ["a", "b"], 0)
    assert metrics.ece == pytest.approx(1 - np.e / (1 + np.e), abs=1e-6)


@pytest.mark.parametrize(("right", "photos"), [(180, 200), (50, 100), (3, 4)])
def test_the_interval_is_that_of_a_binomial_share_and_the_same_each_time(right: int, photos: int) -> None:
    logits = outputs_for([0] * right + [1] * (photos - right), 2)
    metrics = compute_metrics(logits, [0] * photos, ["a", "b"], 0)
    low, high = metrics.top1_interval
    assert 0 <= low < metrics.top1 < high <= 1
    spread = np.sqrt(metrics.top1 * (1 - metrics.top1) / photos)
    if photos >= 100:
        assert (low, high) == pytest.approx((metrics.top1 - 1.96 * spread, metrics.top1 + 1.96 * spread), abs=0.02)
    assert compute_metrics(logits, [0] * photos, ["a", "b"], 0).top1_interval == (low, high)


def test_the_interval_agrees_with_resampling_the_photos_themselves() -> None:
    correct = np.arange(252) < 93
    metrics = compute_metrics(outputs_for((~correct).astype(int).tolist(), 2), [0] * 252, ["a", "b"], 0)
    rng = np.random.default_rng(1)
    resampled = [rng.choice(correct, 252).mean() for _ in range(4000)]
    assert metrics.top1_interval == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.008)


@pytest.mark.parametrize(("predicted", "share"), [([0, 0], 1.0), ([1, 1], 0.0), ([0], 1.0)])
def test_all_right_all_wrong_and_one_photo_have_an_interval_too(predicted: list[int], share: float) -> None:
    metrics = compute_metrics(outputs_for(predicted, 2), [0] * len(predicted), ["a", "b"], 0)
    assert metrics.top1_interval == (share, share)


def logits_of(confidences: list[float]) -> npt.NDArray[np.float64]:
    """Outputs of two classes whose first gets these probabilities."""
    return np.log(np.array([[confidence, 1 - confidence] for confidence in confidences]))


def test_below_the_threshold_there_is_no_answer_and_the_others_are_counted() -> None:
    logits, targets = logits_of([0.95, 0.9, 0.8, 0.3, 0.6]), [0, 0, 1, 0, 0]
    metrics = compute_metrics(logits, targets, ["a", "b"], 0, threshold=0.75)
    assert metrics.selective == Selective(0.75, 3 / 5, pytest.approx(2 / 3)) and metrics.top1 == 3 / 5
    assert compute_metrics(logits, targets, ["a", "b"], 0).selective == Selective(0.0, 1.0, 3 / 5)
    assert compute_metrics(logits, targets, ["a", "b"], 0, threshold=0.99).selective == Selective(0.99, 0.0, None)


def test_outputs_without_a_name_lower_the_score_but_are_no_answers() -> None:
    """As in `predict`: the score is that of the best class with a name."""
    logits = np.log([[0.3, 0.1, 0.6]])
    assert compute_metrics(logits, [0], ["a", "b"], 0, threshold=0.29).selective == Selective(0.29, 1.0, 1.0)
    assert compute_metrics(logits, [0], ["a", "b"], 0, threshold=0.31).selective == Selective(0.31, 0.0, None)


def test_the_risk_coverage_curve_by_hand_and_the_threshold_for_an_accuracy() -> None:
    confidences = np.linspace(0.51, 0.99, 100)
    targets = (np.arange(100) < 40).astype(int)  # the forty least sure answers are wrong
    metrics = compute_metrics(logits_of(confidences.tolist()), targets.tolist(), ["a", "b"], 0)
    curve = metrics.risk_coverage
    assert [point.coverage for point in curve] == pytest.approx(np.arange(1.0, 0.0, -0.05).tolist())
    assert [point.accuracy for point in curve] == pytest.approx([min(1, 0.6 / point.coverage) for point in curve])
    assert [point.threshold for point in curve] == pytest.approx(confidences[::5].tolist(), abs=1e-6)
    assert metrics.threshold_for(1.0) == curve[8].threshold and metrics.threshold_for(0.6) == curve[0].threshold
    assert metrics.threshold_for(0.74) == curve[4].threshold and curve[4].accuracy == 0.75
    wrong = compute_metrics(logits_of([0.9] * 7), [1] * 7, ["a", "b"], 0)
    assert wrong.threshold_for(0.5) is None and len(wrong.risk_coverage) == 1, "tied scores are one point"


def test_metrics_come_back_from_json_as_they_were() -> None:
    metrics = compute_metrics(outputs_for([0, 1, 1, 7], 9), [0, 1, 0, 1], ["a", "b"], 21_565_060)
    back = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict())))
    assert back == metrics
    older = {name: value for name, value in metrics.to_dict().items() if name not in ("selective", "risk_coverage")}
    assert Metrics.from_dict(older).top1 == metrics.top1
    assert isinstance(back.top1_interval, tuple) and isinstance(back.per_class["a"], ClassMetrics)


def test_the_report_s_three_lines() -> None:
    metrics = compute_metrics(outputs_for([0] * 93 + [6] * 145 + [3] * 14, 100), [0] * 252, list("abcdef"), 21_565_060)
    assert metrics.report() == "Top 1 err: 0.6310\nTop 5 err: 0.0000\nParameter numbers: 21565060"


# Evaluation of a classifier


class ByRed:
    """A network that takes a photo's red mean for its class."""

    parameters = 7

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        red = np.rint(batch[:, 0].mean((1, 2)) * 255 / 50).astype(int)
        return outputs_for(red.tolist(), 5, margin=3.0)


@pytest.fixture
def classifier() -> GarbageClassifier:
    preprocessing = Preprocessing((3, 8, 8), "bilinear", 1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    return GarbageClassifier(ByRed(), ["zinc", "glass", "paper"], preprocessing, temperature=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos as red as the network's class: one paper looks like glass, one like no class that has a name."""
    for name, reds in {"zinc": [0, 0], "glass": [50], "paper": [100, 50, 200]}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, red in enumerate(reds):
            Image.new("RGB", (9, 8), (red, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_evaluate_takes_the_model_s_class_order_not_the_folder_s(classifier: GarbageClassifier, folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    metrics = evaluate(classifier, folder, on_progress=lambda done, of: calls.append((done, of)))
    assert list(metrics.per_class) == ["zinc", "glass", "paper"]
    assert metrics.confusion == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1]]
    assert (metrics.photos, metrics.parameters, metrics.top1) == (6, 7, pytest.approx(4 / 6))
    assert calls == [(done, 6) for done in range(1, 7)]


def test_evaluate_keeps_to_split_files(classifier: GarbageClassifier, folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_text("paper/0.png\npaper/1.png\n")
    metrics = evaluate(classifier, folder, splits=[split])
    assert metrics.photos == 2 and metrics.top1 == 0.5 and metrics.per_class["zinc"].support == 0


def test_evaluate_measures_calibrated_scores(classifier: GarbageClassifier, folder: Path) -> None:
    photos = Photos.from_folder(folder, classes=classifier.labels)
    logits = np.stack(list(classifier.logits_stream(photos.paths)))  # type: ignore[arg-type]
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits / 2.0), torch.tensor(photos.targets))
    assert evaluate(classifier, folder).loss == pytest.approx(float(expected))


def test_evaluate_takes_the_classifier_s_threshold(classifier: GarbageClassifier, folder: Path) -> None:
    answers = classifier.predict(Photos.from_folder(folder).paths)
    classifier.threshold = float(np.median([answer.score for answer in answers]))
    abstained = sum(answer.abstained for answer in classifier.predict(Photos.from_folder(folder).paths))
    selective = evaluate(classifier, folder).selective
    assert selective is not None and selective.threshold == classifier.threshold
    assert 0 < abstained < len(answers) and selective.coverage == pytest.approx(1 - abstained / len(answers))


def test_evaluate_names_every_photo_that_can_t_be_read(classifier: GarbageClassifier, folder: Path) -> None:
    broken = [folder / "glass" / "0.png", folder / "paper" / "2.png"]
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 6 photos can't be read:") as error:
        evaluate(classifier, folder)
    assert all(str(path) in str(error.value) for path in broken)


def test_evaluate_refuses_outputs_that_are_no_finite_numbers(classifier: GarbageClassifier, folder: Path) -> None:
    classify = classifier.runtime
    classifier.runtime = lambda batch: np.where(batch[:, 0, :1, 0] > 0.1, np.nan, classify(batch))  # type: ignore
    with pytest.raises(OverflowedError, match="no finite numbers for 4 of 6 photos: its weights are damaged"):
        evaluate(classifier, folder)


def test_evaluate_refuses_classes_that_the_model_does_not_know(classifier: GarbageClassifier, folder: Path) -> None:
    (folder / "wood").mkdir()
    shutil.copy(folder / "glass" / "0.png", folder / "wood" / "0.png")
    with pytest.raises(DataError, match="has the classes wood, which are not among zinc, glass, paper"):
        evaluate(classifier, folder)


def test_evaluate_opens_what_from_pretrained_opens(run_folder: Path, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "photos", {"glass": 2, "metal": 3})
    metrics = ghost_resnet.evaluate(run_folder, root)
    answers = GarbageClassifier.from_pretrained(run_folder).predict(Photos.from_folder(root).paths)
    right = [
        answer.label == path.parent.name for answer, path in zip(answers, Photos.from_folder(root).paths, strict=True)
    ]
    assert metrics.photos == 5 and metrics.top1 <= np.mean(right)  # unnamed outputs may win, but only in metrics
    with pytest.raises(SourceError):
        ghost_resnet.evaluate(tmp_path / "none", root)


def test_evaluate_on_real_photos_counts_them_by_class(run_folder: Path, data_root: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    names = ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
    split.write_text("".join(f"{name}/{name}{number}.jpg\n" for name in names for number in (1, 2)))
    metrics = evaluate(run_folder, data_root / "trashnet", splits=[split])
    assert [figures.support for figures in metrics.per_class.values()] == [2] * 6
    assert [sum(row) for row in metrics.confusion] == [2] * 6
