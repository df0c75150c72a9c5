"""The classifier: right scores, in order, lazily, whatever comes in between."""

import contextlib
import http.server
import io
import itertools
import json
import math
import pickle
import shutil
import subprocess
import sys
import threading
import time
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
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import ghost_resnet
from ghost_resnet import GarbageClassifier, Prediction, data, hub
from ghost_resnet.data import Preprocessing
from ghost_resnet.errors import ConfigError, OverflowedError, SourceError, UnreadableImageError
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


def test_below_the_threshold_there_is_no_label_but_the_scores_stay() -> None:
    sure = GarbageClassifier(Echo(2), ["a", "b"], RAW).predict(photo(1, 2))
    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW, threshold=sure.score)
    assert classifier.predict(photo(1, 2)) == sure and not sure.abstained
    unsure = GarbageClassifier(Echo(2), ["a", "b"], RAW, threshold=sure.score + 1e-9).predict(photo(1, 2))
    assert unsure == Prediction("", sure.score, sure.scores) and unsure.abstained
    assert unsure.to_report() == {"predicted_label": None, "scores": [["b", "0.731"], ["a", "0.269"]]}
    assert not classifier.predict(b"no image").abstained
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="threshold must be from 0 to 1"):
            GarbageClassifier(Echo(2), ["a", "b"], RAW, threshold=threshold)


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


# What goes in


def test_every_kind_of_source_gives_the_same_answer_alone_and_in_a_stream(tmp_path: Path, run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    picture = draw(60, 44)
    path = tmp_path / "photo.png"
    picture.save(path)
    content, array = path.read_bytes(), np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with path.open("rb") as file, Image.open(path) as unread:
        sources = [path, str(path), content, bytearray(content), file, io.BytesIO(content), unread, array, tensor]
        alone = [classifier.predict(source) for source in sources]
        together = classifier.predict(sources)
        assert not file.closed
    expected = pytest.approx(dict(alone[0].scores), abs=1e-5)
    assert all(dict(answer.scores) == expected for answer in (*alone, *together)), [a.error for a in alone]


def test_an_array_or_tensor_of_four_dimensions_is_several_photos() -> None:
    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    batch = np.stack([photo(1, 0), photo(0, 1), photo(2, 0)])
    assert [answer.label for answer in classifier.predict(batch)] == ["a", "b", "a"]
    tensors = torch.from_numpy(batch).permute(0, 3, 1, 2)
    assert [answer.label for answer in classifier.predict(tensors)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4, 4), torch.zeros(5, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)],
    ids=["float", "five channels", "two dimensions"],
)
def test_a_tensor_that_is_no_photo_is_an_error_with_its_type_and_shape(tensor: torch.Tensor) -> None:
    error = GarbageClassifier(Echo(2), ["a", "b"], RAW).predict(tensor).error
    assert f"got {tensor.dtype} of shape {tuple(tensor.shape)}" in str(error)


def test_no_source_whatever_raises() -> None:
    class Failing(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError("card removed")

    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    closed = io.BytesIO()
    closed.close()
    bad: list[Any] = [None, 7, object(), "", b"", io.StringIO("text"), closed, Failing(), np.zeros(3), "no\0name", {}]
    answers = classifier.predict([*bad, photo(1)])
    assert [answer.error is None for answer in answers] == [False] * len(bad) + [True]
    assert "card removed" in str(answers[7].error)
    assert classifier.predict(None).error and classifier.predict(7).error  # type: ignore[call-overload]


def test_what_the_caller_closes_or_overwrites_when_it_goes_on_was_read_before(tmp_path: Path) -> None:
    paths = [tmp_path / f"{value}.png" for value in range(40)]
    for value, path in enumerate(paths):
        Image.fromarray(photo(value)).save(path)
    frame = np.zeros((4, 4, 3), np.uint8)

    def files() -> Iterator[Any]:
        for path in paths:
            with path.open("rb") as file:
                yield file

    def images() -> Iterator[Any]:
        for path in paths:
            with Image.open(path) as image:
                yield image

    def frames() -> Iterator[Any]:
        for value in range(40):
            frame[0, 0, 0] = value
            yield frame

    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    for source in (files(), images(), frames()):
        assert [round(float(logits[0])) for logits in classifier.logits_stream(source)] == list(range(40))


class Site(http.server.BaseHTTPRequestHandler):
    """Pages by name."""

    def do_GET(self) -> None:
        content = encode(draw(4, 4), "PNG")
        if self.path == "/photo.png":
            self.answer(200, content)
        elif self.path == "/moved":
            self.answer(302, b"", Location="/photo.png")
        elif self.path == "/to-a-file":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif self.path == "/to-ftp":
            self.answer(302, b"", Location="ftp://127.0.0.1/photo.png")
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-9])
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        else:
            self.answer(404 if self.path == "/none" else 200, b"<html>")

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_downloaded_and_bad_ones_are_errors_that_name_them(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_DOWNLOAD", 10**6)
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 0.5)
    classifier = GarbageClassifier(Echo(2), ["a", "b"], RAW)
    expected = classifier.predict(encode(draw(4, 4), "PNG"))
    bad = {
        "/none": "404",
        "/to-a-file": "not allowed",
        "/to-ftp": "redirected to ftp, which is not followed",
        "/cut": "bytes are missing",
        "/endless": "expected at most 1,000,000 bytes",
        "/slow": "more than 0.5 s",
        "/page": "no image of a kind",
    }
    start = time.monotonic()
    answers = classifier.predict([f"{site}{page}" for page in ("/photo.png", *bad, "/moved")])
    assert time.monotonic() - start < 8
    assert answers[0] == answers[-1] == expected
    for page, answer in zip(bad, answers[1:-1], strict=True):
        assert bad[page] in str(answer.error) and f"{site}{page}" in str(answer.error)
    for url in ("http://127.0.0.1:1/x.png", "http://", "https://[bad/x", "http://host:port/"):
        assert url in str(classifier.predict(url).error)


