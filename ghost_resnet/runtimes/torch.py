"""Running a network with PyTorch."""

import logging

import numpy as np
import numpy.typing as npt
import torch
from torch.fx.proxy import TraceError

from .. import hub
from ..folding import fold_batch_norm

logger = logging.getLogger(__name__)


class TorchRuntime:
    """Eager PyTorch: batch norms folded where torch.fx can, channels_last, on the GPU if there is one.

    channels_last is also what sends the depthwise convolutions to cuDNN on a GPU; see `docs/cuda.md`.

    Args:
        files: What `hub.resolve` returned.
        device: Such as "cpu" or "cuda:1"; None takes a GPU if there is one.
    """

    def __init__(self, files: hub.ModelFiles, device: str | None = None) -> None:
        model = hub.load_model(files)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            model = fold_batch_norm(model)
        except TraceError as error:  # as of some of timm's networks
            logger.info("batch norms stay as they are: %s", error)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        images = torch.from_numpy(batch).to(self.device, memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            return self.model(images).float().cpu().numpy()
