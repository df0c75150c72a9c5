"""Export: a trained network as an ONNX file, an OpenVINO IR or a PyTorch program, checked against PyTorch.

Everything but `pt2` goes through one ONNX graph: OpenVINO reads it, and both quantise it. Does not import torch
until something is exported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

from . import __version__, hub
from .data import Preprocessing, find_images
from .errors import BackendError, ExportError, UnreadableImageError
from .extras import require
from .files import atomic_folder, is_free, write_text
from .runtimes import BACKENDS

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

FORMATS = {
    "onnx": (".onnx", ("fp32", "fp16", "int8")),
    "openvino": (".xml", ("fp32", "fp16", "int8")),
    "pt2": (".pt2", ("fp32",)),
}
"""How the names of the files of each format end, and its precisions."""

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}
"""The largest difference from PyTorch that a probability may have."""
AGREEMENT = 0.95
"""Of int8: the least share of photos whose most likely class is PyTorch's."""

CALIBRATION_PHOTOS = 300
CHECK_PHOTOS = 64

Pixels = npt.NDArray[Any]
Answer = Callable[[Pixels], npt.NDArray[np.float32]]


def export(
    source: str | Path | hub.ModelFiles,
    out: str | Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    photos: str | Path | None = None,
    standalone: bool = False,
) -> Path:
    """Write a folder with a network as a graph and its `config.json`, which `GarbageClassifier` opens without torch.

    The graph takes preprocessed photos, float32 `(N, C, H, W)`, any N, and gives logits `(N, outputs)`. What comes
    out is compared with PyTorch before it is kept: no probability may differ by more than `TOLERANCE`; for int8
    the most likely class must be the same on a share of `AGREEMENT` of the photos.

    Args:
        source: What `hub.resolve` takes, or what it returned.
        out: Folder to make; it must be missing or empty.
        format: "onnx" (`model.onnx`), "openvino" (`model.xml`, `model.bin`) or "pt2" (`model.pt2`, which
            `torch.export.load` opens).
        precision: "fp32"; for onnx and openvino also "fp16" (weights take half the space) or "int8".
        photos: Folder of photos, for the comparison and the calibration of int8; which of them is drawn with a
            fixed seed. None compares on noise.
        standalone: For use without this package: the graph takes RGB pixels of the network's size, uint8
            `(N, H, W, C)`, and gives probabilities `(N, outputs)`.

    Returns:
        The folder.

    Raises:
        ExportError: A wrong argument, or the result differs from PyTorch beyond tolerance. Nothing is written.
        MissingExtraError: A library is missing.
        GhostResNetError: What `resolve` and `load_model` raise.
    """
    if format not in FORMATS:
        raise ExportError(f"expected a format of {', '.join(FORMATS)}, got {format!r}")
    suffix, precisions = FORMATS[format]
    if precision not in precisions:
        raise ExportError(f"{format} is exported in {', '.join(precisions)}, got precision {precision!r}")
    if precision == "int8" and photos is None:
        raise ExportError("int8 is calibrated on photos: name a folder of some hundred, of the kind it will see")
    out = Path(out)
    if not is_free(out):
        raise ExportError(f"expected a folder to make, or an empty one, got {out}")
    _require(format, precision)
    files = source if isinstance(source, hub.ModelFiles) else hub.resolve(source)
    preprocessing = Preprocessing.from_config(files.config["pretrained_cfg"])
    calibration, check = _photos(photos, preprocessing, CALIBRATION_PHOTOS if precision == "int8" else 0)

    original = hub.load_model(files)
    network = _for_inference(original)
    expected = _softmax(_in_batches(_torch_answers(original), check), files.temperature)
    config = {
        **files.config,
        "exported": {
            "parameters": sum(p.numel() for p in original.parameters()),
            "precision": precision,
            "standalone": standalone,
        },
    }
    with atomic_folder(out) as folder:
        path = folder / f"model{suffix}"
        graph = _standalone(network, preprocessing, files.temperature) if standalone else network
        inputs = [_pixels(batch, preprocessing) if standalone else batch for batch in (calibration, check)]
        if format == "pt2":
            _write_pt2(graph, inputs[1], path, config)
        else:
            _write_onnx(graph, inputs[1], folder / "model.onnx")
            _WRITERS[format, precision](folder / "model.onnx", inputs[0], config)
        got = _in_batches(_ANSWERS[format](path), inputs[1])
        _check(got if standalone else _softmax(got, files.temperature), expected, precision)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return out