def test_outputs_that_overflow_are_an_error_and_no_scores() -> None:
    class Overflowing(Echo):
        def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            return np.where(batch[:, 0, 0, :2] == 9, np.inf, batch[:, 0, 0, :2])

    answers = GarbageClassifier(Overflowing(), ["a", "b"], RAW).predict([photo(1), photo(9), photo(0, 1)])
    assert [answer.label for answer in answers] == ["a", "", "b"]
    assert isinstance(answers[1].error, OverflowedError) and answers[1].scores == []
    assert answers[1].to_report()["predicted_label"] is None


# Threads


def test_eight_threads_get_the_answers_of_one(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    photos = [draw(seed=seed) for seed in range(6)]
    expected = [dict(answer.scores) for answer in classifier.predict(photos)]
    start = threading.Barrier(8)

    def job(number: int) -> list[Prediction]:
        start.wait(30)
        return classifier.predict(photos) if number % 2 else [classifier.predict(one) for one in photos]

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(job, range(8)):
            for answer, scores in zip(answers, expected, strict=True):
                assert dict(answer.scores) == pytest.approx(scores, abs=1e-5)


def threads() -> set[threading.Thread]:
    """But for those of PyTorch's classifiers, which live as long as these do."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("ghost-resnet")}


def test_the_error_of_a_source_comes_after_the_answers_before_it_and_leaves_no_thread() -> None:
    def photos() -> Iterator[npt.NDArray[np.uint8]]:
        for number in range(21):
            yield photo(number % 2, 1 - number % 2)
        raise RuntimeError("camera unplugged")

    before = threads()
    answers = []
    with pytest.raises(RuntimeError, match="camera unplugged"):
        for answer in GarbageClassifier(Echo(2), ["a", "b"], RAW).predict_stream(photos(), batch_size=4):
            answers.append(answer.label)
    assert answers == ["b" if number % 2 == 0 else "a" for number in range(21)]
    assert threads() == before


@pytest.mark.parametrize("taken", [1, 9, 40])
def test_a_stream_that_is_closed_early_or_whose_network_fails_leaves_no_thread(taken: int) -> None:
    class Failing(Echo):
        def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            raise MemoryError("no room")

    before = threads()
    stream = GarbageClassifier(Echo(2), ["a", "b"], RAW).predict_stream([photo(1)] * 100, batch_size=8)
    for _ in range(taken):
        next(stream)
    assert threads() > before
    stream.close()  # type: ignore[attr-defined]
    assert threads() == before
    with pytest.raises(MemoryError):
        GarbageClassifier(Failing(), ["a"], RAW).predict([photo(1)] * taken)
    assert threads() == before


def test_the_network_runs_the_next_batch_while_the_caller_handles_the_last() -> None:
    ran = threading.Semaphore(0)

    class Telling(Echo):
        def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            ran.release()
            return super().__call__(batch)

    stream = GarbageClassifier(Telling(2), ["a", "b"], RAW).predict_stream([photo(1)] * 24, batch_size=8)
    next(stream)
    for _ in range(3):  # though nobody asks for a second answer
        assert ran.acquire(timeout=30)
    stream.close()  # type: ignore[attr-defined]


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


def test_torch_takes_as_many_threads_as_its_user_says(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    seen: list[int] = []
    classifier.runtime.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    usual = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            classifier.predict(draw())
            classifier.predict([draw()])
    finally:
        torch.set_num_threads(usual)
    assert seen == [1, 1, 3, 3]


def test_a_torch_classifier_can_be_sent_to_another_process(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    assert pickle.loads(pickle.dumps(classifier)).predict(draw()) == classifier.predict(draw())


def test_batches_hold_at_least_one_photo(run_folder: Path) -> None:
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    with pytest.raises(ConfigError, match="batch_size of 1 or more, got 0"):
        next(classifier.predict_stream([draw()], batch_size=0))


def test_torch_computes_in_one_thread_only(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of OpenMP threads that belong to several would get in each other's way."""
    threads: list[int] = []
    load = hub.load_model
    monkeypatch.setattr(hub, "load_model", lambda files: (threads.append(threading.get_ident()), load(files))[1])
    classifier = GarbageClassifier.from_pretrained(run_folder, device="cpu")
    classifier.runtime.model.register_forward_hook(lambda *_: threads.append(threading.get_ident()))
    classifier.predict(draw())
    classifier.predict([draw(), draw()])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(classifier.predict, [draw(), draw()]))
    assert len(threads) == 5 and len(set(threads)) == 1
    classifier.runtime.leave_thread()
    classifier.predict(draw())
    assert threads[-1] == threading.get_ident()


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
