"""Photographs as the page has them: read from what was dropped, made small; examples to start with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.photographs import PhotographError, is_image_name, read_photograph
from ..data.synthetic import SyntheticSettings, scene
from ..data.synthetic_paint import paint_scene
from ..errors import DataError
from ..pictures.overlays import thumbnail
from .settings import ServeSettings

MOST_EXAMPLES = 6
_FIRST_OF_THE_VALIDATION = 1_000_000  # number of a generated picture that no demo was trained on


@dataclass(frozen=True)
class Photograph:
    """A photograph to work on.

    Attributes:
        name: its file's, without the folder.
        pixels: uint8 [H, W, 3], RGB.
        stored: (height, width) in its file, turned as EXIF says.
        label: uint8 [H, W], a coarse mask that comes with it, or None.
    """

    name: str
    pixels: np.ndarray
    stored: tuple[int, int]
    label: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of ``pixels``."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def said(self) -> str:
        """Name and size in words."""
        (height, width), (rows, columns) = self.stored, self.size
        smaller = "" if self.stored == self.size else f", worked on at {columns} × {rows}"
        return f"{self.name}: {width} × {height} pixels{smaller}"


@dataclass(frozen=True)
class Example:
    """A photograph to offer: its name, and what reads it.

    Raises (when it is called):
        DataError: it cannot be read.
    """

    name: str
    read: Callable[[], Photograph]


def photograph(path: str | Path, settings: ServeSettings | None = None) -> Photograph:
    """A file of any kind as a photograph.

    Raises:
        DataError: it is no photograph, broken, or too large; the message has the file's name without its folder.
    """
    settings, path = settings or ServeSettings(), Path(path)
    try:
        megabytes = path.stat().st_size / 1e6
        if megabytes > settings.max_megabytes:
            raise DataError(f"{path.name}: {megabytes:.0f} MB, more than the {settings.max_megabytes:g} MB taken here")
        pixels = read_photograph(path, settings.exif, max_pixels=settings.max_pixels)
    except PhotographError as error:
        raise DataError(f"{path.name}: {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from error
    return _small(path.name, pixels, settings.long_side)


def _small(name: str, pixels: np.ndarray, side: int) -> Photograph:
    small = thumbnail(torch.from_numpy(pixels).permute(2, 0, 1), side)
    return Photograph(name, small, pixels.shape[:2])


def examples_in(folder: str | Path, settings: ServeSettings | None = None) -> list[Example]:
    """The first photographs of a folder, sorted.

    Raises:
        DataError: there is no such folder, or no photograph in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"examples: {folder} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and is_image_name(path))
    if not paths:
        raise DataError(f"examples: no photograph in {folder}")
    return examples_of(paths, settings)


def examples_of(paths: Sequence[Path], settings: ServeSettings | None = None) -> list[Example]:
    """Photographs in files; those that cannot be read are left out."""
    found = []
    for path in paths:
        try:
            photograph(path, settings)
        except DataError:
            continue
        found.append(Example(path.name, lambda path=path: photograph(path, settings)))
        if len(found) == MOST_EXAMPLES:
            break
    return found


def generated_examples(count: int = MOST_EXAMPLES) -> list[Example]:
    """Pictures such as `afa demo` trains on, of which none of its runs has seen any."""

    def read(number: int) -> Photograph:
        pixels, _ = scene(SyntheticSettings(), _FIRST_OF_THE_VALIDATION + number)
        return Photograph(f"generated_{number}.png", pixels, pixels.shape[:2])

    return [Example(f"generated_{number}.png", lambda number=number: read(number)) for number in range(count)]


def masked_examples(count: int = 3, size: tuple[int, int] = (270, 360)) -> list[Example]:
    """Generated pictures, each with a mask as coarse as a CAM's: right where its animals are, and nowhere exact."""

    def read(number: int) -> Photograph:
        pixels, mask = paint_scene(np.random.RandomState([4, number]), *size)
        return Photograph(f"generated_{number}.png", pixels, size, coarse(mask))

    return [Example(f"generated_{number}.png", lambda number=number: read(number)) for number in range(count)]


def coarse(mask: np.ndarray, cell: int = 18) -> np.ndarray:
    """A mask uint8 [H, W] in cells of so many pixels: each the class that fills a third of it, or background."""
    made = np.zeros_like(mask)
    for top in range(0, mask.shape[0], cell):
        for left in range(0, mask.shape[1], cell):
            place = slice(top, top + cell), slice(left, left + cell)
            counts = np.bincount(mask[place].ravel(), minlength=2)
            best = 1 + int(counts[1:].argmax())
            if counts[best] * 3 > mask[place].size:
                made[place] = best
    return made
