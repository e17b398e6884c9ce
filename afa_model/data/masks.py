"""Masks -> classes: what a value or a colour in a file stands for, and a refusal where that is not known.

What a file may hold, and what it becomes:

- *indices* (palette or grey, 1 to 16 bits): the class of that index; samples of 1, 2 and 4 bits are read as stored, not
  as the grey level that a viewer shows;
- *a palette with VOC's colours at other indices* (a program sorted it anew), or with the grey levels of a grey mask:
  the class of the colour or level, unless `data.mask_palette` is ``index``;
- *colours* (RGB) that are all VOC's: the class of the colour; grey levels in three equal channels: those levels;
- `data.mask_values` comes first: which value of a file is which class; the others stay what they are;
- `data.ignore_index` and 255 are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..conventions import IGNORE
from .classes import voc_palette
from .photographs import Exif, opened, orientation, png_header, refuse_damaged_png, turned

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # in any case; formats that keep every value


@dataclass(frozen=True)
class MaskRules:
    """What the values in mask files mean.

    Args:
        num_classes: K, the background counted.
        ignore_index: value of pixels that do not count, besides 255.
        mask_values: value in the file -> class 0..K-1, or 255 for ignored; values that are not named stay as they are.
        by_colour: read palettes with VOC's colours at other indices by colour; otherwise by index, whatever the colour.
    """

    num_classes: int
    ignore_index: int = IGNORE
    mask_values: Mapping[int, int] = field(default_factory=dict)
    by_colour: bool = True


@dataclass(frozen=True)
class Mask:
    """A mask as it was read.

    Attributes:
        classes: uint8 [H, W], 0..K-1, or 255 for ignored.
        stored: the values that occur in the file before rules were applied, sorted.
        kind: ``indices``, ``palette`` (indices with a palette of colours), ``moved palette`` or ``colours`` (the
            last two were read by colour).
        colours: of a palette that is not VOC's, value -> colour for the values that occur.
        turn: EXIF's orientation in the file, 1..8.
    """

    classes: np.ndarray
    stored: tuple[int, ...]
    kind: str
    colours: Mapping[int, tuple[int, ...]]
    turn: int = 1


def read_mask(path: str | Path, rules: MaskRules, exif: Exif = "apply") -> Mask:
    """A mask by the rules above.

    Raises:
        PhotographError: the file cannot be decoded.
        ValueError: it holds values or colours that are no classes; the message says which settings fit.
    """
    image, bits, turn = load_mask(path, exif)
    if image.mode == "P":
        mask = _of_palette(image, rules)
    elif image.mode in ("RGB", "RGBA", "LA"):
        mask = _of_colours(image, rules)
    else:
        values = _samples(image, bits)
        mask = Mask(_classes(values, rules), _occurring(values), "indices", {})
    return replace(mask, turn=turn)


def load_mask(path: str | Path, exif: Exif = "apply") -> tuple[Image.Image, int, int]:
    """The decoded image, the bits of a sample, and the orientation in its EXIF (few have any), by which it is turned.

    Raises:
        PhotographError: the file cannot be decoded.
        ValueError: JPEG, or a mode that holds no classes.
    """
    with opened(path) as image:
        wrong = None
        if image.format in ("JPEG", "MPO"):
            wrong = f"{image.format}: its pixels are not kept exactly; class indices in a PNG are needed"
        elif image.mode not in ("1", "L", "P", "LA", "RGB", "RGBA", "I") and not image.mode.startswith("I;16"):
            wrong = f"image mode {image.mode}; class indices (mode P or L) are needed"
        turn = orientation(image)
        image.load()
        bits = 8
        if image.format == "PNG":
            refuse_damaged_png(path)
            bits = png_header(path)[0]
        elif image.format == "TIFF":
            bits = int(np.max(image.tag_v2.get(258, 8)))
        image = turned(image, turn, exif)
    if wrong is not None:
        raise MaskError(wrong)
    return image, bits, turn


class MaskError(ValueError):
    """A mask whose pixels are no classes."""


def index_values(image: Image.Image, bits: int) -> np.ndarray:
    """The numbers stored in a mask of one channel, int [H, W]."""
    return np.asarray(image) if image.mode == "P" else _samples(image, bits)


def _samples(image: Image.Image, bits: int) -> np.ndarray:
    """Pillow spreads grey samples of 2 and 4 bits over 0..255."""
    values = np.asarray(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    if image.mode == "L" and bits in (2, 4):
        return values // (255 // ((1 << bits) - 1))
    return values


def _of_palette(image: Image.Image, rules: MaskRules) -> Mask:
    values = np.asarray(image)
    stored = _occurring(values)
    palette = np.zeros((256, 3), np.uint8)
    flat = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    palette[: len(flat)] = flat
    used = {value: tuple(palette[value].tolist()) for value in stored}
    of_colour = _voc_classes(rules.num_classes)
    same = all(tuple(voc_palette()[value].tolist()) == colour for value, colour in used.items())
    if same:
        return Mask(_classes(values, rules), stored, "palette", {})
    white_first = tuple(palette[0].tolist()) == (255, 255, 255) and not palette[1].any()
    if white_first and rules.by_colour and not rules.mask_values and stored and set(stored) <= {0, 1}:
        raise MaskError(
            "its palette has white for 0 and black for 1; which is the object? data.mask_palette: index takes 1,"
            " data.mask_values: {0: 1, 1: 0} the other"
        )
    by_colour = rules.by_colour and not rules.mask_values and len(set(used.values())) == len(used)
    moved = _moved(used, rules) if by_colour else None
    if moved is not None:
        placed = [value for value, index in moved.items() if value == index and value >= len(moved)]
        if placed:  # a palette sorted anew holds the colours that are used first, and no gap before them
            value = next(value for value, index in moved.items() if value != index)
            raise MaskError(
                f"value {value} has the colour of class {moved[value]}, but value {placed[0]} has its own class's;"
                " classes by colour or by value? data.mask_palette: index takes the values"
            )
        table = np.zeros(256, np.uint8)
        table[list(moved)] = list(moved.values())
        return Mask(table[values], stored, "moved palette", {})
    strange = [value for value, colour in used.items() if any(colour) and of_colour.get(colour, value) != value]
    known = [value for value, colour in used.items() if any(colour) and of_colour.get(colour) == value]
    if by_colour and strange and not known:
        value, colour = strange[0], used[strange[0]]
        raise MaskError(
            f"value {value} has the colour {colour}, VOC's of class {of_colour[colour]}, but other colours are not"
            " VOC's: class indices with VOC's palette are needed, or data.mask_palette: index if the values are classes"
        )
    return Mask(_classes(values, rules), stored, "palette", used)


def _moved(used: Mapping[int, tuple[int, ...]], rules: MaskRules) -> dict[int, int] | None:
    """value -> class by the colours of a palette that was sorted anew, VOC's or that of grey levels; None if it is
    neither.
    """
    of_colour = _voc_classes(rules.num_classes)
    if all(colour in of_colour for colour in used.values()):
        return {value: of_colour[colour] for value, colour in used.items()}
    levels = {value: colour[0] for value, colour in used.items() if len(set(colour)) == 1}
    classes = {value: _meaning(level, rules) for value, level in levels.items()}
    # Black and white alone are colours to look at; a level such as 15 of 255 is nobody's choice of a colour.
    telling = any(0 < level < rules.num_classes for level in levels.values())
    if len(levels) == len(used) and None not in classes.values() and telling:
        return classes
    return None


def _of_colours(image: Image.Image, rules: MaskRules) -> Mask:
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() != (255, 255):
        raise MaskError(f"image mode {image.mode} with transparent pixels; class indices (mode P or L) are needed")
    pixels = np.asarray(image.convert("RGB"))
    colours, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    of_colour = _voc_classes(rules.num_classes)
    found = [of_colour.get(tuple(colour.tolist())) for colour in colours]
    grey = bool((colours == colours[:, :1]).all())
    black = not colours.any()
    if (black or not grey) and not rules.mask_values and None not in found:
        return Mask(np.array(found, np.uint8)[where].reshape(pixels.shape[:2]), (), "colours", {})
    if not grey:
        strange = [tuple(colour.tolist()) for colour, index in zip(colours, found) if index is None]
        shown = ", ".join(map(str, strange[:3])) + (", ..." if len(strange) > 3 else "")
        raise MaskError(
            f"image mode {image.mode} with colours that are no class's ({shown or 'data.mask_values is given'});"
            " class indices (mode P or L) or VOC's colours are needed"
        )
    values = pixels[..., 0]
    return Mask(_classes(values, rules), _occurring(values), "indices", {})


def _voc_classes(num_classes: int) -> dict[tuple[int, ...], int]:
    """VOC's colours of the classes and of ignored pixels -> their index."""
    palette = voc_palette()
    return {tuple(palette[index].tolist()): index for index in (*range(num_classes), IGNORE)}


