"""Photographs of any kind -> RGB of 8 bits: the one way in which training, evaluation and prediction read them.

What a file may hold, and what it becomes:

- *colours*: RGB as it is; grey, palette, 1 bit, CMYK, YCbCr converted; of a moving picture the first frame;
- *transparency*: laid over white, as a page shows it;
- *EXIF*: turned as its orientation says (``exif="apply"``) or left as stored (``"ignore"``); an orientation that is not
  one of the eight, or in a broken block, is none;
- *whole numbers of more than 8 bits*: divided by the largest number of the narrowest of 8, 10, 12, 14 and 16 bits that
  holds the photograph's largest value (so 65535, or 4095 from a camera of 12 bits, becomes 255); wider or negative ones
  by the photograph's own range;
- *fractions*: times 255 if they lie in 0..1 (an overshoot up to 2 is cut off at 1), as they are if in 0..255, else by
  the photograph's own range.

A line on the error stream says so once for each kind of scaling.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import DataError
from ..runtime.notices import notice

Exif = Literal["apply", "ignore"]

MAX_PIXELS = 100_000_000  # of one photograph; more is taken for a mistake or an attack

# Endings under which photographs are looked for, in any case; the first are the likeliest.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpe", ".jfif", ".jp2", ".j2k", ".jpx", ".avif",
    ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".apng", ".mpo", ".heic", ".heif",
)  # fmt: skip

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras, scanners and microscopes

# Pillow warns of odd metadata without saying in which file; nothing here depends on those.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class PhotographError(DataError):
    """A photograph that cannot be read; the message is ``FILE: REASON``.

    Attributes:
        path: the file.
        reason: why, in a few words.
    """

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)  # it crosses from a loader's process to the main one


def read_photograph(path: str | Path, exif: Exif = "apply", *, max_pixels: int | None = MAX_PIXELS) -> np.ndarray:
    """A photograph as uint8 [H, W, 3], 0..255, RGB, by the rules above.

    Args:
        path: file of any format that Pillow reads; its ending does not matter.
        exif: turn it as its EXIF orientation says, or ``ignore`` that.
        max_pixels: refuse larger ones before they are decoded; None refuses none.

    Raises:
        PhotographError: the file is missing, empty, no photograph, broken, cut off, too large, or holds no finite
            numbers.
    """
    with opened(path, max_pixels) as image:
        turn = orientation(image)
        image.load()
        if image.format == "PNG":
            refuse_damaged_png(path)
        rgb = Image.fromarray(_rgb(image, path))
        rgb.format = image.format
        return np.array(turned(rgb, turn, exif))


@contextlib.contextmanager
def opened(path: str | Path, max_pixels: int | None = MAX_PIXELS) -> Iterator[Image.Image]:
    """The opened file, whose pixels are not decoded yet; whatever goes wrong inside is named after it.

    Raises:
        PhotographError: as :func:`read_photograph`.
    """
    try:
        # Opened here: from a path Pillow maps a turned TIFF into memory with its sides swapped.
        with _without_pillows_limit(), open(path, "rb") as file, _open(file) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise PhotographError(
                    path,
                    f"{image.width}x{image.height} pixels, more than the limit max_pixels = {max_pixels}",
                )
            yield image
    except PhotographError:
        raise
    except FileNotFoundError:
        raise PhotographError(path, "not found") from None
    except IsADirectoryError:
        raise PhotographError(path, "a folder, no photograph") from None
    except UnidentifiedImageError:
        raise PhotographError(path, f"cannot be decoded ({_what_it_is(path)})") from None
    except MemoryError:
        raise PhotographError(path, "cannot be decoded (not enough memory)") from None
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise PhotographError(path, f"cannot be decoded ({in_short(error)})") from error


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened file that is not loaded yet, 1..8; 1 if there is none that makes sense."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, MemoryError):  # of the pixels: some formats have their EXIF behind them
        raise
    except Exception:  # a broken block of metadata is no reason to refuse the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def turned(image: Image.Image, turn: int, exif: Exif) -> Image.Image:
    """A loaded image turned by the ``turn`` that it had before loading, or as stored; Pillow turns TIFF as it loads."""
    turns = (_TURNS if exif == "apply" else {}) if image.format != "TIFF" else ({} if exif == "apply" else _BACK)
    return image.transpose(turns[turn]) if turn in turns else image


def sizes(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an opened file that is not loaded yet: as stored, and turned as EXIF says."""
    swapped = (image.height, image.width) if orientation(image) > 4 else image.size
    return (swapped, image.size) if image.format == "TIFF" else (image.size, swapped)


