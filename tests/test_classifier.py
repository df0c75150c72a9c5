"""The classifier: right scores, in order, lazily, whatever comes in between."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from drawing import draw, encode
from timm.data import create_transform, resolve_model_data_config

import ghost_resnet
from ghost_resnet import GarbageClassifier, Prediction, hub
from ghost_resnet.data import Preprocessing
from ghost_resnet.errors import ConfigError, SourceError, UnreadableImageError
from ghost_resnet.runtimes.torch import TorchRuntime

LABELS = ("cardboard", "glass", "metal", "paper", "plastic", "trash")
RAW = Preprocessing((3, 4, 4), "nearest", 1.0, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


class Echo:
    """A network whose outputs are the red values of a photo's first pixels: what goes in is what comes out."""

    parameters = 42

    def __init__(self, outputs: int = 4) -> None:
        self.outputs = outputs
        self.batches: list[int] = []

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.batches.append(len(batch))
        return batch[:, 0].reshape(len(batch), -1)[:, : self.outputs]


def photo(*logits: float) -> npt.NDArray[np.uint8]:
    """A photo for which `Echo` gives these outputs."""
    image = np.zeros((4, 4, 3), np.uint8)
    image.reshape(-1, 3)[: len(logits), 0] = logits
    return image


def softmax(logits: Any) -> npt.NDArray[np.float64]:
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum()


def test_scores_are_the_softmax_with_the_likeliest_first() -> None:
    classifier = GarbageClassifier(Echo(), ["a", "b", "c", "d"], RAW)
    prediction = classifier.predict(photo(1, 3, 0, 2))
    first, second, third, fourth = np.sort(softmax([0, 1, 2, 3]))[::-1]
    assert [label for label, _ in prediction.scores] == ["b", "d", "a", "c"]
    assert [score for _, score in prediction.scores] == pytest.approx([first, second, third, fourth], abs=1e-6)
    assert (prediction.label, prediction.score, prediction.error) == ("b", prediction.scores[0][1], None)


def test_five_scores_at_most_and_ties_in_class_order() -> None:
    prediction = GarbageClassifier(Echo(6), LABELS, RAW).predict(photo(1, 1, 1, 1, 1, 1))
    assert [label for label, _ in prediction.scores] == list(LABELS[:5])


def test_temperature_divides_the_outputs() -> None:
    prediction = GarbageClassifier(Echo(2), ["a", "b"], RAW, temperature=2.5).predict(photo(5, 0))
    assert prediction.score == pytest.approx(softmax([2, 0])[0], abs=1e-6)


def test_outputs_without_a_label_are_no_answer_but_keep_their_share() -> None:
    prediction = GarbageClassifier(Echo(4), ["a", "b"], RAW).predict(photo(1, 2, 9, 0))
    assert prediction.label == "b"
    assert prediction.scores == [
        ("b", pytest.approx(softmax([1, 2, 9, 0])[1])),
        ("a", pytest.approx(softmax([1, 2, 9, 0])[0])),
    ]


def test_large_outputs_do_not_overflow() -> None:
    prediction = GarbageClassifier(Echo(2), ["a", "b"], RAW, temperature=1e-4).predict(photo(255, 0))
    assert prediction.scores == [("a", 1.0), ("b", 0.0)]


def test_one_photo_gives_one_answer_and_several_a_list() -> None:
    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    picture = photo(1)
    content = encode(draw(4, 4), "PNG")
    for one in (picture, content, draw(4, 4)):
        assert isinstance(classifier.predict(one), Prediction)
    assert [p.label for p in classifier.predict([picture, photo(0, 1)])] == ["a", "b"]
    assert [p.label for p in classifier.predict(x for x in (picture, photo(0, 1)))] == ["a", "b"]
    assert classifier.predict([]) == []


def test_one_path_or_open_file_is_one_photo(tmp_path: Path) -> None:
    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    path = tmp_path / "photo.png"
    draw(4, 4).save(path)
    with path.open("rb") as file:
        answers = [classifier.predict(source) for source in (path, str(path), file)]
    assert len({answer.score for answer in answers}) == 1 and answers[0].error is None


