"""Running a network with PyTorch."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx.proxy import TraceError

from .. import hub
from ..errors import BackendError
from ..folding import fold_batch_norm

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchRuntime:
    """PyTorch: batch norms folded where torch.fx can, channels_last, on the GPU if there is one.

    channels_last is also what sends the depthwise convolutions to cuDNN on a GPU; see `docs/cuda.md`.

    All of it happens in one thread of its own. Every thread that PyTorch computes in has a pool of OpenMP threads; when
    the pools together have more threads than the machine has cores, they sleep at every layer's end instead of waiting
    awake, and a photo takes 1.4 times as long (`docs/speed.md`).

    Args:
        files: What `hub.resolve` returned.
        device: Such as "cpu" or "cuda:1"; None takes a GPU if there is one.
        precision: "fp32", "bf16" or "fp16"; None takes fp16 on a GPU and fp32 elsewhere.
        compile: Compile the network with `torch.compile` when the first batch comes.

    Raises:
        BackendError: A precision that the device does not compute in.
    """

    def __init__(
        self, files: hub.ModelFiles, device: str | None = None, precision: str | None = None, compile: bool = False
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.device.index is None:  # a thread has a current device of its own
            self.device = torch.device("cuda", torch.cuda.current_device())
        if precision is None:
            precision = "fp16" if self.device.type == "cuda" else "fp32"
        if precision not in _DTYPES:
            raise BackendError(f"the torch back end computes in {', '.join(_DTYPES)}, got precision {precision!r}")
        if self.device.type == "cpu" and (
            precision == "fp16" or (precision == "bf16" and not torch.cpu._is_avx512_bf16_supported())
        ):
            raise BackendError(f"this CPU does not compute in {precision} natively: take fp32")
        self.dtype = _DTYPES[precision]
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "ghost-resnet")
        model = self._thread.submit(self._load, files).result()
        self.model = torch.compile(model) if compile else model

    def _load(self, files: hub.ModelFiles) -> nn.Module:
        model = hub.load_model(files)
        self.parameters = sum(p.numel() for p in model.parameters())
        try:
            model = fold_batch_norm(model)
        except TraceError as error:  # as of some of timm's networks
            logger.info("batch norms stay as they are: %s", error)
        # cast once; autocast would convert the weights again for every batch
        return model.to(self.device, self.dtype).to(memory_format=torch.channels_last)

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._thread is None:
            return self._run(batch, torch.get_num_threads())
        return self._thread.submit(self._run, batch, torch.get_num_threads()).result()

    def leave_thread(self) -> None:
        """From now on compute in the thread that asks: for programs that compute with PyTorch there anyway."""
        if self._thread:
            self._thread.shutdown()
        self._thread = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_thread": ThreadPoolExecutor(1, "ghost-resnet")}

    @torch.inference_mode()
    def _run(self, batch: npt.NDArray[np.float32], threads: int) -> npt.NDArray[np.float32]:
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        images = torch.from_numpy(batch).to(self.device, self.dtype, memory_format=torch.channels_last)
        return self.model(images).float().cpu().numpy()
