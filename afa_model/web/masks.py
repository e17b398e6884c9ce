"""Masks that a user paints or brings, as labels: int64 [H, W], 0 the background, 255 unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..conventions import IGNORE, require
from ..data.classes import voc_palette
from ..data.masks import MaskRules, load_mask, read_mask
from ..data.photographs import PhotographError
from ..errors import DataError

OBJECTS = 4  # that can be painted
NOTHING = -1  # where nothing was painted
MOST_POINTS, FARTHEST = 100_000, 20_000
Unpainted = Literal["background", "unknown"]
_RULES = MaskRules(num_classes=IGNORE)
_APART = 0.1  # ratios of sides of a mask and its photograph may differ by this: a coarse grid is rounded


def uploaded_mask(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A mask file as a label of ``size`` (height, width): class indices or VOC's colours, of any size of the same
    shape, enlarged without blurring. A mask of 0 and 255 alone has one object, class 1, and so has a palette of
    black and white alone, whose white it is.

    Returns:
        uint8 [H, W].

    Raises:
        DataError: it cannot be read, is no mask, or has another shape than the photograph.
    """
    path = Path(path)
    try:
        label = _classes_in(path)
    except PhotographError as error:
        raise DataError(f"{path.name}: {error.reason}") from error
    except ValueError as error:
        raise DataError(f"{path.name}: {error}") from error
    (height, width), (rows, columns) = size, label.shape
    if abs(np.log(columns * height / (rows * width))) > _APART:
        raise DataError(
            f"{path.name}: {columns} × {rows} pixels is another shape than the photograph's, {width} × {height};"
            " is one of them turned?"
        )
    return resized_label(label, size)


def _classes_in(path: Path) -> np.ndarray:
    white = _white_of_palette(path)
    if white is not None:
        return white
    mask = read_mask(path, _RULES)
    if mask.kind == "indices" and set(mask.stored) <= {0, IGNORE} and IGNORE in mask.stored:
        return (mask.classes == IGNORE).astype(np.uint8)
    return mask.classes


def _white_of_palette(path: Path) -> np.ndarray | None:
    """Where a palette of black and white alone has white, as class 1: uint8 [H, W]; None of any other file, and of one
    whose indices may be classes.
    """
    image, _, _ = load_mask(path)
    if image.mode != "P" or set(np.unique(image).tolist()) - {0, 1, IGNORE}:
        return None
    colours = np.asarray(image.convert("RGB"))
    white, black = (colours == 255).all(-1), (colours == 0).all(-1)
    return white.astype(np.uint8) if white.any() and (white | black).all() else None


def resized_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w] -> [H, W], nearest."""
    if label.shape == tuple(size):
        return label
    return np.array(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))


def brush_colors(count: int = OBJECTS) -> list[str]:
    """The colours in which classes 1..count and the background, which is the last, are painted, as ``#rrggbb``."""
    palette = voc_palette()
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in palette[[*range(1, count + 1), 0]].tolist()]


@dataclass(frozen=True)
class Stroke:
    """A line drawn with a round brush.

    Attributes:
        number: the class, 0 for background; NOTHING takes away what was painted.
        radius: of the brush, in pixels.
        points: (x, y) in pixels, at least one.
    """

    number: int
    radius: float
    points: tuple[tuple[float, float], ...]


def strokes_of(sent: Any) -> list[Stroke]:
    """What the canvas sends, ``[{"k": class, "r": radius, "p": [[x, y], ...]}, ...]``.

    Raises:
        ValueError: it is something else, or more than anybody draws.
    """
    try:
        made = [
            Stroke(int(each["k"]), float(each["r"]), tuple((float(x), float(y)) for x, y in each["p"])) for each in sent
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("strokes: expected a list of class, radius and points") from error
    require(sum(len(each.points) for each in made) <= MOST_POINTS, "strokes", f"up to {MOST_POINTS} points", "more")
    for each in made:
        require(NOTHING <= each.number <= OBJECTS, "strokes", f"classes 0..{OBJECTS}", each.number)
        fits = each.points and 0 < each.radius < FARTHEST and all(abs(c) < FARTHEST for p in each.points for c in p)
        require(bool(fits), "strokes", "points within the picture", each.points[:3])
    return made


def painted(strokes: Sequence[Stroke], size: tuple[int, int]) -> np.ndarray:
    """Strokes in a picture of ``size`` (height, width), later ones above -> int16 [H, W]: 0..OBJECTS, or NOTHING."""
    image = Image.new("I", size[::-1], NOTHING)
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        r = stroke.radius
        if len(stroke.points) > 1:
            pen.line(stroke.points, stroke.number, max(1, round(2 * r)))
        for x, y in stroke.points:
            pen.ellipse((x - r, y - r, x + r, y + r), stroke.number)
    return np.asarray(image).astype(np.int16)


def mask_of(base: np.ndarray | None, over: np.ndarray, unpainted: Unpainted = "background") -> torch.Tensor:
    """The label that strokes above a mask make.

    Args:
        base: uint8 [H, W], the mask below the strokes, or None.
        over: of :func:`painted`.
        unpainted: what pixels are that neither says anything of.

    Returns:
        int64 [H, W], 0..count and 255.
    """
    below = np.full(over.shape, IGNORE if unpainted == "unknown" else 0, np.int64) if base is None else base
    if base is not None and unpainted == "unknown":
        below = np.where(base == 0, IGNORE, base)
    return torch.from_numpy(np.where(over != NOTHING, over, below).astype(np.int64))
