"""Photos: reading them, folders and split files, preprocessing.

Nothing here imports torch, so that a predictor on an exported model does not have to.
"""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError, UnreadableImageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .ppm".split())
MAX_PIXELS = 100_000_000
"""Photos with more pixels than this are refused before they are decoded."""

ImageSource = str | Path | bytes | BinaryIO | Image.Image | npt.NDArray[Any]
"""What `read_image` takes."""


def read_image(source: ImageSource, *, min_side: int | None = None) -> Image.Image:
    """Read a photo as upright 8-bit RGB, whatever it is stored as.

    EXIF orientation is applied, transparency is laid over white, 16-bit images are scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        source: A path, the bytes of an image file, an open binary file, a PIL image, or an array
            `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` of dtype uint8.
        min_side: Allow a JPEG to be decoded at a reduced scale whose shorter side is at least this many
            pixels, which is several times faster for large photos.

    Raises:
        UnreadableImageError: Not an image, damaged, empty, or larger than `MAX_PIXELS`.
    """
    name = _describe(source)
    try:
        if isinstance(source, np.ndarray):
            image = _image_from_array(source, name)
        elif isinstance(source, Image.Image):
            image = source
        else:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableImageError(
                f"{name}: {width} x {height} pixels are more than the {MAX_PIXELS:,} that are read; "
                "make it smaller first"
            )
        if min_side and image.format == "JPEG" and not isinstance(source, Image.Image):
            scale = min_side / min(width, height)
            if scale < 1:
                image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except UnreadableImageError:
        raise
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise UnreadableImageError(f"{name}: a folder, not a photo") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name}: not an image, or a kind that can't be read") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name}: far too many pixels ({error}); make it smaller first") from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise UnreadableImageError(f"{name}: damaged or cut short ({error})") from error


