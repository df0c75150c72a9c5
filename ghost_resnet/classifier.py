"""The face of inference: photos in, labels and scores out. Does not import torch."""

import io
import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import hub
from .data import ImageSource, Preprocessing, describe, is_tensor, read_image, usable_cores
from .errors import ConfigError, OverflowedError, UnreadableImageError
from .export import find_files
from .runtimes import Runtime, check_options, open_runtime

logger = logging.getLogger(__name__)

BATCH_SIZE = 16


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo.

    Attributes:
        label: The most likely class; "" if there is no answer, or the classifier abstains.
        score: Its probability, in 0..1.
        scores: Classes and probabilities, most likely first, five at most.
        error: Why there is no answer; None if there is one.
    """

    label: str = ""
    score: float = 0.0
    scores: list[tuple[str, float]] = field(default_factory=list)
    error: UnreadableImageError | OverflowedError | None = None

    @property
    def abstained(self) -> bool:
        """Whether the photo was read but the score is below the classifier's threshold."""
        return not self.label and self.error is None

    def to_report(self) -> dict[str, Any]:
        """The JSON shape of the university report's service."""
        if self.error:
            return {"predicted_label": None, "scores": [], "error": str(self.error)}
        return {
            "predicted_label": self.label or None,
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
        threshold: Abstain from an answer whose score is below it, in 0..1.

    Raises:
        ConfigError: No labels, a temperature that is not above 0, or a threshold that is not from 0 to 1.
    """

    def __init__(
        self,
        runtime: Runtime,
        labels: Sequence[str],
        preprocessing: Preprocessing,
        temperature: float = 1.0,
        threshold: float = 0.0,
    ) -> None:
        if not labels:
            raise ConfigError("this model names no classes: expected 'label_names' in its config.json")
        if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
            raise ConfigError(f"temperature must be a number above 0, got {temperature!r}")
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold must be from 0 to 1, got {threshold!r}")
        self.runtime = runtime
        self.labels = tuple(labels)
        self.preprocessing = preprocessing
        self.temperature = temperature
        self.threshold = threshold

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        backend: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        compile: bool = False,
        threshold: float = 0.0,
    ) -> "GarbageClassifier":
        """Open a classifier.

        Args:
            source: None for the package's default weights, a weight tag, a run folder, an exported folder, a
                .safetensors, .onnx or .xml file, "hf-hub:owner/repo@revision" or "local-dir:folder".
            backend: "torch", "onnx" or "openvino"; None goes by the weights file. For the latter two
                `.safetensors` weights are exported once, in fp32, into the user's cache; no later start
                imports torch.
            device: For torch: such as "cpu" or "cuda:1"; None takes a GPU if there is one.
            precision: What to compute in: "fp32"; "bf16" with torch and openvino on a CPU or GPU that has it;
                "fp16" with torch on a GPU. None takes fp16 on a GPU and fp32 on a CPU. What was exported in
                fp16 or int8 stays so.
            compile: For torch: compile the network when the first batch comes.
            threshold: Abstain from an answer whose score is below it, in 0..1.

        Raises:
            SourceError: Nothing by that name.
            BackendError: The back end can't do what is asked of it.
            MissingExtraError: It is not installed.
            GhostResNetError: Its files can't be had, or are not what they should be.
        """
        if backend is not None:
            check_options(backend, device=device, precision=precision, compile=compile)
        files = find_files(hub.default_tag() if source is None else source, backend)
        if source is None:
            about = files.config["pretrained_cfg"].get("description", "")
            logger.info("no model named, so taking %s. %s", files.source, about)
        return cls(
            open_runtime(files, device=device, precision=precision, compile=compile),
            files.labels,
            Preprocessing.from_config(files.config["pretrained_cfg"]),
            files.temperature,
            threshold,
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
        """Classify one photo, or each of several. Any number of threads may call it at once.

        Args:
            photos: A path, an http or https URL, the bytes of an image file, an open binary file, a PIL image, a
                uint8 array `(H, W[, 1, 3 or 4])` or tensor `(1, 3 or 4, H, W)`, or an iterable of such, which an
                array or tensor with one more dimension is.

        Returns:
            A `Prediction`, or a list of them in the order of the photos. One that can't be read has its
            `error` set.
        """
        if _is_one(photos):
            photo, batch = cast(ImageSource, photos), self._batch(1)
            return self._answer(describe(photo), *self._run(batch, [self._read(photo, batch[0])]))
        return list(self.predict_stream(cast(Iterable[ImageSource], photos)))

    def predict_stream(self, photos: Iterable[ImageSource], *, batch_size: int = BATCH_SIZE) -> Iterator[Prediction]:
        """Classify photos one after another, lazily, in order and in bounded memory.

        While one batch is answered, the network runs the next, and threads decode those after it, one thread a core.

        Args:
            photos: As in `predict`; at most four batches of them are in memory at a time. It is iterated in the
                caller's thread. What it raises is raised here, after the photos before have been answered. Files,
                images, arrays and tensors may be closed or overwritten when the next one is asked for.
            batch_size: Photos that go through the network at once.

        Yields:
            A `Prediction` for each photo. One that can't be read has its `error` set, the others go on.
        """
        with closing(self._stream(photos, batch_size)) as outputs:
            for name, logits in outputs:
                yield self._answer(name, logits)

    def logits_stream(
        self, photos: Iterable[ImageSource], *, batch_size: int = BATCH_SIZE
    ) -> Iterator[npt.NDArray[np.float32] | UnreadableImageError]:
        """The network's outputs `(outputs,)` for each photo, or why it can't be read; else as `predict_stream`."""
        with closing(self._stream(photos, batch_size)) as outputs:
            for _, logits in outputs:
                yield logits

    def _stream(
        self, photos: Iterable[ImageSource], batch_size: int
    ) -> Generator[tuple[str, npt.NDArray[np.float32] | UnreadableImageError], None, None]:
        """The name and the outputs, or the error, of each photo."""
        if batch_size < 1:
            raise ConfigError(f"expected a batch_size of 1 or more, got {batch_size}")
        remaining = iter(photos)
        readers, network = ThreadPoolExecutor(usable_cores()), ThreadPoolExecutor(1)
        pending: deque[tuple[list[str], Future[list[Any]]]] = deque()
        ended: Exception | None = None

        def submit() -> None:
            nonlocal ended
            batch, names, errors = self._batch(batch_size), list[str](), list[Future[UnreadableImageError | None]]()
            while len(names) < batch_size and not ended:
                try:
                    photo = next(remaining)
                except Exception as error:  # StopIteration, or what went wrong there
                    ended = error
                else:
                    names.append(describe(photo))
                    errors.append(readers.submit(self._read, _keep(photo), batch[len(errors)]))
            if names:
                run = network.submit(lambda: self._run(batch[: len(names)], [error.result() for error in errors]))
                pending.append((names, run))

        try:
            while not ended or pending:
                while not ended and len(pending) < 3:
                    submit()
                if pending:
                    names, run = pending.popleft()
                    outputs = run.result()
                    if not ended:
                        submit()  # before the answers go out, so that the network finds work meanwhile
                    yield from zip(names, outputs, strict=True)
            if not isinstance(ended, StopIteration):
                raise ended
        finally:
            network.shutdown(wait=False, cancel_futures=True)
            readers.shutdown(cancel_futures=True)
            network.shutdown()

    def _batch(self, size: int) -> npt.NDArray[np.float32]:
        return np.empty((size, *self.preprocessing.input_size), np.float32)

    def _read(
        self, photo: ImageSource | UnreadableImageError, out: npt.NDArray[np.float32]
    ) -> UnreadableImageError | None:
        if isinstance(photo, UnreadableImageError):
            return photo
        try:
            self.preprocessing.read(photo, out)
        except UnreadableImageError as error:
            return error
        return None

    def _run(
        self, batch: npt.NDArray[np.float32], errors: Sequence[UnreadableImageError | None]
    ) -> list[npt.NDArray[np.float32] | UnreadableImageError]:
        read = [place for place, error in enumerate(errors) if error is None]
        logits = iter(self.runtime(batch if len(read) == len(batch) else batch[read]) if read else ())
        return [next(logits) if error is None else error for error in errors]

    def _answer(self, name: str, logits: npt.NDArray[np.float32] | UnreadableImageError) -> Prediction:
        if isinstance(logits, UnreadableImageError):
            return Prediction(error=logits)
        if not np.isfinite(logits).all():
            return Prediction(error=OverflowedError(f"{name}: the network's outputs are no finite numbers"))
        scaled = logits.astype(np.float64) / self.temperature
        scores = np.exp(scaled - scaled.max())
        scores = (scores / scores.sum())[: len(self.labels)]
        best = np.argsort(-scores, kind="stable")[:5]
        ranked = [(self.labels[i], float(scores[i])) for i in best]
        label, score = ranked[0]
        return Prediction(label if score >= self.threshold else "", score, ranked)


def _is_one(photos: Any) -> bool:
    if isinstance(photos, np.ndarray) or is_tensor(photos):
        return photos.ndim < 4
    named = isinstance(photos, str | Path | bytes | bytearray | memoryview) or hasattr(photos, "read")
    return named or not isinstance(photos, Iterable)


def _keep(photo: ImageSource) -> ImageSource | UnreadableImageError:
    """What a thread may read later, even if the caller closes or overwrites `photo` meanwhile."""
    try:
        if isinstance(photo, Image.Image | np.ndarray) or is_tensor(photo):
            return read_image(photo)
        if not isinstance(photo, str | Path) and hasattr(photo, "read"):
            file: Any = photo
            if file.seekable():
                file.seek(0)
            kept: Any = io.BytesIO(file.read())
            kept.name = describe(file)
            return kept
    except UnreadableImageError as error:
        return error
    except Exception as error:  # a file may be anything with these methods
        return UnreadableImageError(f"{describe(photo)}: can't be read ({error})")
    return photo
