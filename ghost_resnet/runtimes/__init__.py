"""What runs a network: one small class a back end, one interface."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Runtime(Protocol):
    """A network ready to run.

    Attributes:
        parameters: Number of the network's parameters.
    """

    parameters: int

    def __call__(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Turn preprocessed photos `(N, C, H, W)` into logits `(N, outputs)`."""
        ...
