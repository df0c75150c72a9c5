"""The back ends as such: precision, threads, what each refuses."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghost_resnet import GarbageClassifier, hub
from ghost_resnet.errors import BackendError
from ghost_resnet.export import export, find_files
from ghost_resnet.runtimes import open_runtime

BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


@pytest.fixture(scope="module")
def folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network for every back end, in one folder."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    both = shutil.copytree(run_folder, tmp_path_factory.mktemp("both") / "model")
    made = export(run_folder, both.parent / "openvino", format="openvino")
    for path in made.glob("model.*"):
        shutil.copy(path, both)
    shutil.copy(export(run_folder, both.parent / "onnx") / "model.onnx", both)
    shutil.copy(made / "config.json", both)
    return both


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)


def answers(source: Path, images: np.ndarray, backend: str, **options: object) -> np.ndarray:
    return open_runtime(find_files(source, backend), **options)(images)


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("backend", "suffix"),
    [(None, ".safetensors"), ("torch", ".safetensors"), ("onnx", ".onnx"), ("openvino", ".xml")],
)
def test_back_end_takes_its_own_file_of_a_folder(folder: Path, backend: str | None, suffix: str) -> None:
    assert find_files(folder, backend).weights == folder / f"model{suffix}"


@pytest.mark.ecosystem
def test_back_ends_answer_alike(folder: Path, images: np.ndarray) -> None:
    expected = answers(folder, images, "torch")
    for backend in ("onnx", "openvino"):
        np.testing.assert_allclose(answers(folder, images, backend), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.ecosystem
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_threads_share_a_runtime(folder: Path, images: np.ndarray, backend: str) -> None:
    runtime = open_runtime(find_files(folder, backend))
    batches = [images + step for step in range(4)]
    expected = [runtime(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(runtime, batches * 2), expected * 2, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.ecosystem
def test_results_of_one_call_survive_the_next(folder: Path, images: np.ndarray) -> None:
    for backend in ("onnx", "openvino"):
        runtime = open_runtime(find_files(folder, backend))
        first = runtime(images)
        kept = first.copy()
        runtime(images + 1)
        np.testing.assert_array_equal(first, kept)


@pytest.mark.skipif(not BFLOAT16, reason="needs a CPU with bf16")
@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=pytest.mark.ecosystem)])
def test_bf16_answers_nearly_as_fp32(request: pytest.FixtureRequest, images: np.ndarray, backend: str) -> None:
    source = request.getfixturevalue("run_folder" if backend == "torch" else "folder")
    expected = answers(source, images, backend)
    got = answers(source, images, backend, precision="bf16")
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


@pytest.mark.slow
def test_compiled_network_answers_as_the_eager_one(run_folder: Path, images: np.ndarray) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    expected = answers(run_folder, images, "torch")
    got = answers(run_folder, images, "torch", compile=True)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "the torch back end computes in fp32, bf16, fp16, got precision 'int8'"),
        ({"precision": "fp16", "device": "cpu"}, "this CPU does not compute in fp16"),
        ({"backend": "tensorrt"}, "expected a back end of torch, onnx, openvino, got 'tensorrt'"),
    ],
)
def test_torch_refuses_what_it_cannot_do(run_folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        GarbageClassifier.from_pretrained(run_folder, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "onnx", "precision": "bf16"},
        {"backend": "onnx", "compile": True},
        {"backend": "openvino", "precision": "fp16"},
        {"backend": "openvino", "device": "cuda"},
    ],
)
def test_nothing_is_exported_for_what_a_back_end_does_nowhere(
    run_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghost_resnet.classifier.find_files", lambda *_: pytest.fail("looked for files"))
    with pytest.raises(BackendError, match=f"the {options['backend']} back end"):
        GarbageClassifier.from_pretrained(run_folder, **options)


def test_cpu_without_bf16_says_so(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(BackendError, match="this CPU does not compute in bf16 natively"):
        GarbageClassifier.from_pretrained(run_folder, device="cpu", precision="bf16")


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.onnx", {"precision": "bf16"}, "onnx back end computes in the precision of the file"),
        ("model.onnx", {"device": "cuda"}, "onnx back end runs on the CPU"),
        ("model.xml", {"compile": True}, "openvino back end runs on the CPU"),
        ("model.xml", {"precision": "int4"}, "openvino back end computes in fp32, bf16, got precision 'int4'"),
        ("model.xml", {"backend": "onnx"}, r"onnx back end does not run .*model\.xml"),
        ("model.onnx", {"backend": "torch"}, r"torch back end does not run .*model\.onnx"),
    ],
)
def test_back_ends_refuse_what_they_cannot_do(
    folder: Path, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        GarbageClassifier.from_pretrained(folder / name, **options)


@pytest.mark.ecosystem
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_file_of_unknown_origin_is_refused(folder: Path, backend: str) -> None:
    files = find_files(folder, backend)
    config = {name: value for name, value in files.config.items() if name != "exported"}
    with pytest.raises(hub.ConfigError, match="ghost-resnet export"):
        open_runtime(hub.ModelFiles(files.weights, config, files.source))