@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_answers_keep_the_order_of_the_photos(batch_size: int) -> None:
    runtime = Echo(2)
    classifier = GarbageClassifier(runtime, ["a", "b"], RAW)
    big = np.zeros((1500, 1500, 3), np.uint8)  # takes longer than those after it
    big[..., 0] = 7
    photos = [big if value == 7 else photo(value, 0) for value in range(60)]
    outputs = list(classifier.logits_stream(photos, batch_size=batch_size))
    assert [round(float(output[0])) for output in outputs] == list(range(60))
    assert max(runtime.batches) <= batch_size and len(runtime.batches) == -(-60 // batch_size)


def test_a_stream_reads_no_more_than_three_batches_ahead() -> None:
    drawn = 0

    def photos() -> Iterator[npt.NDArray[np.uint8]]:
        nonlocal drawn
        for number in range(10_000):
            drawn += 1
            yield photo(number % 2)

    stream = GarbageClassifier(Echo(2), ["a", "b"], RAW).predict_stream(photos(), batch_size=8)
    assert drawn == 0
    most = 0
    for answered, _ in enumerate(itertools.islice(stream, 400)):
        most = max(most, drawn - answered)
    assert 8 <= most <= 24 + 8
    stream.close()  # type: ignore[attr-defined]
    assert drawn < 440


def test_photos_that_can_t_be_read_are_answered_by_their_error_among_the_others(tmp_path: Path) -> None:
    runtime = Echo(2)
    classifier = GarbageClassifier(runtime, ["a", "b"], RAW)
    missing = tmp_path / "missing.jpg"
    photos: list[Any] = [photo(1), missing, photo(0, 1), b"", None, photo(1)]
    answers = list(classifier.predict_stream(photos, batch_size=2))
    assert [answer.label for answer in answers] == ["a", "", "b", "", "", "a"]
    assert [isinstance(answer.error, UnreadableImageError) for answer in answers] == [0, 1, 0, 1, 1, 0]
    assert str(missing) in str(answers[1].error)
    assert (answers[1].score, answers[1].scores) == (0.0, [])
    assert runtime.batches == [1, 1, 1]


def test_a_single_photo_that_can_t_be_read_is_an_answer_too() -> None:
    assert GarbageClassifier(Echo(2), ["a", "b"], RAW).predict("missing.jpg").error is not None


def test_only_unreadable_photos_never_reach_the_network() -> None:
    runtime = Echo()
    answers = GarbageClassifier(runtime, ["a"], RAW).predict([b""] * 20)
    assert all(answer.error for answer in answers) and len(answers) == 20 and runtime.batches == []


def test_errors_of_the_network_or_of_the_source_of_photos_are_not_swallowed() -> None:
    class Failing(Echo):
        def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            raise MemoryError("no room")

    def photos() -> Iterator[npt.NDArray[np.uint8]]:
        yield photo(1)
        raise RuntimeError("camera unplugged")

    with pytest.raises(MemoryError, match="no room"):
        GarbageClassifier(Failing(), ["a"], RAW).predict(photo(1))
    with pytest.raises(RuntimeError, match="camera unplugged"):
        GarbageClassifier(Echo(), ["a"], RAW).predict(photos())


def test_the_report_s_json_shape() -> None:
    scores = [("metal", 0.9968), ("glass", 0.0032), ("paper", 0.0), ("trash", 0.0), ("plastic", 0.0)]
    assert json.loads(json.dumps(Prediction("metal", 0.9968, scores).to_report())) == {
        "predicted_label": "metal",
        "scores": [
            ["metal", "0.997"],
            ["glass", "0.003"],
            ["paper", "0.000"],
            ["trash", "0.000"],
            ["plastic", "0.000"],
        ],
    }
    assert Prediction(error=UnreadableImageError("x.jpg: damaged")).to_report() == {
        "predicted_label": None,
        "scores": [],
        "error": "x.jpg: damaged",
    }


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_a_temperature_that_is_none_is_refused(temperature: Any) -> None:
    with pytest.raises(ConfigError, match="temperature must be a number above 0"):
        GarbageClassifier(Echo(), ["a"], RAW, temperature=temperature)


# From a run folder, on torch


def test_a_run_folder_opens_with_its_labels_preprocessing_and_temperature(run_folder: Path) -> None:
    for source in (run_folder, str(run_folder), f"local-dir:{run_folder}", run_folder / "model.safetensors"):
        classifier = GarbageClassifier.from_pretrained(source, device="cpu")
        assert classifier.labels == LABELS
        assert classifier.preprocessing == Preprocessing((3, 32, 32), crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3)
        assert classifier.temperature == 1.5
        expected = timm.create_model("ghost_resnet50_cifar", layers=(1, 1, 1, 1), num_classes=8)
        assert classifier.parameters == sum(p.numel() for p in expected.parameters())


def test_predictions_agree_with_plain_timm(run_folder: Path) -> None:
    photos = [draw(30 + 3 * i, 70 - 2 * i, i) for i in range(20)]
    model = timm.create_model(f"local-dir:{run_folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.inference_mode():
        outputs = model(torch.stack([transform(image) for image in photos])) / 1.5
    answers = GarbageClassifier.from_pretrained(run_folder, device="cpu").predict(photos)
    assert np.ptp([answer.score for answer in answers]) > 0.1  # or this would show little
    assert len({answer.label for answer in answers}) > 1
    for answer, probabilities in zip(answers, outputs.double().softmax(1)[:, :6], strict=True):
        best = probabilities.argsort(descending=True)[:5]
        assert [label for label, _ in answer.scores] == [LABELS[i] for i in best]
        assert [score for _, score in answer.scores] == pytest.approx(probabilities[best].tolist(), abs=1e-4)


def test_a_photo_s_answer_does_not_depend_on_its_neighbours(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    photos = [draw(seed=seed) for seed in range(7)]
    alone = [classifier.predict(picture).scores for picture in photos]
    together = [answer.scores for answer in classifier.predict(photos)]
    for one, other in zip(alone, together, strict=True):
        assert dict(one) == pytest.approx(dict(other), abs=1e-5)


def test_several_threads_may_share_a_classifier(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    jobs = [[draw(seed=10 * job + i) for i in range(5)] for job in range(12)]
    serial = [[answer.scores for answer in classifier.predict(job)] for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda job: [answer.scores for answer in classifier.predict(job)], jobs))
    for one, other in zip(itertools.chain(*serial), itertools.chain(*parallel), strict=True):
        assert dict(one) == pytest.approx(dict(other), abs=1e-6)


def test_the_torch_runtime_folds_batch_norms_and_keeps_no_graph(run_folder: Path) -> None:
    runtime = TorchRuntime(hub.resolve(run_folder), "cpu")
    left = [name for name, module in runtime.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert left == [f"layer{stage}.0.bn1" for stage in (1, 2, 3, 4)]  # these follow a concatenation, not a convolution
    assert runtime.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    outputs = runtime(np.zeros((2, 3, 32, 32), np.float32))
    assert outputs.dtype == np.float32 and outputs.shape == (2, 8)


def test_a_network_that_can_t_be_traced_runs_unfolded(tmp_path: Path) -> None:
    model = timm.create_model("mobilevit_xxs", num_classes=2).eval()
    hub.save_pretrained(model, tmp_path, labels=["a", "b"], preprocessing={"input_size": (3, 64, 64)})
    image = draw(73, 73)
    classifier = GarbageClassifier.from_pretrained(tmp_path, device="cpu")
    with torch.inference_mode():
        expected = model(torch.from_numpy(classifier.preprocessing(image))[None]).softmax(1)[0]
    assert dict(classifier.predict(image).scores) == pytest.approx(dict(zip("ab", expected.tolist(), strict=True)))


@pytest.mark.gpu
def test_a_gpu_gives_the_answers_of_the_cpu(run_folder: Path) -> None:
    photos = [draw(seed=seed) for seed in range(8)]
    cpu = GarbageClassifier.from_pretrained(run_folder, device="cpu").predict(photos)
    gpu = GarbageClassifier.from_pretrained(run_folder).predict(photos)
    for one, other in zip(cpu, gpu, strict=True):
        assert dict(one.scores) == pytest.approx(dict(other.scores), abs=0.02)


def changed(run_folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run folder with another config.json."""
    shutil.copytree(run_folder, to)
    config = json.loads((to / "config.json").read_text())
    for name, value in changes.items():
        (config["pretrained_cfg"] if name in config["pretrained_cfg"] else config)[name] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_names": []}, "names no classes"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"crop_mode": "border"}, "crop_mode"),
        ({"mean": [0.5]}, "mean"),
    ],
)
def test_a_config_that_can_t_be_honoured_is_refused_by_name(
    changes: dict[str, Any], message: str, run_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GarbageClassifier.from_pretrained(changed(run_folder, tmp_path / "run", **changes))


def test_a_name_that_means_nothing_is_refused() -> None:
    with pytest.raises(SourceError, match="no_such_model"):
        GarbageClassifier.from_pretrained("no_such_model")


def test_without_a_source_the_manifest_s_first_weights_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "manifest", dict)
    with pytest.raises(SourceError, match="name a run folder"):
        GarbageClassifier.from_pretrained()
    monkeypatch.setattr(hub, "default_tag", lambda: "the default")
    with pytest.raises(SourceError, match="the default"):
        GarbageClassifier.from_pretrained()


def test_the_classifier_does_not_need_torch_to_be_imported() -> None:
    code = "import sys, ghost_resnet; ghost_resnet.GarbageClassifier; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ghost_resnet.GarbageClassifier is GarbageClassifier
