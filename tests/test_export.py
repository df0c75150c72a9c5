"""Export: what comes out answers as PyTorch does, or does not come out at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import draw, write_folder
from PIL import Image
from torch import nn

from ghost_resnet import GarbageClassifier, hub
from ghost_resnet import export as module
from ghost_resnet.data import find_images
from ghost_resnet.errors import ConfigError, ExportError, MissingExtraError, WeightsError
from ghost_resnet.export import export

FILES = {"onnx": "model.onnx", "openvino": "model.xml"}


def need(form: str) -> None:
    """Skip a test whose extra is not installed."""
    for name in {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino"), "pt2": ()}[form]:
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn photos."""
    return write_folder(tmp_path_factory.mktemp("photos"), {"glass": 20, "metal": 20})


@pytest.fixture(scope="module")
def exported(run_folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small network in fp32, in both formats."""
    for form in FILES:
        need(form)
    folder = tmp_path_factory.mktemp("exported")
    return {form: export(run_folder, folder / form, format=form, photos=photos) for form in FILES}


def scores(classifier: GarbageClassifier, photos: Path) -> np.ndarray:
    """The probabilities of all outputs, one row a photo."""
    scaled = torch.from_numpy(logits(classifier, photos)) / classifier.temperature
    return scaled.softmax(1).numpy()


def logits(classifier: GarbageClassifier, photos: Path) -> np.ndarray:
    return np.stack(list(classifier.logits_stream(find_images(photos))))


# Answers


@pytest.mark.ecosystem
@pytest.mark.parametrize("form", FILES)
def test_exported_folder_answers_as_pytorch_does(
    exported: dict[str, Path], run_folder: Path, photos: Path, form: str
) -> None:
    original, classifier = (
        GarbageClassifier.from_pretrained(run_folder),
        GarbageClassifier.from_pretrained(exported[form]),
    )
    assert (classifier.labels, classifier.temperature) == (original.labels, original.temperature)
    assert (classifier.preprocessing, classifier.parameters) == (original.preprocessing, original.parameters)
    expected = logits(original, photos)
    np.testing.assert_allclose(logits(classifier, photos), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.ecosystem
@pytest.mark.parametrize("form", FILES)
def test_batch_of_any_size_goes_through(exported: dict[str, Path], form: str) -> None:
    classifier = GarbageClassifier.from_pretrained(exported[form])
    batch = np.random.default_rng(0).standard_normal((5, 3, 32, 32), np.float32)
    whole = classifier.runtime(batch)
    for first in (1, 2):
        parts = [classifier.runtime(part) for part in np.split(batch, [first])]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.ecosystem
@pytest.mark.parametrize("form", FILES)
def test_lone_file_carries_its_configuration(
    exported: dict[str, Path], photos: Path, tmp_path: Path, form: str
) -> None:
    for path in exported[form].glob("model.*"):
        shutil.copy(path, tmp_path)
    lone = GarbageClassifier.from_pretrained(tmp_path / FILES[form])
    assert lone.predict(next(find_images(photos))) == GarbageClassifier.from_pretrained(exported[form]).predict(
        next(find_images(photos))
    )
    config = hub.resolve(tmp_path / FILES[form]).config
    assert config == json.loads((exported[form] / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["license"] == "apache-2.0"


@pytest.mark.ecosystem
@pytest.mark.parametrize("form", FILES)
def test_fp16_takes_half_the_space_and_answers_nearly_as_fp32(
    run_folder: Path, exported: dict[str, Path], photos: Path, tmp_path: Path, form: str
) -> None:
    folder = export(run_folder, tmp_path / "out", format=form, precision="fp16", photos=photos)
    size = {path: sum(file.stat().st_size for file in path.glob("model.*")) for path in (folder, exported[form])}
    assert size[folder] < 0.6 * size[exported[form]]
    few = [scores(GarbageClassifier.from_pretrained(path), photos) for path in (folder, exported[form])]
    np.testing.assert_allclose(few[0], few[1], atol=0.01)
    assert np.abs(few[0] - few[1]).max() > 0


@pytest.mark.ecosystem
def test_standalone_graph_takes_pixels_and_gives_probabilities(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    need("onnx")
    import onnxruntime

    out = export(run_folder, tmp_path / "out", photos=photos, standalone=True)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [(value.name, value.type) for value in session.get_inputs()] == [("pixels", "tensor(uint8)")]
    pixels = np.stack([np.asarray(draw(32, 32, seed)) for seed in range(3)])
    (got,) = session.run(None, {"pixels": pixels})
    images = ((pixels / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2).astype(np.float32)
    expected = hub.load_model(run_folder)(torch.from_numpy(images)).detach() / 1.5
    np.testing.assert_allclose(got, expected.softmax(1), atol=1e-4)
    with pytest.raises(ConfigError, match="raw pixels"):
        GarbageClassifier.from_pretrained(out)


def test_pt2_answers_as_the_network_does(run_folder: Path, tmp_path: Path) -> None:
    out = export(run_folder, tmp_path / "out", format="pt2")
    extra = {"config.json": ""}
    program = torch.export.load(out / "model.pt2", extra_files=extra).module()
    assert json.loads(extra["config.json"])["label_names"][0] == "cardboard"
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program(images), hub.load_model(run_folder)(images), rtol=1e-3, atol=1e-3)


# int8


@pytest.mark.ecosystem
@pytest.mark.slow
def test_openvino_int8_computes_every_convolution_in_int8(run_folder: Path, photos: Path, tmp_path: Path) -> None:
    need("openvino")
    pytest.importorskip("nncf")
    out = export(run_folder, tmp_path / "out", format="openvino", precision="int8", photos=photos)
    classifier = GarbageClassifier.from_pretrained(out)
    ran = [op.get_rt_info() for op in classifier.runtime.single.get_runtime_model().get_ops()]
    precisions = [
        info["runtimePrecision"].astype(str) for info in ran if info["layerType"].astype(str).endswith("Convolution")
    ]
    assert len(precisions) > 15 and set(precisions) <= {"i8", "u8"}
    original = GarbageClassifier.from_pretrained(run_folder)
    same = logits(classifier, photos).argmax(1) == logits(original, photos).argmax(1)
    assert same.mean() >= module.AGREEMENT


@pytest.mark.ecosystem
@pytest.mark.slow
def test_onnx_int8_computes_every_convolution_in_int8(
    run_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx")
    monkeypatch.setattr(module, "AGREEMENT", 0.8)  # of an untrained network on twenty photos
    import onnx
    import onnxruntime

    out = export(run_folder, tmp_path / "out", precision="int8", photos=photos)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(out / "model.onnx", options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert "Conv" not in kinds and kinds.count("QLinearConv") > 15
    weights = [onnx.numpy_helper.to_array(t) for t in onnx.load(out / "model.onnx").graph.initializer]
    kernels = [array for array in weights if array.dtype == np.int8 and array.ndim == 4]
    assert len(kernels) > 15
    # instructions before VNNI add two products of uint8 and int8 in 16 bits
    assert all(2 * 255 * np.abs(kernel.astype(int)).max() < 2**15 for kernel in kernels)
    original = GarbageClassifier.from_pretrained(run_folder)
    same = logits(GarbageClassifier.from_pretrained(out), photos).argmax(1) == logits(original, photos).argmax(1)
    assert same.mean() >= module.AGREEMENT


@pytest.mark.ecosystem
@pytest.mark.slow
def test_one_extreme_photo_does_not_coarsen_onnx_int8(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx")
    monkeypatch.setattr(module, "AGREEMENT", 0.0)
    import onnx

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(9):
        pixels = np.full((32, 32, 3), 128, np.uint8)
        if not number:
            pixels[:16], pixels[16:] = 0, 255
        Image.fromarray(pixels).save(photos / f"{number}.png")
    out = export(run_folder, tmp_path / "out", precision="int8", photos=photos)
    graph = onnx.load(out / "model.onnx").graph
    first = next(
        node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == graph.input[0].name
    )
    scale = next(onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == first.input[1])
    assert 0 < 255 * float(scale) < 3.0  # of 4.0 from black to white, which one photo in nine has


# Refusals


@pytest.mark.ecosystem
def test_network_that_answers_otherwise_is_refused(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx")
    write = module._write_onnx

    def wrong(network: nn.Module, example: np.ndarray, path: Path) -> None:
        network.fc.bias.data[0] += 0.1  # a wrong translation
        write(network, example, path)

    monkeypatch.setattr(module, "_write_onnx", wrong)
    with pytest.raises(ExportError, match=r"expected probabilities within 0\.0001, got a difference of 0\.0"):
        export(run_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("got", "precision", "message"),
    [
        ([[0.6, 0.4], [0.4, 0.6]], "int8", "same class for 95% of 2 photos, got 50.0%"),
        ([[np.nan, 0.4], [0.6, 0.4]], "int8", "same class"),
        ([[np.nan, 0.4], [0.6, 0.4]], "fp16", "difference of inf"),
        ([[0.65, 0.35], [0.6, 0.4]], "fp16", r"within 0\.01, got a difference of 0\.05"),
    ],
)
def test_answers_beyond_tolerance_are_refused(got: list[list[float]], precision: str, message: str) -> None:
    expected = np.array([[0.6, 0.4], [0.6, 0.4]])
    module._check(expected + 1e-6, expected, precision)
    with pytest.raises(ExportError, match=message):
        module._check(np.array(got), expected, precision)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "expected a format of onnx, openvino, pt2, got 'tflite'"),
        ({"precision": "int4"}, "onnx is exported in fp32, fp16, int8, got precision 'int4'"),
        ({"format": "pt2", "precision": "int8"}, "pt2 is exported in fp32, got precision 'int8'"),
        ({"precision": "int8"}, "int8 is calibrated on photos"),
        ({"format": "pt2", "photos": "nowhere"}, "expected a folder of photos, got nowhere"),
        ({"format": "pt2", "photos": "{empty}"}, "expected photos below .*, got 0 files"),
        ({"format": "pt2", "photos": "{damaged}"}, "got 1 files that look like some, none readable"),
        ({"out": "{damaged}"}, "expected a folder to make, or an empty one"),
        ({"out": "{damaged}/1.jpg"}, "expected a folder to make, or an empty one"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    run_folder: Path, tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    places = {name: tmp_path / name for name in ("empty", "damaged")}
    for place in places.values():
        place.mkdir()
    (tmp_path / "damaged" / "1.jpg").write_bytes(b"\xff\xd8 no photo")
    given = {name: value.format(**places) for name, value in arguments.items()}
    with pytest.raises(ExportError, match=message) as caught:
        export(run_folder, **{"out": tmp_path / "out", **given})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize(
    ("missing", "form", "extra"),
    [("onnxscript", "onnx", "onnx"), ("onnxruntime", "onnx", "onnx"), ("openvino", "openvino", "openvino")],
)
def test_missing_library_is_named_with_its_extra(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, form: str, extra: str
) -> None:
    need(form)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf'{missing} .*pip install "ghost-resnet\[{extra}\]"'):
        export(run_folder, tmp_path / "out", format=form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ecosystem
@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"pretrained_cfg": {"input_size": [3, 64, 64]}}])
def test_configuration_that_does_not_fit_the_graph_is_refused(
    exported: dict[str, Path], tmp_path: Path, form: str, changes: dict[str, object]
) -> None:
    folder = shutil.copytree(exported[form], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(ConfigError, match="its graph has inputs"):
        GarbageClassifier.from_pretrained(folder)


@pytest.mark.ecosystem
@pytest.mark.parametrize(
    "text", ["no JSON", "{}", '{"architecture": "x", "num_classes": 1, "pretrained_cfg": 7}', None]
)
def test_embedded_configuration_is_checked(exported: dict[str, Path], tmp_path: Path, text: str | None) -> None:
    import onnx

    model = onnx.load(exported["onnx"] / "model.onnx")
    del model.metadata_props[:]
    if text is not None:
        onnx.helper.set_model_props(model, {hub.EMBEDDED_CONFIG: text})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match=r"model\.onnx|config\.json"):
        GarbageClassifier.from_pretrained(tmp_path)


@pytest.mark.ecosystem
@pytest.mark.parametrize("name", FILES.values())
def test_damaged_file_is_refused(exported: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no graph")
    with pytest.raises(WeightsError, match=name):
        hub.resolve(tmp_path)
    form = next(form for form, file in FILES.items() if file == name)
    shutil.copy(exported[form] / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=name):
        GarbageClassifier.from_pretrained(tmp_path)


# The cache of exported networks, and starting without torch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of exported networks, empty."""
    monkeypatch.setenv("GHOST_RESNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.ecosystem
@pytest.mark.parametrize("backend", FILES)
def test_weights_are_exported_once_for_a_back_end(
    run_folder: Path, photos: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    need(backend)
    expected = scores(GarbageClassifier.from_pretrained(run_folder), photos)
    np.testing.assert_allclose(
        scores(GarbageClassifier.from_pretrained(run_folder, backend=backend), photos), expected, atol=1e-4
    )
    (folder,) = cache.iterdir()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr(module, "export", again)
    GarbageClassifier.from_pretrained(run_folder, backend=backend)
    changed = shutil.copytree(run_folder, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text(encoding="utf-8"))
    (changed / "config.json").write_text(json.dumps(config | {"temperature": 2.0}), encoding="utf-8")
    with pytest.raises(AssertionError, match="exported again"):
        GarbageClassifier.from_pretrained(changed, backend=backend)
    assert list(cache.iterdir()) == [folder]


@pytest.mark.ecosystem
@pytest.mark.parametrize("backend", FILES)
def test_predict_starts_without_torch(exported: dict[str, Path], photos: Path, backend: str) -> None:
    photo = next(find_images(photos))
    code = (
        "import sys; from ghost_resnet.cli import app\n"
        f"app(['predict', '--backend', {backend!r}, '--model', {str(exported[backend])!r}, {str(photo)!r}], "
        "standalone_mode=False)\n"
        "print(*sorted(sys.modules.keys() & {'torch', 'torchvision', 'timm', 'scipy', 'huggingface_hub', 'onnx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, loaded = done.stdout.split("\n")[:2]
    assert answer.startswith(f"{photo}: ") and loaded == ""


@pytest.mark.ecosystem
def test_weights_in_the_cache_start_without_torch(run_folder: Path, photos: Path, cache: Path) -> None:
    need("onnx")
    GarbageClassifier.from_pretrained(run_folder, backend="onnx")
    code = (
        "import sys; from ghost_resnet import GarbageClassifier\n"
        f"classifier = GarbageClassifier.from_pretrained({str(run_folder)!r}, backend='onnx')\n"
        f"classifier.predict({str(next(find_images(photos)))!r})\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.ecosystem
def test_cache_that_cannot_be_written_to_is_named(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("onnx")
    (tmp_path / "file").touch()
    monkeypatch.setenv("GHOST_RESNET_CACHE", str(tmp_path / "file"))
    with pytest.raises(ExportError, match="set GHOST_RESNET_CACHE"):
        GarbageClassifier.from_pretrained(run_folder, backend="onnx")
