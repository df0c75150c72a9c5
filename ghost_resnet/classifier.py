"""The face of inference: photos in, labels and scores out. Does not import torch."""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import hub
from .data import ImageSource, Preprocessing
from .errors import ConfigError, UnreadableImageError
from .runtimes import Runtime

logger = logging.getLogger(__name__)

BATCH_SIZE = 16


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo.

    Attributes:
        label: The most likely class; "" if the photo could not be read.
        score: Its probability, in 0..1.
        scores: Classes and probabilities, most likely first, five at most.
        error: Why there is no answer; None if there is one.
    """

    label: str = ""
    score: float = 0.0
    scores: list[tuple[str, float]] = field(default_factory=list)
    error: UnreadableImageError | None = None

    def to_report(self) -> dict[str, Any]:
        """The JSON shape of the university report's service."""
        if self.error:
            return {"predicted_label": None, "scores": [], "error": str(self.error)}
        return {
            "predicted_label": self.label,
            "scores": [[label, f"{score:.3f}"] for label, score in self.scores],
        }


class GarbageClassifier:
    """Says which of its classes a photo shows.

    Args:
        runtime: What runs the network.
        labels: Class names; the network's output i is class i. Outputs beyond them are never an answer, but
            take their share of the probability.
        preprocessing: What is done to a photo first.
        temperature: The logits are divided by it, so that scores are calibrated (Guo et al., 2017).

    Raises:
        ConfigError: No labels, or a temperature that is not above 0.
    """

    def __init__(
        self,
        runtime: Runtime,
        labels: Sequence[str],
        preprocessing: Preprocessing,
        temperature: float = 1.0,
    ) -> None:
        if not labels:
            raise ConfigError("this model names no classes: expected 'label_names' in its config.json")
        if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature must be a number above 0, got {temperature!r}")
        self.runtime = runtime
        self.labels = tuple(labels)
        self.preprocessing = preprocessing
        self.temperature = temperature

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, *, device: str | None = None) -> "GarbageClassifier":
        """Open a classifier.

        Args:
            source: None for the package's default weights, a weight tag, a run folder, a .safetensors file,
                "hf-hub:owner/repo@revision" or "local-dir:folder".
            device: Such as "cpu" or "cuda:1"; None takes a GPU if there is one.

        Raises:
            SourceError: Nothing by that name.
            GhostResNetError: Its files can't be had, or are not what they should be.
        """
        from .runtimes.torch import TorchRuntime

        files = hub.resolve(hub.default_tag() if source is None else source)
        if source is None:
            about = files.config["pretrained_cfg"].get("description", "")
            logger.warning("no model named, so taking %s. %s", files.source, about)
        return cls(
            TorchRuntime(files, device),
            files.labels,
            Preprocessing.from_config(files.config["pretrained_cfg"]),
            files.temperature,
        )

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return self.runtime.parameters

    @overload
    def predict(self, photos: ImageSource) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, photos: Iterable[ImageSource]) -> list[Prediction]: ...

    def predict(self, photos: ImageSource | Iterable[ImageSource]) -> Prediction | list[Prediction]:
        """Classify one photo, or each of several.

        Args:
            photos: A path, the bytes of an image file, an open binary file, a PIL image, a uint8 array
                `(H, W[, 1, 3 or 4])`, or an iterable of such.

        Returns:
            A `Prediction`, or a list of them in the order of the photos. One that can't be read has its
            `error` set.
        """
        if isinstance(photos, str | Path | bytes | Image.Image | np.ndarray) or hasattr(photos, "read"):
            return next(self.predict_stream([photos]))  # type: ignore[list-item]
        return list(self.predict_stream(photos))

    def predict_stream(self, photos: Iterable[ImageSource], *, batch_size: int = BATCH_SIZE) -> Iterator[Prediction]:
        """Classify photos one after another, lazily, in order and in bounded memory.

        Args:
            photos: As in `predict`; at most three batches of them are in memory at a time.
            batch_size: Photos that go through the network at once.

        Yields:
            A `Prediction` for each photo. One that can't be read has its `error` set, the others go on.
        """
        for logits in self.logits_stream(photos, batch_size=batch_size):
            yield self._answer(logits)

    def logits_stream(
        self, photos: Iterable[ImageSource], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[npt.NDArray[np.float32] | UnreadableImageError]:
        """The network's outputs `(outputs,)` for each photo, or why it can't be read.

        Photos are decoded in threads, at most two batches ahead of the network.
        """
        remaining = iter(photos)
        with ThreadPoolExecutor() as pool:
            pending: deque[Future[npt.NDArray[np.float32] | UnreadableImageError]] = deque()

            def submit(count: int) -> None:
                pending.extend(pool.submit(self._read, p) for p in itertools.islice(remaining, count))

            submit(3 * batch_size)
            while pending:
                batch = [pending.popleft().result() for _ in range(min(batch_size, len(pending)))]
                submit(batch_size)
                images = [item for item in batch if isinstance(item, np.ndarray)]
                logits = iter(self.runtime(np.stack(images)) if images else ())
                for item in batch:
                    yield next(logits) if isinstance(item, np.ndarray) else item

    def _read(self, photo: ImageSource) -> npt.NDArray[np.float32] | UnreadableImageError:
        try:
            return self.preprocessing.read(photo)
        except UnreadableImageError as error:
            return error

    def _answer(self, logits: npt.NDArray[np.float32] | UnreadableImageError) -> Prediction:
        if isinstance(logits, UnreadableImageError):
            return Prediction(error=logits)
        scaled = logits.astype(np.float64) / self.temperature
        scores = np.exp(scaled - scaled.max())
        scores = (scores / scores.sum())[: len(self.labels)]
        best = np.argsort(-scores, kind="stable")[:5]
        ranked = [(self.labels[i], float(scores[i])) for i in best]
        return Prediction(*ranked[0], ranked)
