"""Photos: each is read right or named, folders and split files mean what they say, preprocessing is timm's."""

import io
import itertools
import logging
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from drawing import draw, encode, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features
from timm.data import create_transform
from torch.utils.data import DataLoader

from ghost_resnet import data as data_module
from ghost_resnet.data import PhotoDataset, Photos, Preprocessing, count_images, find_images, read_image, resize
from ghost_resnet.errors import ConfigError, DataError, UnreadableImageError

COLOUR = (200, 100, 50)
WHITE = (255, 255, 255)


def png(width: int, height: int, depth: int, kind: int, rows: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow can't write; `rows` are pixels with a filter byte before each row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (16, 12), colour)  # type: ignore[arg-type]


def palette(transparent: bool) -> bytes:
    image = plain("P", 1)
    image.putpalette([0, 0, 0, *COLOUR])
    return encode(image, "PNG", **({"transparency": bytes([255, 0])} if transparent else {}))


rgb = plain("RGB", COLOUR)
grey16 = Image.fromarray(np.full((12, 16), 100 * 257, np.uint16))

KINDS: dict[str, tuple[bytes, tuple[int, int, int], int]] = {
    "jpeg": (encode(rgb, "JPEG", quality=95), COLOUR, 3),
    "multi-picture jpeg": (encode(rgb, "MPO", save_all=True, append_images=[plain("RGB", "blue")]), COLOUR, 3),
    "grey jpeg": (encode(plain("L", 100), "JPEG"), (100, 100, 100), 2),
    "cmyk jpeg": (encode(rgb.convert("CMYK"), "JPEG", quality=95), COLOUR, 3),
    "cmyk tiff": (encode(rgb.convert("CMYK"), "TIFF"), COLOUR, 1),
    "png": (encode(rgb, "PNG"), COLOUR, 0),
    "palette png": (palette(False), COLOUR, 0),
    "palette png, transparent": (palette(True), WHITE, 0),
    "colour-keyed png": (encode(rgb, "PNG", transparency=COLOUR), WHITE, 0),
    "rgba png": (encode(plain("RGBA", (*COLOUR, 51)), "PNG"), (244, 224, 214), 1),
    "grey-alpha png": (encode(plain("LA", (100, 51)), "PNG"), (224, 224, 224), 1),
    "black-and-white png": (encode(plain("1", 1), "PNG"), WHITE, 0),
    "16-bit png": (encode(grey16, "PNG"), (100, 100, 100), 0),
    "16-bit rgb png": (
        png(16, 12, 16, 2, (b"\0" + struct.pack(">HHH", *(257 * c for c in COLOUR)) * 16) * 12),
        COLOUR,
        0,
    ),
    "16-bit tiff": (encode(grey16, "TIFF"), (100, 100, 100), 0),
    "32-bit integer tiff": (encode(plain("I", 100 * 257), "TIFF"), (100, 100, 100), 0),
    "gif": (encode(rgb, "GIF"), COLOUR, 0),
    "animated gif": (encode(rgb, "GIF", save_all=True, append_images=[plain("RGB", "blue")]), COLOUR, 0),
    "animated webp": (
        encode(rgb, "WEBP", lossless=True, save_all=True, append_images=[plain("RGB", "blue")]),
        COLOUR,
        0,
    ),
    "webp with alpha": (encode(plain("RGBA", (*COLOUR, 0)), "WEBP", lossless=True), WHITE, 0),
    "bmp": (encode(rgb, "BMP"), COLOUR, 0),
    "ppm": (encode(rgb, "PPM"), COLOUR, 0),
}
if features.check("avif"):
    KINDS["avif"] = (encode(rgb, "AVIF", quality=95), COLOUR, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_becomes_its_rgb_colour(kind: str, tmp_path: Path) -> None:
    content, colour, tolerance = KINDS[kind]
    path = tmp_path / "photo"  # what it is, is told by its content
    path.write_bytes(content)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (16, 12)
    assert np.abs(np.asarray(image, int) - colour).max() <= tolerance


@pytest.mark.parametrize("kind", ["I;16", "I"])
def test_16_bit_values_are_scaled_not_clipped(kind: str) -> None:
    values = np.arange(0, 65536, 256).reshape(16, 16)
    image = Image.fromarray(values.astype(np.uint16 if kind == "I;16" else np.int32))
    assert image.mode == kind
    assert np.array_equal(np.asarray(read_image(image))[..., 0], values // 256)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_16_bits_are_refused(value: int) -> None:
    with pytest.raises(UnreadableImageError, match="beyond 16 bits"):
        read_image(plain("I", value))


@pytest.mark.parametrize("source", [plain("F", 0.5), encode(plain("F", 0.5), "TIFF")], ids=["image", "file"])
def test_floating_point_pixels_are_refused_in_a_sentence(source: Image.Image | bytes) -> None:
    with pytest.raises(UnreadableImageError, match="floating-point pixels have no fixed range; save it as 8-bit RGB"):
        read_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_exif_orientations_come_out_upright(kind: str) -> None:
    upright = Image.new("RGB", (32, 16), "white")  # wide, and no two corners alike
    for colour, corner in {"red": (0, 0), "green": (16, 0), "blue": (0, 8)}.items():
        upright.paste(colour, (*corner, corner[0] + 16, corner[1] + 8))
    back = {  # how a photo lies in the file that its orientation turns upright
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, transpose in back.items():
        stored = upright if transpose is None else upright.transpose(transpose)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = read_image(encode(stored, kind, exif=exif))
        assert image.size == upright.size, orientation
        difference = np.abs(np.asarray(image, int) - np.asarray(upright))[[4, 4, 12, 12], [8, 24, 8, 24]]
        assert difference.max() < 30, orientation


def test_every_source_of_the_same_picture_reads_the_same(tmp_path: Path) -> None:
    picture = draw()
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    expected = array.tobytes()
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file, picture, array):
            assert read_image(source).tobytes() == expected
        assert not file.closed
    alpha = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    assert read_image(alpha).tobytes() == expected
    grey = array[..., 0]
    assert read_image(grey).tobytes() == read_image(grey[..., None]).tobytes() == np.dstack([grey] * 3).tobytes()
    assert read_image(array[::-1, ::2]).size == (24, 40)  # no contiguous array


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16B"])
def test_a_pil_image_of_any_mode_is_read_and_left_as_it_was(mode: str) -> None:
    image = Image.new(mode, (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    before = (image.mode, image.size, image.tobytes(), dict(image.info), dict(exif))
    read = read_image(image)
    assert (read.mode, read.size) == ("RGB", (4, 6))
    assert (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())) == before
    assert read is not image


def test_a_jpeg_that_the_caller_has_open_stays_whole() -> None:
    with Image.open(io.BytesIO(encode(draw(800, 600), "JPEG"))) as image:
        assert read_image(image, min_side=50).size == image.size == (800, 600)


def test_the_result_is_a_copy_of_an_rgb_image_given() -> None:
    image = draw()
    read_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4), bool),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), object),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_photo_is_refused_with_its_type_and_shape(array: np.ndarray) -> None:
    with pytest.raises(UnreadableImageError) as error:
        read_image(array)
    assert f"got {array.dtype} of shape {array.shape}" in str(error.value)