def _describe(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    return f"image given as {type(source).__name__}"


def _image_from_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shape_ok or array.size == 0:
        raise UnreadableImageError(
            f"{name}: expected uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError(f"{name}: integer pixels beyond 16 bits; save it as 8-bit RGB")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableImageError(f"{name}: floating-point pixels have no fixed range; save it as 8-bit RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")  # decodes, so a file cut short fails here


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an RGB photo before a network sees it, exactly as timm's evaluation transform does it.

    Attributes:
        input_size: Channels (1 or 3), height, width of the network's input.
        interpolation: "nearest", "bilinear" or "bicubic".
        crop_pct: Share of the resized photo's side that the central crop keeps, in (0, 1].
        crop_mode: "center" (shorter side resized, then cropped) or "squash" (aspect ratio given up).
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if self.interpolation.upper() not in ("NEAREST", "BILINEAR", "BICUBIC"):
            raise DataError(f"interpolation must be nearest, bilinear or bicubic, got {self.interpolation!r}")
        if self.crop_mode not in ("center", "squash"):
            raise DataError(f"crop_mode must be 'center' or 'squash', got {self.crop_mode!r}")
        if height != width or channels not in (1, 3) or height < 1:
            raise DataError(f"input_size must be (1 or 3, side, side), got {self.input_size}")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        if not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise DataError(
                f"mean and std must hold {channels} numbers, std above 0; got {self.mean}, {self.std}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Take the preprocessing part of a timm pretrained_cfg."""
        names = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        given = {name: config[name] for name in names if config.get(name) is not None}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    @property
    def resize(self) -> int:
        """Side, in pixels, to which a photo is resized before the central crop."""
        return math.floor(self.input_size[1] / self.crop_pct)

    def read(self, source: ImageSource) -> npt.NDArray[np.float32]:
        """Read a photo and preprocess it; large JPEGs are decoded at a reduced scale first.

        Raises:
            UnreadableImageError: As `read_image`.
        """
        return self(read_image(source, min_side=2 * self.resize))

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Turn an RGB photo into float32 of shape `input_size`."""
        channels, side, _ = self.input_size
        image = resize(
            image, self.resize, squash=self.crop_mode == "squash", interpolation=self.interpolation
        )
        left = round((image.width - side) / 2.0)
        top = round((image.height - side) / 2.0)
        image = image.crop((left, top, left + side, top + side))
        if channels == 1:
            image = image.convert("L")
        pixels = np.asarray(image, np.float32).reshape(side, side, channels) / np.float32(255)
        normalised = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def resize(
    image: Image.Image, side: int, *, squash: bool = False, interpolation: str = "bicubic"
) -> Image.Image:
    """Resize so that the shorter side is `side` pixels long, or both sides if `squash`."""
    if squash:
        size = (side, side)
    else:
        shorter, longer = sorted(image.size)
        longer = int(side * longer / shorter)
        size = (side, longer) if image.width <= image.height else (longer, side)
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling[interpolation.upper()])


@dataclass(frozen=True)
class Photos:
    """Labelled photos on disk, with the class order made explicit.

    Attributes:
        paths: One path a photo.
        targets: The index into `classes` of each photo.
        classes: Class names, in the order of the network's outputs.
    """

    paths: tuple[Path, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Number of photos of each class, in class order."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    @classmethod
    def from_folder(
        cls, root: str | Path, *, splits: Sequence[str | Path] = (), classes: Sequence[str] | None = None
    ) -> "Photos":
        """Find the photos below a folder that holds one folder a class.

        Args:
            root: Folder of class folders.
            splits: Split files to keep to, each with one `class/file.jpg` a line, relative to `root`. None
                takes every image file below `root`.
            classes: Class names in the order wanted, which may be more than the folder holds. None takes the
                names of the class folders, sorted.

        Raises:
            DataError: No such folder, no photos, a listed photo that is missing, an unknown class.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"expected a folder of class folders at {root}, found none")
        found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        order = tuple(classes) if classes is not None else tuple(found)
        listed = (
            _read_splits(root, splits)
            if splits
            else [path.relative_to(root) for name in found for path in find_images(root / name)]
        )
        if unknown := sorted({path.parts[0] for path in listed} - set(order)):
            raise DataError(
                f"{root} has the classes {', '.join(unknown)}, which are not among {', '.join(order)}: "
                "take a model that knows them, or remove these photos"
            )
        if not listed:
            raise DataError(f"no photos under {root}: expected {root}/<class>/<photo>.jpg")
        index = {name: i for i, name in enumerate(order)}
        return cls(
            tuple(root / path for path in listed), tuple(index[path.parts[0]] for path in listed), order
        )


def find_images(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; hidden ones and other files are left out."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if len(images) < len(files):
        other = next(path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES)
        logger.warning("%d files in %s are no photos, %s first", len(files) - len(images), folder, other)
    return images


def _read_splits(root: Path, splits: Iterable[str | Path]) -> list[Path]:
    listed: dict[Path, None] = {}
    for split in map(Path, splits):
        if not split.is_file():
            raise DataError(f"no split file at {split}: expected a text file with one class/file.jpg a line")
        for number, line in enumerate(split.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            path = Path(line.strip())
            if path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
                raise DataError(f"{split}, line {number}: expected class/file.jpg, got {line.strip()!r}")
            if path in listed:
                logger.warning("%s, line %d: %s is listed twice and is taken once", split, number, path)
            listed[path] = None
    missing = [path for path in listed if not (root / path).is_file()]
    if missing:
        raise DataError(f"{len(missing)} listed photos are missing under {root}, {missing[0]} first")
    return list(listed)


class PhotoDataset:
    """A map-style dataset of `(transform(photo), class index)`, in training, for `torch.utils.data.DataLoader`.

    Args:
        photos: What to read.
        transform: Applied to each RGB photo; may be exchanged between epochs.
        cache_side: Decode every photo once, now, and keep it in memory with this shorter side, in pixels; 0
            decodes at every access. A photo of 4:3 takes `4 * cache_side ** 2` bytes.
        squash: Give up the aspect ratio when the photo is put into the cache.

    Raises:
        DataError: Some photos can't be read; all of them are named.
    """

    def __init__(self, photos: Photos, transform: Any, *, cache_side: int = 0, squash: bool = False) -> None:
        self.photos = photos
        self.transform = transform
        self._cache: list[npt.NDArray[np.uint8]] = []
        if cache_side:
            self._cache = list(_decode_all(photos.paths, cache_side, squash))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.read(index)
        return self.transform(image), self.photos.targets[index]

    def read(self, index: int) -> Image.Image:
        """The photo as it comes from the cache or the disk, before the transform."""
        if self._cache:
            return Image.fromarray(self._cache[index])
        return read_image(self.photos.paths[index])

    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all photos' pixels, in 0..1."""
        total, squares, count = np.zeros(3), np.zeros(3), 0
        for index in range(len(self)):
            pixels = np.asarray(self.read(index), np.float64).reshape(-1, 3) / 255
            total += pixels.sum(0)
            squares += (pixels**2).sum(0)
            count += len(pixels)
        mean = total / count
        return tuple(mean.tolist()), tuple(np.sqrt(squares / count - mean**2).tolist())


def _decode_all(paths: Sequence[Path], side: int, squash: bool) -> Iterator[npt.NDArray[np.uint8]]:
    def decode(path: Path) -> npt.NDArray[np.uint8] | UnreadableImageError:
        try:
            return np.asarray(resize(read_image(path, min_side=2 * side), side, squash=squash))
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(decode, paths))
    errors = [item for item in decoded if isinstance(item, UnreadableImageError)]
    if errors:
        raise DataError(
            f"{len(errors)} of {len(paths)} photos can't be read; repair or remove them:\n"
            + "\n".join(map(str, errors))
        )
    return iter([item for item in decoded if not isinstance(item, UnreadableImageError)])