def find_files(source: str | Path, backend: str | None = None) -> hub.ModelFiles:
    """Find the files that a source names, in the form that a back end runs.

    `.safetensors` weights are exported in fp32 for "onnx" and "openvino", once: what comes out is kept below the
    system's folder for caches, or in `GHOST_RESNET_CACHE`, under the hash of the weights and their configuration,
    this package's version and the format.

    Args:
        source: What `hub.resolve` takes.
        backend: "torch", "onnx" or "openvino"; None takes the files as they are.

    Raises:
        BackendError: No such back end, or it does not run such a file.
        ExportError: The cache can't be written to.
        GhostResNetError: What `hub.resolve` and `export` raise.
    """
    if backend is None:
        return hub.resolve(source)
    if backend not in BACKENDS:
        raise BackendError(f"expected a back end of {', '.join(BACKENDS)}, got {backend!r}")
    suffix = BACKENDS[backend]
    files = hub.resolve(source, prefer=suffix)
    if files.weights.suffix == suffix:
        return files
    if files.weights.suffix != ".safetensors":
        raise BackendError(f"the {backend} back end does not run {files.weights}: it takes {suffix} or .safetensors")
    folder = _cache_folder(files, backend)
    if not folder.is_dir():
        logger.warning("exporting %s for %s, once, to %s", files.source, backend, folder)
        try:
            export(files, folder, format=backend)
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise ExportError(
                    f"can't write to the cache of exported networks ({error}): set GHOST_RESNET_CACHE to a folder "
                    "that can be written to, or run `ghost-resnet export` and name what it makes"
                ) from error
    return replace(hub.resolve(folder, prefer=suffix), source=files.source)


def _cache_folder(files: hub.ModelFiles, backend: str) -> Path:
    root = Path(os.environ.get("GHOST_RESNET_CACHE") or user_cache_path("ghost-resnet"))
    hasher = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    with files.weights.open("rb") as file:
        while chunk := file.read(2**20):
            hasher.update(chunk)
    return root / f"{files.architecture}-{hasher.hexdigest()[:16]}-{__version__}-{backend}"


def _require(format: str, precision: str) -> None:
    """Look for the libraries now, not after minutes of work."""
    if format != "pt2":
        for module in ("onnx", "onnxscript", "onnxruntime" if format == "onnx" else "openvino"):
            require(module, format)
    if (format, precision) == ("openvino", "int8"):
        os.environ.setdefault("NNCF_CI", "1")  # read when nncf is imported: it then reports nothing to its makers
        require("nncf", format)


