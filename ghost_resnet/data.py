"""Photos: reading them, folders and split files, preprocessing.

Nothing here imports torch, so that a predictor on an exported model does not have to.
"""

import io
import logging
import math
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Union
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ConfigError, DataError, UnreadableImageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"]
)
UNREAD_SUFFIXES = frozenset(
    [".heic", ".heif", ".hif", ".dng", ".raw", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"]
)
"""Photos as phones and cameras may store them, which are not read."""
CONVERT = "convert to JPEG; an iPhone takes JPEGs with Settings > Camera > Formats > Most Compatible"
"""What to do about them."""
SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
"""Folders so named that hold folders are taken for splits, not for classes."""
MAX_PIXELS = 100_000_000
"""Photos with more pixels than this are refused before they are decoded."""
MAX_ASPECT = 20
"""Of a photo longer than so many times its shorter side, only the middle is looked at."""

MAX_DOWNLOAD = 64 * 2**20
"""Bytes; a URL with more is given up."""
DOWNLOAD_SECONDS = 30
"""A URL that takes longer is given up."""


@dataclass(frozen=True)
class PackedPhoto:
    """A photo inside an archive or a dataset, which is read from there whenever it is looked at.

    Attributes:
        name: What it is called in messages.
        size: Of the image file, in bytes.
        load: Gives the image file.
    """

    name: str
    size: int
    load: Callable[[], bytes]

    def __str__(self) -> str:
        return self.name


PhotoFile = Path | PackedPhoto
"""Where a labelled photo is."""
ImageSource = Union[str, Path, PackedPhoto, bytes, BinaryIO, Image.Image, npt.NDArray[Any], "torch.Tensor"]
"""What `read_image` takes."""


def read_image(source: ImageSource, *, min_side: int | None = None) -> Image.Image:
    """Read a photo as upright 8-bit RGB, whatever it is stored as.

    EXIF orientation is applied, transparency is laid over white, 16-bit images are scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        source: A path, an http or https URL, the bytes of an image file, an open binary file, a PIL image, an
            array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` or a torch tensor `(1, H, W)`, `(3, H, W)` or
            `(4, H, W)`, as torchvision's `decode_image` returns it, of dtype uint8. It is not changed.
        min_side: Allow a JPEG to be decoded at a reduced scale whose shorter side is at least this many
            pixels, which is several times faster for large photos.

    Raises:
        UnreadableImageError: Not an image, damaged, empty, or larger than `MAX_PIXELS`; a URL that does not answer
            with one of at most `MAX_DOWNLOAD` bytes within `DOWNLOAD_SECONDS`.
    """
    name = describe(source)
    try:
        with _open(source, name) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise UnreadableImageError(
                    f"{name}: expected 1 to {MAX_PIXELS:,} pixels, got {width} x {height}; resize it first"
                )
            if min_side and not isinstance(source, Image.Image):
                scale = min(1, min_side / min(width, height))
                image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))  # JPEG only
            if isinstance(source, Image.Image):
                image = ImageOps.exif_transpose(image)  # a copy
            else:
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, name)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        advice = f"; {CONVERT}" if _has_suffix(name, UNREAD_SUFFIXES) else ""
        raise UnreadableImageError(
            f"{name}: no image of a kind that is read ({', '.join(_formats())}){advice}"
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name}: far too many pixels ({error}); resize it first") from error
    except Exception as error:  # Pillow's readers raise anything on a damaged file
        if isinstance(error, OSError) and error.strerror:
            raise UnreadableImageError(f"{name}: can't be opened ({error.strerror})") from error
        raise UnreadableImageError(f"{name}: damaged or cut short ({error})") from error


