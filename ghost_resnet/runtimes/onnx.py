"""Running an exported network with ONNX Runtime. Does not import torch."""

import numpy as np
import numpy.typing as npt

from .. import hub
from ..errors import BackendError, WeightsError
from ..extras import require
from . import check_signature, exported_parameters


class OnnxRuntime:
    """ONNX Runtime on the CPU, with as many threads as there are cores.

    Args:
        files: What `hub.resolve` returned for an `.onnx` file.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ConfigError: The configuration does not fit the file.
        WeightsError: The file can't be read.
    """

    def __init__(self, files: hub.ModelFiles) -> None:
        ort = require("onnxruntime", "onnx")
        if files.weights.suffix != ".onnx":
            raise BackendError(f"the onnx back end runs .onnx files, got {files.weights}")
        self.parameters = exported_parameters(files)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors: its warnings are about the graph, which is not the caller's
        try:
            self.session = ort.InferenceSession(files.weights, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own, one class for each kind
            raise WeightsError(f"{files.weights} is no ONNX file that this onnxruntime runs: {error}") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        check_signature(files, [value.shape for value in inputs], [value.shape for value in outputs])
        self.input = inputs[0].name

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return self.session.run(None, {self.input: batch})[0]
