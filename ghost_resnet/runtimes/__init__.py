"""What runs a network: one small class a back end, one interface."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .. import hub
from ..errors import BackendError, ConfigError

BACKENDS = {"torch": ".safetensors", "onnx": ".onnx", "openvino": ".xml"}
"""The back ends, and how the names of their weights files end."""


class Runtime(Protocol):
    """A network ready to run.

    Attributes:
        parameters: Number of the network's parameters.
    """

    parameters: int

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Turn preprocessed photos `(N, C, H, W)` into logits `(N, outputs)`."""
        ...


def open_runtime(
    files: hub.ModelFiles,
    *,
    device: str | None = None,
    precision: str | None = None,
    compile: bool = False,
) -> Runtime:
    """Get a network ready to run in the back end that its weights file is for.

    Args:
        files: What `hub.resolve` returned.
        device: For torch: such as "cpu" or "cuda:1"; None takes a GPU if there is one.
        precision: What to compute in: "fp32"; "bf16" in torch and openvino; "fp16" in torch on a GPU.
        compile: For torch: compile the network when the first batch comes.

    Raises:
        BackendError: The back end can't honour an argument.
        MissingExtraError: It is not installed.
        GhostResNetError: The files are not what they should be.
    """
    (backend,) = (name for name, suffix in BACKENDS.items() if suffix == files.weights.suffix)
    check_options(backend, device=device, precision=precision, compile=compile)
    if backend == "torch":
        from .torch import TorchRuntime

        return TorchRuntime(files, device, precision, compile)
    if backend == "openvino":
        from .openvino import OpenVinoRuntime

        return OpenVinoRuntime(files, precision)
    from .onnx import OnnxRuntime

    return OnnxRuntime(files)


def check_options(
    backend: str, *, device: str | None = None, precision: str | None = None, compile: bool = False
) -> None:
    """Refuse what a back end can do on no machine, before anything is exported for it.

    Raises:
        BackendError: The back end can't honour an argument of `open_runtime`.
    """
    if backend == "torch":
        return
    if device not in (None, "cpu") or compile:
        raise BackendError(
            f"the {backend} back end runs on the CPU and compiles by itself: leave out device and compile"
        )
    if backend == "onnx" and precision not in (None, "fp32"):
        raise BackendError(
            f"the onnx back end computes in the precision of the file: leave out precision={precision!r}"
        )
    if backend == "openvino" and precision not in (None, "fp32", "bf16"):
        raise BackendError(f"the openvino back end computes in fp32, bf16, got precision {precision!r}")


def exported_parameters(files: hub.ModelFiles) -> int:
    """The parameter count that an exported model carries.

    Raises:
        ConfigError: It carries none, or is a stand-alone graph that takes raw pixels.
    """
    exported = files.config.get("exported")
    if not isinstance(exported, dict) or type(exported.get("parameters")) is not int:
        raise ConfigError(
            f"{files.weights}: expected a model that `ghost-resnet export` made, with 'exported' in its configuration"
        )
    if exported.get("standalone"):
        raise ConfigError(
            f"{files.weights} takes raw pixels, for use without this package: export it without --standalone"
        )
    return exported["parameters"]


def check_signature(files: hub.ModelFiles, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Compare a graph's input and output shapes, a batch of any size, with its configuration.

    Raises:
        ConfigError: They don't fit.
    """
    size = files.config["pretrained_cfg"].get("input_size", [3, 224, 224])
    expected = [list(size)], [[files.num_classes]]
    got = [list(shape)[1:] for shape in inputs], [list(shape)[1:] for shape in outputs]
    if got != expected or (isinstance(inputs[0][0], int) and inputs[0][0] > 0):
        raise ConfigError(
            f"{files.weights}: its configuration says photos (N, {', '.join(map(str, size))}) and logits "
            f"(N, {files.num_classes}), any N; its graph has inputs {list(inputs)} and outputs {list(outputs)}"
        )
