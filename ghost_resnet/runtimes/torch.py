"""Running a network with PyTorch."""

import numpy as np
import numpy.typing as npt
import torch

from .. import hub
from ..folding import fold_batch_norm


class TorchRuntime:
    """Eager PyTorch: batch norms folded, channels_last, on the GPU if there is one.

    channels_last is also what sends the depthwise convolutions to cuDNN on a GPU; see `docs/cuda.md`.

    Args:
        files: What `hub.resolve` returned.
        device: Such as "cpu" or "cuda:1"; None takes a GPU if there is one.
    """

    def __init__(self, files: hub.ModelFiles, device: str | None = None) -> None:
        model = hub.load_model(files)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = fold_batch_norm(model).to(self.device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        images = torch.from_numpy(batch).to(self.device, memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.float16, enabled=self.device.type == "cuda"):
            return self.model(images).float().cpu().numpy()
