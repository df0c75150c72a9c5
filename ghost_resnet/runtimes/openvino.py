"""Running an exported network with OpenVINO. Does not import torch."""

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import hub
from ..errors import BackendError, WeightsError
from ..extras import require
from . import check_options, check_signature, exported_parameters

_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoRuntime:
    """OpenVINO on the CPU.

    Each call spreads over all cores (the latency hint): a classifier hands over one batch at a time, so several
    requests side by side (the throughput hint) would leave cores idle. Single photos have a network compiled for
    their shape alone, which answers 5 % sooner than one for any batch size.

    Args:
        files: What `hub.resolve` returned for an `.xml` file, whose `.bin` lies beside it.
        precision: What is not quantised in the file is computed in "fp32", or in "bf16" where the CPU has it
            natively. None means fp32, so that an answer does not depend on the CPU.

    Raises:
        BackendError: The CPU does not compute in bf16, or the back end not in what was asked for.
        MissingExtraError: openvino is not installed.
        ConfigError: The configuration does not fit the file.
        WeightsError: The file can't be read.
    """

    def __init__(self, files: hub.ModelFiles, precision: str | None = None) -> None:
        ov = require("openvino", "openvino")
        if files.weights.suffix != ".xml":
            raise BackendError(f"the openvino back end runs .xml files, got {files.weights}")
        check_options("openvino", precision=precision)
        self.parameters = exported_parameters(files)
        self._core = core = ov.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError("this CPU does not compute in bf16 natively: take fp32")
        self._hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision or "fp32"]}
        self._file = files.weights
        self._network = self._checked(core.read_model, files.weights)
        inputs, outputs = (
            [[-1 if side.is_dynamic else side.get_length() for side in port.partial_shape] for port in ports]
            for ports in (self._network.inputs, self._network.outputs)
        )
        check_signature(files, inputs, outputs)
        one = self._network.clone()
        one.reshape([1, *inputs[0][1:]])
        self.single = self._compile(one)
        self._local = threading.local()

    @cached_property
    def several(self) -> Any:
        """The network compiled for batches of any size, once there is one."""
        return self._compile(self._network)

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        kind = "single" if len(batch) == 1 else "several"
        requests = vars(self._local)  # a request serves one thread at a time
        if kind not in requests:
            requests[kind] = getattr(self, kind).create_infer_request()
        return requests[kind].infer([batch], share_inputs=True)[0]

    def _compile(self, network: Any) -> Any:
        return self._checked(self._core.compile_model, network, "CPU", self._hints)

    def _checked(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[-1]
            raise WeightsError(f"{self._file} is no file that this openvino runs: {line}") from error