def _photos(folder: str | Path | None, preprocessing: Preprocessing, calibration: int) -> tuple[Pixels, Pixels]:
    """Photos to calibrate and photos to compare on, preprocessed; different ones if there are enough."""
    if folder is None:
        noise = np.random.default_rng(0).standard_normal((8, *preprocessing.input_size), np.float32)
        return noise, noise
    if not Path(folder).is_dir():
        raise ExportError(f"expected a folder of photos, got {folder}")
    paths = list(find_images(Path(folder)))
    random.Random(0).shuffle(paths)
    photos = list(_readable(paths[: CHECK_PHOTOS + calibration], preprocessing))
    if not photos:
        raise ExportError(f"expected photos below {folder}, got {len(paths)} files that look like some, none readable")
    check = min(CHECK_PHOTOS, max(1, len(photos) // 2)) if calibration else len(photos)
    return np.stack(photos[check:] or photos), np.stack(photos[:check])


def _readable(paths: Sequence[Path], preprocessing: Preprocessing) -> Iterator[npt.NDArray[np.float32]]:
    for path in paths:
        try:
            yield preprocessing.read(path)
        except UnreadableImageError as error:
            logger.warning("left out: %s", error)


def _for_inference(model: nn.Module) -> nn.Module:
    """The same network with batch norms folded, and Ghost modules' ones moved in front of the concatenation."""
    from torch.fx.proxy import TraceError

    from .folding import fold_batch_norm, split_ghost_norms

    network = split_ghost_norms(model)
    try:
        return fold_batch_norm(network)
    except TraceError:  # as of some of timm's networks
        return network


def _standalone(network: nn.Module, preprocessing: Preprocessing, temperature: float) -> nn.Module:
    """The network with normalisation before and the softmax behind it."""
    import torch

    class Standalone(torch.nn.Module):
        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor(preprocessing.mean) * 255)
            self.register_buffer("std", torch.tensor(preprocessing.std) * 255)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            images = ((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2)
            return (self.network(images) / temperature).softmax(1)

    return Standalone().eval()


def _pixels(photos: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The pixels `(N, H, W, C)` that preprocessed photos were made of."""
    pixels = photos.transpose(0, 2, 3, 1) * np.array(preprocessing.std) + np.array(preprocessing.mean)
    return (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _torch_answers(network: nn.Module) -> Answer:
    import torch

    @torch.inference_mode()
    def answer(batch: Pixels) -> npt.NDArray[np.float32]:
        return network(torch.from_numpy(batch)).numpy()

    return answer


def _in_batches(answer: Answer, photos: Pixels) -> npt.NDArray[np.float32]:
    return np.concatenate([answer(photos[start : start + 16]) for start in range(0, len(photos), 16)])


def _softmax(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    scores = np.exp(scaled - scaled.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def _check(got: npt.NDArray[Any], expected: npt.NDArray[np.float64], precision: str) -> None:
    """Refuse an export that does not answer as the original."""
    difference = float(np.abs(got - expected).max()) if np.isfinite(got).all() else float("inf")
    agreement = float((got.argmax(1) == expected.argmax(1)).mean())
    logger.info("probabilities differ by %.2g at most, %.1f %% same class", difference, 100 * agreement)
    if precision == "int8":
        if agreement < AGREEMENT or not np.isfinite(difference):
            raise ExportError(
                f"the int8 network does not answer as PyTorch does: expected the same class for {AGREEMENT:.0%} of "
                f"{len(got)} photos, got {agreement:.1%}; calibrate on more photos, or export in fp16"
            )
    elif not difference <= TOLERANCE[precision]:
        raise ExportError(
            f"the exported network does not answer as PyTorch does: expected probabilities within "
            f"{TOLERANCE[precision]:g}, got a difference of {difference:.2g}"
        )


def _write_pt2(network: nn.Module, example: Pixels, path: Path, config: dict[str, Any]) -> None:
    import torch

    program = torch.export.export(
        network, (torch.from_numpy(example[:2]),), dynamic_shapes=({0: torch.export.Dim("batch", max=2**31 - 1)},)
    )
    torch.export.save(program, path, extra_files={"config.json": json.dumps(config)})


def _write_onnx(network: nn.Module, example: Pixels, path: Path) -> None:
    import torch

    torch.onnx.export(
        network,
        (torch.from_numpy(example[:2]),),
        path,
        input_names=["pixels" if example.dtype == np.uint8 else "images"],
        output_names=["probabilities" if example.dtype == np.uint8 else "logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", max=2**31 - 1)},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _finish_onnx(path: Path, config: dict[str, Any]) -> None:
    """Put the configuration into the file."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path)
    model.producer_name, model.producer_version = "ghost-resnet", __version__
    model.doc_string = config["pretrained_cfg"].get("description") or ""
    onnx.helper.set_model_props(model, {hub.EMBEDDED_CONFIG: json.dumps(config)})
    onnx.save(model, path)


def _onnx_fp32(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    _finish_onnx(path, config)


def _onnx_fp16(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    onnx = require("onnx", "onnx")
    float16 = require("onnxruntime.transformers.float16", "onnx")
    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), path)
    _finish_onnx(path, config)


def _onnx_int8(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    quantization = require("onnxruntime.quantization", "onnx")
    pre_process = require("onnxruntime.quantization.shape_inference", "onnx").quant_pre_process

    Reader: Any = quantization.CalibrationDataReader

    class Photos(Reader):
        name = require("onnx", "onnx").load(path).graph.input[0].name
        batches = iter(np.array_split(calibration, len(calibration)))

        def get_next(self) -> dict[str, Pixels] | None:
            batch = next(self.batches, None)
            return None if batch is None else {self.name: batch}

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        pre_process(path, prepared)
        logging.disable(logging.WARNING)  # it warns of every bias that it has no channels for
        try:
            quantization.quantize_static(
                prepared,
                path,
                Photos(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,  # times int8 is what VNNI multiplies
                weight_type=quantization.QuantType.QInt8,
                reduce_range=True,  # of 7 bits: without VNNI, sums of two products of 8 bits overflow
                extra_options={"CalibMovingAverage": True},  # ranges of the usual photo, not of the most extreme
            )
        finally:
            logging.disable(logging.NOTSET)
    _finish_onnx(path, config)


def _finish_openvino(network: Any, path: Path, config: dict[str, Any], compress: bool = False) -> None:
    """Save an OpenVINO network with its configuration in place of the ONNX file that it came from."""
    network.set_rt_info(json.dumps(config), [hub.EMBEDDED_CONFIG])
    require("openvino", "openvino").save_model(network, path.with_suffix(".xml"), compress_to_fp16=compress)
    path.unlink()


def _read_openvino(path: Path) -> Any:
    # not openvino.convert_model, which reports its use to its makers unless one has opted out
    network = require("openvino", "openvino").Core().read_model(path.read_bytes())
    passes = require("openvino.passes", "openvino")
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())  # else NNCF takes the wrong axis of depthwise weights for channels
    manager.run_passes(network)
    return network


def _openvino_fp32(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    _finish_openvino(_read_openvino(path), path, config)


def _openvino_fp16(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    _finish_openvino(_read_openvino(path), path, config, compress=True)


def _openvino_int8(path: Path, calibration: Pixels, config: dict[str, Any]) -> None:
    nncf = require("nncf", "openvino")
    nncf.set_log_level(logging.ERROR)
    photos = np.array_split(calibration, len(calibration))
    with redirect_stdout(StringIO()):  # its progress bars
        network = nncf.quantize(_read_openvino(path), nncf.Dataset(photos), subset_size=len(photos))
    _finish_openvino(network, path, config)


def _onnx_answers(path: Path) -> Answer:
    session = require("onnxruntime", "onnx").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})[0]


def _openvino_answers(path: Path) -> Answer:
    compiled = require("openvino", "openvino").Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: compiled([batch], share_outputs=False)[0]


def _pt2_answers(path: Path) -> Answer:
    import torch

    return _torch_answers(torch.export.load(path).module())


_WRITERS = {
    ("onnx", "fp32"): _onnx_fp32,
    ("onnx", "fp16"): _onnx_fp16,
    ("onnx", "int8"): _onnx_int8,
    ("openvino", "fp32"): _openvino_fp32,
    ("openvino", "fp16"): _openvino_fp16,
    ("openvino", "int8"): _openvino_int8,
}
_ANSWERS = {"onnx": _onnx_answers, "openvino": _openvino_answers, "pt2": _pt2_answers}