def is_image_name(path: str | Path) -> bool:
    """Whether a file's name is that of a photograph; macOS's ``._x.jpg`` hold none."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("._")


def in_short(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


def _rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """A loaded image -> uint8 [H, W, 3], not turned."""
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _to_8_bits(np.asarray(image), path)
        return np.repeat(grey[..., None], 3, axis=2)
    _refuse_dark_16_bits(image, path)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _to_8_bits(values: np.ndarray, path: str | Path) -> np.ndarray:
    """Grey values of any range -> uint8, by the rules above."""
    if not np.isfinite(values).all():
        raise PhotographError(path, "holds values that are no finite numbers")
    whole = np.issubdtype(values.dtype, np.integer)
    low, high = values.min().item(), values.max().item()
    depth = next((depth for depth in _DEPTHS if high < 1 << depth), None)
    if low < 0 or (depth is None if whole else high > 255):
        kind = f"its own range {low:g}..{high:g}"
    elif whole:
        low, high = 0, (1 << depth) - 1
        kind = f"0..{high}"
    else:
        low, high = 0, 1 if high <= 2 else 255  # resizing overshoots a little
        kind = f"0..{high}"
    if high - low != 255 or not whole:
        what = f"whole numbers of {values.dtype.itemsize * 8} bits" if whole else "fractions"
        of_kind = kind if low == 0 else "its own range"
        notice(f"scaled {what} {of_kind}", f"{path}: photographs of {what} are scaled from {kind} to 8 bits")
    scaled = (values.astype(np.float64) - low) * (255 / max(high - low, np.finfo(np.float64).tiny))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _refuse_dark_16_bits(image: Image.Image, path: str | Path) -> None:
    """Of colours of 16 bits Pillow gives the upper 8, which are nearly nothing where the numbers are of 12 bits."""
    if _bits(image, path) <= 8 or image.mode not in ("RGB", "RGBA", "LA"):
        return
    brightest = max(high for _, high in image.convert("RGB").getextrema())
    if brightest < 64:
        raise PhotographError(
            path,
            f"16-bit colours of which less than 14 bits are used (up to about {brightest * 257}):"
            " black in 8 bits; convert it to 8 bits by its range",
        )


def _bits(image: Image.Image, path: str | Path) -> int:
    """Bits of a sample in the file, where PNG or TIFF says so."""
    if image.format == "PNG":
        return png_header(path)[0]
    bits = getattr(image, "tag_v2", {}).get(258, 8)
    return max(bits) if isinstance(bits, tuple) else int(bits)


def png_header(path: str | Path) -> tuple[int, int]:
    """(bits of a sample, colour type) of a PNG file; Pillow keeps neither."""
    with open(path, "rb") as file:
        start = file.read(26)
    return start[24], start[25]


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
        file.seek(0)
        return Image.open(BytesIO(_without_text(file.read())))


def _without_text(png: bytes) -> bytes:
    """A PNG without its chunks of text, which may be larger than Pillow unpacks and say nothing of the pixels."""
    return png[:8] + b"".join(chunk for chunk in _chunks(png) if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt"))


def _chunks(png: bytes) -> Iterator[bytes]:
    at = 8
    while at + 8 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        yield png[at:end]
        at = end


def refuse_damaged_png(path: str | Path) -> None:
    """Pillow decodes a PNG's pixels without a look at their checksums, and damage shows as other pixels.

    Raises:
        OSError: a checksum that is wrong.
    """
    for chunk in _chunks(Path(path).read_bytes()):
        if chunk[4:8] == b"IDAT" and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise OSError("the checksum of its pixels is wrong: the file is damaged")


def _what_it_is(path: str | Path) -> str:
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "the file is empty"
    if re.match(rb"\s*(<!doctype html|<html|<head|<\?xml|<body)", start, re.I):
        return "it is a web page or XML"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer to a file in Git LFS"
    printable = sum(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    return "it is a text" if printable == len(start) else "its format is not known"


_lock = threading.Lock()
_inside: list[int | None] = []  # one entry for each thread that reads: what the limit was


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow's own limit on pixels is a global that warns, then fails; ours is an argument."""
    with _lock:
        _inside.append(Image.MAX_IMAGE_PIXELS if not _inside else _inside[0])
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lock:
            limit = _inside.pop()
            if not _inside:
                Image.MAX_IMAGE_PIXELS = limit