@pytest.mark.parametrize("source", [None, 3, ["photo.jpg"], object()])
def test_what_is_no_source_at_all_is_refused_with_its_type(source: object) -> None:
    with pytest.raises(UnreadableImageError, match=f"expected a path.* got {type(source).__name__}"):
        read_image(source)  # type: ignore[arg-type]


jpeg, small = encode(draw(), "JPEG"), encode(draw(), "PNG")
BROKEN = {
    "empty": b"",
    "text": b"no picture at all\n" * 50,
    "truncated jpeg": jpeg[: len(jpeg) // 2],
    "jpeg header alone": jpeg[:20],
    "truncated png": small[: len(small) // 2],
    "png with a wrong checksum": small[:40] + bytes([small[40] ^ 1]) + small[41:],
    "truncated gif": encode(draw(), "GIF")[:-200],
    "truncated webp": encode(draw(), "WEBP")[:-50],
    "truncated tiff": encode(draw(), "TIFF")[:1000],
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(UnreadableImageError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: ")
    with path.open("rb") as file, pytest.raises(UnreadableImageError) as error:
        read_image(file)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(UnreadableImageError, match=f"image of {len(BROKEN[kind])} bytes: "):
        read_image(BROKEN[kind])


@pytest.mark.parametrize("as_file", [False, True])
def test_formats_that_pillow_hands_to_other_programs_are_not_opened(as_file: bool, tmp_path: Path) -> None:
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with Image.open(path) as image:
        assert image.format == "EPS"  # which Ghostscript would draw
    with pytest.raises(UnreadableImageError, match=r"no image of a kind that is read \(.*JPEG"):
        read_image(path if as_file else content)


@pytest.mark.parametrize(
    ("name", "reason"), [("none.jpg", "No such file"), ("", "Is a directory"), ("x" * 300, "too long"), ("\0", "null")]
)
def test_a_path_that_can_t_be_opened_is_named_with_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(UnreadableImageError, match=reason) as error:
        read_image(path)
    assert str(path) in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
def test_a_huge_image_is_refused_before_it_is_decoded(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, 8, 2))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImageError, match=r"bomb\.png: .*pixels.*resize it"):
        read_image(path)


SEEDS = [
    jpeg,
    encode(draw(), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
    encode(draw().convert("CMYK"), "JPEG"),
    small,
    encode(draw().quantize(16), "PNG", transparency=3),
    encode(grey16, "PNG"),
    encode(draw(), "GIF", save_all=True, append_images=[draw(seed=1)]),
    encode(draw(), "TIFF"),
    encode(draw(), "TIFF", compression="tiff_lzw"),
    encode(draw(), "WEBP"),
    encode(draw(), "BMP"),
    encode(draw(), "PPM"),
]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata
@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    header_only=st.booleans(),
    end=st.floats(0, 1),
)
def test_damaged_bytes_are_an_rgb_image_or_named_and_nothing_else(
    seed: bytes, changes: list[tuple[float, int]], header_only: bool, end: float
) -> None:
    content = bytearray(seed)
    for place, value in changes:
        content[int(place * (min(len(seed), 120) if header_only else len(seed)))] = value
    if end < 0.3:
        content = content[: int(len(seed) * end / 0.3)]
    with mock.patch.object(data_module, "MAX_PIXELS", 1_000_000):
        try:
            image = read_image(bytes(content), min_side=8)
        except UnreadableImageError as error:
            assert str(error).startswith("image of ")
        else:
            assert image.mode == "RGB" and min(image.size) > 0


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_reduced_decoding_is_smaller_but_not_too_small_and_looks_the_same(kind: str) -> None:
    content = encode(draw(1603, 1207), kind, quality=95)
    whole = read_image(content)
    for least in (100, 150, 151, 400, 900, 5000):
        image = read_image(content, min_side=least)
        assert min(image.size) >= min(least, 1207)
        if least <= 400:
            assert min(image.size) <= 1207 / 2 + 1
        expected = np.asarray(whole.resize(image.size, Image.Resampling.BOX), int)
        assert np.abs(np.asarray(image) - expected).mean() < 1.5
    assert np.abs(Preprocessing().read(content) - Preprocessing()(whole)).mean() < 0.02


def test_reduced_decoding_turns_the_photo_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encode(draw(800, 400), "JPEG", exif=exif), min_side=100).size == (100, 200)


# Preprocessing


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_is_timms_evaluation_transform(interpolation: str, crop_mode: str, channels: int) -> None:
    images = [draw(*size) for size in [(48, 40), (40, 48), (33, 33), (7, 90), (90, 7), (300, 201), (1, 1), (36, 36)]]
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    for side, crop_pct, image in itertools.product((32, 33), (0.875, 0.9, 1.0), images):
        ours = Preprocessing((channels, side, side), interpolation, crop_pct, crop_mode, mean, std)(image)
        theirs = create_transform(
            (channels, side, side),
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            mean=mean,
            std=std,
        )(image if channels == 3 else image.convert("L"))
        assert ours.dtype == np.float32 and ours.shape == (channels, side, side) and ours.flags.c_contiguous
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 4001)])
def test_the_smallest_and_longest_photos_are_preprocessed_in_little_memory(size: tuple[int, int]) -> None:
    image = draw(*size)
    assert max(resize(image, 256).size) <= 256 * 21
    pixels = Preprocessing().read(encode(image, "PNG"))
    assert pixels.shape == (3, 224, 224) and np.isfinite(pixels).all()
    centre = np.asarray(image)[size[1] // 2, size[0] // 2]
    preprocessing = Preprocessing()
    back = pixels[:, 112, 112] * preprocessing.std + preprocessing.mean
    assert np.abs(back * 255 - centre).max() < 12


def test_a_long_photo_is_cut_evenly_so_that_its_middle_stays() -> None:
    image = draw(2003, 20)
    middle = np.asarray(image.crop((2003 // 2 - 10, 0, 2003 // 2 + 11, 20)).resize((21, 20)), int)
    cut = resize(image, 20)
    left = cut.width // 2 - 10
    assert np.abs(np.asarray(cut.crop((left, 0, left + 21, 20)), int) - middle).max() <= 1


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"input_size": (3, 224, 192)}, "input_size"),
        ({"input_size": (4, 224, 224)}, "input_size"),
        ({"input_size": (3, 0, 0)}, "input_size"),
        ({"input_size": (3, 224)}, "input_size"),
        ({"input_size": (3, 32.5, 32.5)}, "input_size"),
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.1}, "crop_pct"),
        ({"crop_pct": math.nan}, "crop_pct"),
        ({"crop_mode": "border"}, "crop_mode"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.1, 0.1)}, "std"),
        ({"std": (0.1, 0.1, 0.0)}, "std"),
        ({"std": (0.1, math.nan, 0.1)}, "std"),
        ({"input_size": (1, 32, 32)}, "mean"),
    ],
)
def test_preprocessing_that_is_not_done_here_is_refused_by_name(wrong: dict, word: str) -> None:
    with pytest.raises(DataError, match=word):
        Preprocessing(**wrong)
    with pytest.raises(ConfigError, match=word):
        Preprocessing.from_config({k: list(v) if isinstance(v, tuple) else v for k, v in wrong.items()})


