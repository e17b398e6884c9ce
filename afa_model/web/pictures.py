"""What the page shows: pictures with a point marked, the legend, files of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..conventions import IGNORE
from ..data.classes import voc_palette
from ..data.files import write_label

LEAST_SIDE = 640  # of a picture that is shown
_YELLOW, _BLACK = (255, 212, 0), (0, 0, 0)


def marked(picture: np.ndarray, point: tuple[int, int] | None) -> np.ndarray:
    """A picture uint8 [H, W, 3] with a ring and a cross at the pixel (y, x), as large as the picture allows."""
    if point is None:
        return picture
    height, width = picture.shape[:2]
    radius = max(3.0, min(height, width) / 32)
    rows, columns = np.mgrid[:height, :width]
    down, right = np.abs(rows - point[0]), np.abs(columns - point[1])
    far = np.hypot(down, right)
    stroke = max(0.8, radius / 6)
    shape = np.minimum(np.abs(far - radius), np.where(far <= 1.7 * radius, np.minimum(down, right), np.inf))
    shape = np.where((far < radius * 0.45), np.inf, shape)  # what is looked at stays to be seen
    made = picture.copy()
    made[shape <= stroke + 1] = _BLACK
    made[shape <= stroke] = _YELLOW
    return made


def shown_in(labels: Iterable[np.ndarray]) -> list[int]:
    """The classes (0..K-1 and 255) that occur in labels, ascending."""
    return sorted({int(value) for label in labels for value in np.unique(label)})


def legend(
    classes: Sequence[int],
    names: Sequence[str],
    shares: Mapping[int, float] | None = None,
    ticked: Iterable[int] = (),
) -> str:
    """The colours of classes (0..K-1 and 255) as HTML; names are text, whatever is in them.

    shares: class -> what the classifier says of it, 0..1.
    ticked: classes whose names are bold.
    """
    palette, bold = voc_palette(), set(ticked)
    parts = []
    for index in classes:
        red, green, blue = palette[index].tolist()
        name = "left open" if index == IGNORE else names[index]
        words = escape(name) if index not in bold else f"<b>{escape(name)}</b>"
        if shares is not None and index in shares:
            words += f" {100 * shares[index]:.0f} %"
        parts.append(
            f'<span class="afa-key"><span class="afa-patch" style="background:#{red:02x}{green:02x}{blue:02x}"></span>'
            f"<span>{words}</span></span>"
        )
    return f'<div class="afa-legend">{"".join(parts)}</div>'


def tame(name: str) -> str:
    """Of a photograph's name those letters that any file system takes, without its ending."""
    stem = Path(name).stem[:60]
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem) or "picture"


def enlargement(size: Sequence[int]) -> int:
    """How many pixels wide a pixel of a picture of this size is drawn, so that small pictures can be seen: browsers do
    not enlarge what can be clicked at.
    """
    return max(1, -(-LEAST_SIDE // max(size)))


def picture_file(picture: np.ndarray, kind: str, name: str, folder: str | Path) -> str:
    """Write a picture uint8 [H, W, 3] as ``<folder>/shown_<kind>_<name>.png``, under which name it is downloaded; each
    of its pixels is :func:`enlargement`'s.
    """
    path = Path(folder) / f"shown_{kind}_{tame(name)}.png"
    times = enlargement(picture.shape[:2])
    Image.fromarray(picture.repeat(times, 0).repeat(times, 1)).save(path, compress_level=1)
    return str(path)


def label_files(labels: Mapping[str, np.ndarray], name: str, folder: str | Path) -> list[str]:
    """Write labels uint8 [H, W] as PNGs of class indices with VOC's colours: ``<folder>/<kind>_<name>.png``."""
    paths = []
    for kind, label in labels.items():
        path = Path(folder) / f"{kind}_{tame(name)}.png"
        write_label(path, label)
        paths.append(str(path))
    return paths
