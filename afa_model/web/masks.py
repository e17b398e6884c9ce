"""Masks that a user paints, as labels: int64 [H, W], 0 the background, 255 unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..conventions import IGNORE, require
from ..data.classes import voc_palette

OBJECTS = 4  # that can be painted
NOTHING = -1  # where nothing was painted
MOST_POINTS, FARTHEST = 100_000, 20_000
Unpainted = Literal["background", "unknown"]


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