@pytest.mark.parametrize(
    "wrong", [{"mean": "red"}, {"std": 1}, {"input_size": 224}, {"crop_pct": "most"}, {"mean": [None] * 3}]
)
def test_preprocessing_of_a_wrong_type_in_a_config_is_a_config_error(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        Preprocessing.from_config(wrong)


def test_preprocessing_is_taken_from_timms_config() -> None:
    config = {"input_size": [3, 32, 32], "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    config |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 6, "first_conv": "conv1"}
    expected = Preprocessing((3, 32, 32), "bilinear", 1.0, "squash", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert Preprocessing.from_config(config) == expected
    assert Preprocessing.from_config({"crop_mode": None}) == Preprocessing()


# Folders and split files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", {"metal": 3, "glass": 2, "paper": 1})


def names(photos: Photos, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in photos.paths]


def test_classes_are_the_sorted_folders_and_targets_index_them(folder: Path) -> None:
    photos = Photos.from_folder(folder)
    assert photos.classes == ("glass", "metal", "paper")
    assert names(photos, folder) == [
        "glass/glass1.jpg",
        "glass/glass2.jpg",
        *(f"metal/metal{number}.jpg" for number in (1, 2, 3)),
        "paper/paper1.jpg",
    ]
    assert photos.targets == (0, 0, 1, 1, 1, 2)
    assert photos.counts == {"glass": 2, "metal": 3, "paper": 1} and len(photos) == 6


def test_explicit_classes_give_the_order_and_may_be_more(folder: Path) -> None:
    photos = Photos.from_folder(folder, classes=["trash", "paper", "metal", "glass"])
    assert photos.classes == ("trash", "paper", "metal", "glass")
    assert photos.targets == (3, 3, 2, 2, 2, 1)
    assert photos.counts == {"trash": 0, "paper": 1, "metal": 3, "glass": 2}


def test_photos_of_an_unknown_class_are_refused_by_its_name(folder: Path) -> None:
    with pytest.raises(DataError, match="has the classes paper, which are not among glass, metal"):
        Photos.from_folder(folder, classes=["glass", "metal"])


def test_a_class_named_twice_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="every class once"):
        Photos.from_folder(folder, classes=["glass", "metal", "paper", "metal"])


def test_split_files_keep_to_what_they_list_in_their_order(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes(b"\xef\xbb\xbfmetal/metal2.jpg\r\n\r\n  glass/glass1.jpg  \r\n")
    two.write_text("\npaper/paper1.jpg")
    photos = Photos.from_folder(folder, splits=[one, str(two)])
    assert names(photos, folder) == ["metal/metal2.jpg", "glass/glass1.jpg", "paper/paper1.jpg"]
    assert photos.classes == ("glass", "metal", "paper")
    assert Photos.from_folder(folder, splits=[two]).classes == ("glass", "metal", "paper")


def test_a_photo_listed_twice_is_taken_once_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("metal/metal1.jpg\nmetal/metal1.jpg\n")
    two.write_text("metal/./metal1.jpg\n")
    assert len(Photos.from_folder(folder, splits=[one, two])) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{one}, line 2: metal/metal1.jpg is listed twice and is taken once",
        f"{two}, line 1: metal/metal1.jpg is listed twice and is taken once",
    ]


@pytest.mark.parametrize(
    "line", ["/etc/passwd", "../photos/metal/metal1.jpg", "metal/../../secret.jpg", "metal1.jpg", "metal1.jpg 3"]
)
def test_a_line_that_leads_out_of_the_folder_or_names_no_class_is_refused(
    line: str, folder: Path, tmp_path: Path
) -> None:
    split = tmp_path / "split.txt"
    split.write_text(f"metal/metal1.jpg\n{line}\n")
    with pytest.raises(DataError) as error:
        Photos.from_folder(folder, splits=[split])
    assert str(error.value) == f"{split}, line 2: expected class/file.jpg, got {line!r}"


def test_listed_photos_that_are_missing_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_text("metal/metal1.jpg\nmetal/metal9.jpg\nwood/wood1.jpg\n")
    with pytest.raises(DataError, match=r"2 listed photos are missing under .*, metal/metal9\.jpg first"):
        Photos.from_folder(folder, splits=[split])


def test_a_split_file_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    for path, content in [(tmp_path / "none.txt", None), (tmp_path / "empty.txt", b"\n"), (tmp_path / "p.jpg", jpeg)]:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError) as error:
            Photos.from_folder(folder, splits=[path])
        assert str(path) in str(error.value)


@pytest.mark.parametrize("make", [lambda p: None, Path.touch, Path.mkdir], ids=["missing", "a file", "empty"])
def test_a_folder_without_photos_is_named(make: object, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make(root)  # type: ignore[operator]
    with pytest.raises(DataError, match=str(root)):
        Photos.from_folder(root)


def test_an_empty_class_folder_stays_a_class_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cardboard").mkdir()
    photos = Photos.from_folder(folder)
    assert photos.counts == {"cardboard": 0, "glass": 2, "metal": 3, "paper": 1}
    assert "no photos of cardboard" in caplog.text


def test_hidden_files_and_folders_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("metal/.hidden.jpg", "metal/.ipynb_checkpoints/metal1-checkpoint.jpg", ".git/x.jpg", "glass/._a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        draw().save(folder / name)
    assert len(Photos.from_folder(folder)) == 6
    assert not caplog.records


def test_a_hidden_folder_that_was_asked_for_is_searched(tmp_path: Path) -> None:
    root = write_folder(tmp_path / ".cache", {"metal": 2})
    assert len(list(find_images(root))) == 2 == count_images(root)


def test_files_that_are_no_photos_are_left_out_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "metal" / "a.txt").touch()
    (folder / "metal" / "b.mov").touch()
    assert len(Photos.from_folder(folder)) == 6
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert f"2 in {folder / 'metal'}" in caplog.text and "a.txt first" in caplog.text


ADVICE = "convert to JPEG; an iPhone takes JPEGs with Settings > Camera > Formats > Most Compatible"


def test_an_iphones_photos_are_left_out_with_the_advice_to_convert_them(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metal = folder / "metal"
    for name in ("IMG_1.HEIC", "IMG_2.heif", "IMG_3.DNG", "notes.txt"):
        (metal / name).touch()
    assert len(Photos.from_folder(folder)) == 6 == sum(count_images(path) for path in folder.iterdir())
    assert [record.getMessage() for record in caplog.records] == [
        f"3 in {metal} left out whose format is not read ({ADVICE}), {metal / 'IMG_1.HEIC'} first",
        f"1 in {metal} left out that are no photos, {metal / 'notes.txt'} first",
    ]


@pytest.mark.parametrize("name", ["glass/IMG_1.HEIC", "IMG_1.HEIC"], ids=["in a class folder", "in the root"])
def test_a_folder_of_nothing_but_an_iphones_photos_is_refused_with_the_same_advice(name: str, tmp_path: Path) -> None:
    (tmp_path / "glass").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(DataError) as error:
        Photos.from_folder(tmp_path)
    assert str(error.value) == (
        f"no photos under {tmp_path}: expected {tmp_path}/<class>/<photo>.jpg; "
        f"1 are in a format that is not read, {tmp_path / name} first: {ADVICE}"
    )


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_an_iphones_photo_that_is_named_is_refused_with_the_same_advice(brand: bytes, tmp_path: Path) -> None:
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(500))
    with pytest.raises(UnreadableImageError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path}: no image of a kind") and str(error.value).endswith(f"; {ADVICE}")


@pytest.mark.parametrize(
    ("found", "use"),
    [
        (["train", "val"], "--data {0}/train --val {0}/val"),
        (["Test", "Train", "Validation"], "--data {0}/Train --val {0}/Validation"),
        (["test", "train"], "--data {0}/train"),
        (["train"], "--data {0}/train"),
    ],
)
def test_folders_of_splits_are_not_taken_for_classes(found: list[str], use: str, tmp_path: Path) -> None:
    for name in found:
        write_folder(tmp_path / name, {"glass": 2, "metal": 2})
    for classes in (None, ["glass", "metal"]):
        with pytest.raises(DataError) as error:
            Photos.from_folder(tmp_path, classes=classes)
        assert str(error.value) == (
            f"{tmp_path} looks like a folder of splits ({', '.join(found)}), not of classes: use {use.format(tmp_path)}"
        )


def test_classes_that_are_called_like_splits_are_classes_where_something_says_so(tmp_path: Path) -> None:
    (tmp_path / "train" / "steam").mkdir(parents=True)
    draw().save(tmp_path / "train" / "steam" / "1.jpg")
    assert Photos.from_folder(tmp_path, classes=["bus", "train"]).counts == {"bus": 0, "train": 1}  # a model knows it
    (tmp_path / "bus").mkdir()
    assert Photos.from_folder(tmp_path).classes == ("bus", "train")  # another folder is no split
    flat = write_folder(tmp_path / "flat", {"test": 1, "train": 1})
    assert Photos.from_folder(flat).classes == ("test", "train")  # nothing in them is a class


def test_photos_are_found_in_subfolders_with_any_case_and_any_script(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "фото", {"瓶子": 1, "métal": 1})
    draw().save(root / "métal" / "ÉTÉ.JPG")
    (root / "métal" / "2021" / "juin").mkdir(parents=True)
    draw().save(root / "métal" / "2021" / "juin" / "x.Png")
    split = tmp_path / "split.txt"
    split.write_text("瓶子/瓶子1.jpg\n", encoding="utf-8")
    photos = Photos.from_folder(root)
    assert photos.counts == {"métal": 3, "瓶子": 1}
    assert names(Photos.from_folder(root, splits=[split]), root) == ["瓶子/瓶子1.jpg"]
    assert all(read_image(path).mode == "RGB" for path in photos.paths)


def test_links_are_followed_and_a_dead_one_is_not_lost_in_silence(folder: Path) -> None:
    (folder / "metal" / "z-link.jpg").symlink_to(folder / "glass" / "glass1.jpg")
    (folder / "metal" / "z-dead.jpg").symlink_to(folder / "glass" / "gone.jpg")
    (folder / "tin").symlink_to(folder / "metal", target_is_directory=True)
    photos = Photos.from_folder(folder)
    assert photos.counts == {"glass": 2, "metal": 5, "paper": 1, "tin": 5}
    with pytest.raises(DataError, match=r"2 of 13 photos can't be read") as error:
        PhotoDataset(photos, None, cache_side=8)
    assert f"{folder / 'metal' / 'z-dead.jpg'}: can't be opened" in str(error.value)


# Datasets for training


@pytest.mark.parametrize("squash", [False, True])
def test_the_cache_changes_nothing_but_the_time(squash: bool, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    for seed, size in enumerate([(48, 40), (40, 48), (33, 33), (32, 60), (20, 24)]):
        draw(*size, seed).save(root / "a" / f"{seed}.png")
    photos = Photos.from_folder(root)
    transform = Preprocessing((3, 32, 32), "bicubic", 1.0, "squash" if squash else "center")
    read_each_time = PhotoDataset(photos, transform)
    cached = PhotoDataset(photos, transform, cache_side=32, squash=squash)
    assert len(read_each_time) == len(cached) == 5
    expected = [read_each_time[i] for i in range(5)]
    for path in photos.paths:
        path.unlink()
    for (image, target), (cached_image, cached_target) in zip(expected, map(cached.__getitem__, range(5)), strict=True):
        assert target == cached_target == 0
        np.testing.assert_array_equal(cached_image, image)
    assert cached.read(0).size == ((32, 32) if squash else (38, 32))


@pytest.mark.parametrize("cache_side", [0, 16])
def test_a_dataset_feeds_torchs_loader_and_its_transform_can_be_exchanged(cache_side: int, folder: Path) -> None:
    dataset = PhotoDataset(Photos.from_folder(folder), None, cache_side=cache_side)
    for side in (8, 12):
        dataset.transform = Preprocessing((3, side, side))
        images, targets = next(iter(DataLoader(dataset, batch_size=6)))  # type: ignore[arg-type]
        assert images.shape == (6, 3, side, side) and images.dtype == torch.float32
        assert targets.tolist() == [0, 0, 1, 1, 1, 2]


def test_the_cache_names_every_photo_that_can_t_be_read(folder: Path) -> None:
    broken = [folder / "glass" / "glass2.jpg", folder / "metal" / "metal1.jpg", folder / "paper" / "paper1.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    photos = Photos.from_folder(folder)
    with pytest.raises(DataError, match=r"3 of 6 photos can't be read; repair or remove them:") as error:
        PhotoDataset(photos, None, cache_side=16)
    assert [line.partition(":")[0] for line in str(error.value).splitlines()[1:]] == list(map(str, broken))
    with pytest.raises(UnreadableImageError, match="glass2"):
        PhotoDataset(photos, None)[1]


def test_pixel_statistics_are_of_all_pixels_alike(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "a").mkdir(parents=True)
    pictures = [draw(10, 8, 1), draw(31, 17, 2), draw(5, 5, 3)]
    for number, picture in enumerate(pictures):
        picture.save(root / "a" / f"{number}.png")
    pixels = np.concatenate([np.asarray(p, np.float64).reshape(-1, 3) for p in pictures]) / 255
    mean, std = PhotoDataset(Photos.from_folder(root), None).pixel_statistics()
    np.testing.assert_allclose(mean, pixels.mean(0))
    np.testing.assert_allclose(std, pixels.std(0))


def test_pixel_statistics_of_one_colour_have_no_spread(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for value in range(0, 256, 5):  # of some the variance comes out a little below zero
        plain("L", value).save(tmp_path / "a" / "a.png")
        mean, std = PhotoDataset(Photos.from_folder(tmp_path), None).pixel_statistics()
        np.testing.assert_allclose(mean, value / 255)
        np.testing.assert_allclose(std, 0, atol=1e-7)


def test_reading_photos_does_not_import_torch() -> None:
    code = "import sys, numpy, ghost_resnet.data as d; d.Preprocessing().read(numpy.zeros((9, 9), 'u1')); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


# Real photos


@pytest.mark.parametrize(
    ("split", "count"),
    [("report-train", 2023), ("report-val", 252), ("report-test", 252), ("official-test", 431), ("blocked-test", 283)],
)
def test_trashnets_split_files_are_read(split: str, count: int, data_root: Path) -> None:
    photos = Photos.from_folder(data_root / "trashnet", splits=[data_root / "splits" / f"{split}.txt"])
    assert photos.classes == ("cardboard", "glass", "metal", "paper", "plastic", "trash")
    assert len(photos) == count
    assert all(
        path.parent.name == photos.classes[target] for path, target in zip(photos.paths, photos.targets, strict=True)
    )


def test_real_photos_are_preprocessed_as_by_timm(data_root: Path) -> None:
    transform = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.95)
    preprocessing = Preprocessing(crop_pct=0.95)
    for name in ("glass", "trash"):
        path = data_root / "trashnet" / name / f"{name}1.jpg"
        with Image.open(path) as image:
            expected = transform(image.convert("RGB")).numpy()
        np.testing.assert_allclose(preprocessing(read_image(path)), expected, atol=1e-6, rtol=0)
        assert np.abs(preprocessing.read(path) - expected).mean() < 0.05  # at reduced scale
