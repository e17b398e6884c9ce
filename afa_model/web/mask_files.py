"""Masks that a user brings as files -> labels: uint8 [H, W], 0 the background, 255 unknown.

What a file may hold, and what it becomes:

- *black and white*: white is the object, class 1; soft edges, a JPEG's noise and other shades of grey go to the
  nearer of two clusters (Otsu 1979), and a file without two clear ones is refused;
- *class numbers* (grey levels 0..127, up to MOST_CLASSES of them) and *VOC's colours*: the classes, 255 unknown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..conventions import IGNORE
from ..data.masks import MaskError, MaskRules, index_values, load_mask, read_mask
from ..data.photographs import PhotographError, opened, read_photograph
from ..errors import DataError

MOST_CLASSES = 32  # grey levels that may be class numbers; more are shades
WANTED = "Drop one that is white on the object and black elsewhere, or a PNG of class numbers or VOC's colours."
_RULES = MaskRules(num_classes=IGNORE)
_APART = 0.1  # ratios of sides of a mask and its photograph may differ by this: a coarse grid is rounded
_FEW = 8  # greys that a palette gives to class numbers; more are shades
_WHITE = 128  # the lowest grey level that is no class number
_TINT = 24  # grey of a JPEG is this far from grey
_CLEAR = 0.9  # share of the variance that is between two clusters; of even shades it is 0.75


def uploaded_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A mask file as a label of ``size`` (height, width): as above, of any size of the same shape, enlarged without
    blurring.

    Returns:
        uint8 [H, W].

    Raises:
        DataError: it cannot be read, is no mask, or has another shape than the photograph.
    """
    path = Path(path)
    try:
        label = _label_in(path)
    except PhotographError as error:
        raise DataError(f"{path.name}: {error.reason}") from error
    except MaskError as error:
        raise DataError(f"{path.name}: not usable as a mask: {error}. {WANTED}") from error
    (height, width), (rows, columns) = size, label.shape
    if abs(np.log(columns * height / (rows * width))) > _APART:
        raise DataError(
            f"{path.name}: {columns} × {rows} pixels is another shape than the photograph's, {width} × {height};"
            " is one of them turned?"
        )
    return resized_label(label, size)


def _label_in(path: Path) -> np.ndarray:
    with opened(path) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg:
        return _object_in(_grey_of(read_photograph(path)))
    try:
        image, bits, _ = load_mask(path)
    except MaskError:  # a mode that nobody keeps classes in
        raise MaskError(_NEITHER) from None
    white = _white_of_palette(image)
    if white is not None:
        return white
    shades = _shades_of(image, bits)
    if shades is not None:
        return _object_in(shades)
    try:
        return read_mask(path, _RULES).classes
    except MaskError:  # it speaks of settings, of which the page has none
        transparent = "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255)
        raise MaskError("some of it is transparent" if transparent else _NEITHER) from None


_NEITHER = "its colours are neither black and white nor VOC's"


def _grey_of(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> [H, W].

    Raises:
        MaskError: it has colours.
    """
    if int((pixels.max(-1).astype(int) - pixels.min(-1)).max()) > _TINT:
        raise MaskError("it is a JPEG in colours, which that does not keep exactly")
    return pixels[..., 1]


def _white_of_palette(image: Image.Image) -> np.ndarray | None:
    """Where a palette of black and white alone has white, as class 1: uint8 [H, W]; None of any other file, and of one
    whose indices may be classes.
    """
    if image.mode != "P" or set(np.unique(image).tolist()) - {0, 1, IGNORE}:
        return None
    colours = np.asarray(image.convert("RGB"))
    white, black = (colours == 255).all(-1), (colours == 0).all(-1)
    return white.astype(np.uint8) if white.any() and (white | black).all() else None


def _shades_of(image: Image.Image, bits: int) -> np.ndarray | None:
    """The grey levels [H, W] of a file whose greys are shades; None if they may be class numbers, or it has colours."""
    if image.mode in ("1", "L", "I") or image.mode.startswith("I;16"):
        levels = np.asarray(image)
    else:
        colours = np.asarray(image.convert("RGBA"))
        if (colours[..., 3] != 255).any() or (colours[..., :3] != colours[..., :1]).any():
            return None
        levels = colours[..., 0]
    found = np.unique(levels)
    if image.mode in ("1", "L", "P") and len(found) <= _FEW and (levels != index_values(image, bits)).any():
        return None  # numbers, of a palette or of few bits, whose greys are for the eye
    numbers = (found >= 0) & (found < _WHITE)
    known = numbers | (found == IGNORE)
    may_be_classes = known.all() and len(found) <= MOST_CLASSES and (found[numbers] > 0).any()
    return None if may_be_classes or not found.any() else levels


def _object_in(levels: np.ndarray) -> np.ndarray:
    """Grey levels [H, W] -> uint8, 1 in the lighter of two clusters.

    The threshold is the one with the largest variance between the clusters, w0 w1 (m0 - m1)^2 (Otsu 1979, equation 18).

    Raises:
        MaskError: that is less than _CLEAR of the whole variance.
    """
    values, counts = np.unique(levels, return_counts=True)
    if len(values) == 1:
        return np.full(levels.shape, values[0] >= _WHITE, np.uint8)
    share = counts / counts.sum()
    below, sums = share.cumsum()[:-1], (share * values).cumsum()
    between = (sums[-1] * below - sums[:-1]) ** 2 / (below * (1 - below))
    best = int(between.argmax())
    if between[best] < _CLEAR * (share * (values - sums[-1]) ** 2).sum():
        raise MaskError("it has too many shades of grey to tell an object from its background")
    return (levels > values[best]).astype(np.uint8)


def resized_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w] -> [H, W], nearest."""
    if label.shape == tuple(size):
        return label
    return np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