def _occurring(values: np.ndarray) -> tuple[int, ...]:
    if values.dtype == np.uint8:
        return tuple(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
    return tuple(np.unique(values).tolist())


def _classes(values: np.ndarray, rules: MaskRules) -> np.ndarray:
    """Values of a file -> uint8 classes."""
    stored = _occurring(values)
    meaning = {value: _meaning(value, rules) for value in stored}
    wrong = [value for value, index in meaning.items() if index is None]
    if wrong:
        raise MaskError(outside(wrong, stored, rules))
    if values.dtype == np.uint8 and all(value == index for value, index in meaning.items()):
        return values
    if values.dtype == np.uint8:
        table = np.zeros(256, np.uint8)
        table[list(meaning)] = list(meaning.values())
        return table[values]
    order = np.searchsorted(np.array(stored), values)
    return np.array(list(meaning.values()), np.uint8)[order]


def _meaning(value: int, rules: MaskRules) -> int | None:
    if value in rules.mask_values:
        return rules.mask_values[value]
    if value in (rules.ignore_index, IGNORE):
        return IGNORE
    return value if 0 <= value < rules.num_classes else None


def outside(wrong: list[int], stored: tuple[int, ...], rules: MaskRules) -> str:
    """What is wrong with values that are no class, and which setting may fit."""
    listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    text = f"label {listed} outside 0..{rules.num_classes - 1} and {IGNORE}"
    top = stored[-1]
    if len(wrong) == 1 and wrong[0] in (254, 65535):
        also = ""
        if wrong[0] < IGNORE in stored:
            fits = f"data.mask_values: {{{IGNORE}: 0, 0: 1, ...}}"
            also = f"; if {IGNORE} is the background, every class is one off: {fits}"
        return f"{text} (if {wrong[0]} marks pixels to ignore: data.ignore_index: {wrong[0]}{also})"
    step = next((step for step in (85, 17) if top > 0 and all(value % step == 0 for value in stored)), None)
    if step is not None:
        levels = {value: value // step for value in stored}
        return f"{text} (grey levels of {2 if step == 85 else 4} bits? data.mask_values: {levels})"
    if len(wrong) <= 5:
        return f"{text} (data.mask_values says which class a value is, data.ignore_index which value to ignore)"
    return f"{text} (a photograph, or grey levels for classes? data.mask_values says which class a value is)"