def describe(source: ImageSource) -> str:
    """The name of a source in messages."""
    if isinstance(source, str | Path | PackedPhoto):
        return str(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    file = getattr(source, "filename", None) or getattr(source, "name", None)
    return str(file) if file else f"image given as {type(source).__name__}"


def is_tensor(source: Any) -> bool:
    """Whether `source` is a torch tensor, without importing torch if nobody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _open(source: Any, name: str) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, np.ndarray):
        return _image_from_array(source, name)
    if is_tensor(source):
        return _image_from_tensor(source, name)
    if isinstance(source, PackedPhoto):
        source = source.load()
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source), formats=_formats())
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return Image.open(io.BytesIO(_download(source)), formats=_formats())
    if isinstance(source, str | Path) or hasattr(source, "read"):
        return Image.open(source, formats=_formats())
    raise UnreadableImageError(
        f"{name}: expected a path, a URL, bytes, a binary file, a PIL image, or a uint8 array or tensor, "
        f"got {type(source).__name__}"
    )


class _WebOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        allowed = {req.type, "https"}  # urllib would follow to ftp, and from https to http
        if (scheme := urlsplit(newurl).scheme) not in allowed:
            raise UnreadableImageError(f"{req.full_url}: redirected to {scheme}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str) -> bytes:
    end = time.monotonic() + DOWNLOAD_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "ghost-resnet"})
        with urllib.request.build_opener(_WebOnly).open(request, timeout=DOWNLOAD_SECONDS) as response:
            content = bytearray()
            while part := response.read1(2**16):
                content += part
                if len(content) > MAX_DOWNLOAD:
                    raise UnreadableImageError(f"{url}: expected at most {MAX_DOWNLOAD:,} bytes, and more came")
                if time.monotonic() > end:  # the timeout is that of each wait
                    raise TimeoutError(f"more than {DOWNLOAD_SECONDS} s")
            if response.length:
                raise ConnectionError(f"{response.length:,} bytes are missing")
            return bytes(content)
    except UnreadableImageError:
        raise
    except Exception as error:  # http.client raises several kinds beside OSError, ValueError for a malformed URL
        raise UnreadableImageError(f"{url}: can't be downloaded ({error})") from error


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats of `IMAGE_SUFFIXES`: it reads others too, some through other programs."""
    known = Image.registered_extensions()
    return tuple(sorted({known[suffix] for suffix in IMAGE_SUFFIXES if suffix in known}))


def _image_from_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shape_ok or array.size == 0:
        raise UnreadableImageError(
            f"{name}: expected uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"got {array.dtype} of shape {array.shape}"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _image_from_tensor(tensor: Any, name: str) -> Image.Image:
    if str(tensor.dtype) != "torch.uint8" or tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise UnreadableImageError(
            f"{name}: expected uint8 of shape (1, H, W), (3, H, W) or (4, H, W), "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return _image_from_array(tensor.detach().cpu().permute(1, 2, 0).numpy(), name)


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
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # a file cut short fails here
    return image


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an RGB photo before a network sees it, exactly as timm's evaluation transform does it.

    The one exception is that of a photo longer than `MAX_ASPECT` allows only the middle is resized.

    Attributes:
        input_size: Channels (1 or 3), height, width of the network's input, which is square.
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
        if len(self.input_size) != 3 or not all(isinstance(n, int) for n in self.input_size):
            raise DataError(f"input_size must be (1 or 3, side, side), got {self.input_size}")
        channels, height, width = self.input_size
        if self.interpolation.upper() not in ("NEAREST", "BILINEAR", "BICUBIC"):
            raise DataError(f"interpolation must be nearest, bilinear or bicubic, got {self.interpolation!r}")
        if self.crop_mode not in ("center", "squash"):
            raise DataError(f"crop_mode must be 'center' or 'squash', got {self.crop_mode!r}")
        if height != width or channels not in (1, 3) or height < 1:
            raise DataError(f"input_size must be (1 or 3, side, side), got {self.input_size}")
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")
        numbers = all(isinstance(n, int | float) and math.isfinite(n) for n in (*self.mean, *self.std))
        if not numbers or not len(self.mean) == len(self.std) == channels or min(self.std) <= 0:
            raise DataError(f"mean and std must hold {channels} numbers, std above 0; got {self.mean}, {self.std}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """Take the preprocessing part of a timm pretrained_cfg.

        Raises:
            ConfigError: It asks for something that is not done here.
        """
        names = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value := config[name], list) else value
            for name in names
            if config.get(name) is not None
        }
        try:
            return cls(**given)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this preprocessing is not supported: {error}") from error

    @property
    def resize(self) -> int:
        """Side, in pixels, to which a photo is resized before the central crop."""
        return math.floor(self.input_size[1] / self.crop_pct)

    def read(self, source: ImageSource, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Read a photo and preprocess it; large JPEGs are decoded at a reduced scale first.

        Args:
            source: As for `read_image`.
            out: As for `__call__`.

        Raises:
            UnreadableImageError: As `read_image`.
        """
        return self(read_image(source, min_side=self.resize), out)

    def __call__(self, image: Image.Image, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Turn an RGB photo into float32 of shape `input_size`.

        Args:
            image: An RGB photo.
            out: Array to write to and return, such as a photo's place in a batch; None makes one.
        """
        channels, side, _ = self.input_size
        if channels == 1:
            image = image.convert("L")
        squash = self.crop_mode == "squash"
        image = resize(image, self.resize, squash=squash, interpolation=self.interpolation, crop=side)
        pixels = np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)
        std = np.array(self.std).reshape(-1, 1, 1)
        out = np.empty(self.input_size, np.float32) if out is None else out
        np.multiply(pixels, (1 / (255 * std)).astype(np.float32), out=out)
        return np.subtract(out, (np.array(self.mean).reshape(-1, 1, 1) / std).astype(np.float32), out=out)


def resize(
    image: Image.Image,
    side: int,
    *,
    squash: bool = False,
    interpolation: str = "bicubic",
    crop: int | None = None,
) -> Image.Image:
    """Resize so that the shorter side is `side` pixels long, or both sides if `squash`.

    Unless `squash`, what lies beyond `MAX_ASPECT` is cut off evenly first: a line of 1 x 5,000 pixels would
    take gigabytes.

    Args:
        image: What to resize.
        side: In pixels.
        squash: Give up the aspect ratio.
        interpolation: "nearest", "bilinear" or "bicubic".
        crop: Side, in pixels, of the central square that is wanted of the result; None wants all of it.
    """
    if squash:
        size = (side, side)
    else:
        shorter, longer = sorted(image.size)
        if (margin := (longer - MAX_ASPECT * shorter) // 2) > 0:
            x, y = (margin, 0) if image.width > image.height else (0, margin)
            image = image.crop((x, y, image.width - x, image.height - y))
            longer -= 2 * margin
        longer = int(side * longer / shorter)
        size = (side, longer) if image.width <= image.height else (longer, side)
    method = Image.Resampling[interpolation.upper()]
    if image.size != size:
        image = image.resize(size, method)
    if crop is not None:
        left, top = (round((length - crop) / 2.0) for length in size)
        image = image.crop((left, top, left + crop, top + crop))
    return image


@dataclass(frozen=True)
class Photos:
    """Labelled photos on disk, with the class order made explicit.

    Attributes:
        paths: Where each photo is: a file, or a place in an archive.
        targets: The index into `classes` of each photo.
        classes: Class names, in the order of the network's outputs.
    """

    paths: tuple[PhotoFile, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict[str, int]:
        """Number of photos of each class, in class order."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return dict(zip(self.classes, counts.tolist(), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The last two parts of each photo's path, which stay the same when the photos are moved as a whole."""
        return tuple("/".join(PurePath(str(path)).parts[-2:]) for path in self.paths)

    def subset(self, indices: Sequence[int]) -> "Photos":
        """The photos at these indices, with the same classes."""
        return Photos(tuple(self.paths[i] for i in indices), tuple(self.targets[i] for i in indices), self.classes)

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
            DataError: No such folder, no photos, a listed photo that is missing, an unknown class, folders of splits
                instead of classes.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"expected a folder of class folders at {root}, found none")
        found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        order = tuple(classes) if classes is not None else tuple(found)
        if len(set(order)) < len(order):
            raise DataError(f"expected every class once, got {', '.join(order)}")
        listed = (
            _read_splits(root, splits)
            if splits
            else [path.relative_to(root) for name in found for path in find_images(root / name)]
        )
        unknown = sorted({path.parts[0] for path in listed} - set(order))
        nested = any(len(path.parts) > 2 for path in listed)
        if nested and (unknown or classes is None) and all(name.lower() in SPLIT_NAMES for name in found):
            train, *others = sorted(found, key=lambda name: SPLIT_NAMES.index(name.lower()))
            val = [f" --val {root / name}" for name in others if name.lower() != "test"]
            raise DataError(
                f"{root} looks like a folder of splits ({', '.join(found)}), not of classes: "
                f"use --data {root / train}{''.join(val[:1])}"
            )
        if unknown:
            raise DataError(
                f"{root} has the classes {', '.join(unknown)}, which are not among {', '.join(order)}: "
                "take a model that knows them, or remove these photos"
            )
        if not listed:
            where = f"listed in {', '.join(map(str, splits))}" if splits else f"under {root}"
            unread = [] if splits else [path for path in _files(root) if _has_suffix(path, UNREAD_SUFFIXES)]
            advice = f"; {len(unread)} are in a format that is not read, {unread[0]} first: {CONVERT}" if unread else ""
            raise DataError(f"no photos {where}: expected {root}/<class>/<photo>.jpg{advice}")
        if classes is None and not splits and (empty := set(order) - {path.parts[0] for path in listed}):
            logger.warning("%s: no photos of %s, which is a class all the same", root, ", ".join(sorted(empty)))
        index = {name: i for i, name in enumerate(order)}
        return cls(tuple(root / path for path in listed), tuple(index[path.parts[0]] for path in listed), order)


def find_images(folder: Path) -> Iterator[Path]:
    """The image files below a folder, lazily and in order; what is hidden and other files are left out.

    Links to files are followed, links to folders below `folder` are not.
    """
    left_out, first = Counter[str](), dict[str, Path]()
    for path in _files(folder):
        if _has_suffix(path, IMAGE_SUFFIXES):
            yield path
        else:
            unread = _has_suffix(path, UNREAD_SUFFIXES)
            why = f"whose format is not read ({CONVERT})" if unread else "that are no photos"
            left_out[why] += 1
            first.setdefault(why, path)
    for why, count in left_out.items():
        logger.warning("%d in %s left out %s, %s first", count, folder, why, first[why])


def count_images(folder: Path) -> int:
    """The number of image files that `find_images` finds."""
    return sum(_has_suffix(path, IMAGE_SUFFIXES) for path in _files(folder))


def _has_suffix(path: str | Path, suffixes: frozenset[str]) -> bool:
    return PurePath(path).suffix.lower() in suffixes


def _files(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning("%s can't be listed (%s)", folder, error.strerror)
        return
    for entry in visible:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name)
        elif not entry.is_dir():
            yield folder / entry.name


def _read_splits(root: Path, splits: Iterable[str | Path]) -> list[Path]:
    listed: dict[Path, None] = {}
    for split in map(Path, splits):
        if not split.is_file():
            raise DataError(f"no split file at {split}: expected a text file with one class/file.jpg a line")
        try:
            lines = split.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{split}: expected UTF-8 text with one class/file.jpg a line, got {error}") from error
        for number, line in enumerate(lines, 1):
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
        DataError: Some photos can't be read into the cache; all of them are named. Without a cache one that
            can't be read raises `UnreadableImageError` when it is accessed.
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
        return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist())


def _decode_all(paths: Sequence[PhotoFile], side: int, squash: bool) -> Iterator[npt.NDArray[np.uint8]]:
    def decode(path: PhotoFile) -> npt.NDArray[np.uint8] | UnreadableImageError:
        try:
            return np.asarray(resize(read_image(path, min_side=2 * side), side, squash=squash))
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(usable_cores()) as pool:
        decoded = list(pool.map(decode, paths))
    errors = [item for item in decoded if isinstance(item, UnreadableImageError)]
    if errors:
        raise DataError(
            f"{len(errors)} of {len(paths)} photos can't be read; repair or remove them:\n"
            + "\n".join(map(str, errors))
        )
    return iter([item for item in decoded if not isinstance(item, UnreadableImageError)])
