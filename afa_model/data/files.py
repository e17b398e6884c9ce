"""Files of a data set in VOC layout: where they lie, how they are read and written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..conventions import IGNORE
from ..errors import DataError
from .classes import voc_palette
from .photographs import IMAGE_SUFFIXES, read_photograph


def read_split(root: str | Path, split: str, list_dir: str = "ImageSets/Segmentation") -> list[str]:
    """Image names of a list file: ``<root>/<list_dir>/<split>.txt``, or the file ``split`` itself if it is a
    path.

    A line is a name (``2007_000032``, with sub-folders if there are any: ``train2014/x``) or, as in some
    lists of the field, the paths of the photograph and of its mask (``/JPEGImages/a.jpg
    /SegmentationClassAug/a.png``).

    Raises:
        DataError: root or list missing (the lists that exist are named), the list empty, or names that occur
            twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data root {root} is not a folder")
    candidates = [root / list_dir / f"{split}.txt", Path(split), root / split]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        there = ", ".join(sorted(file.stem for file in (root / list_dir).glob("*.txt"))) or "none"
        raise DataError(f"split {split!r}: {candidates[0]} not found (lists there: {there})")
    names = [_name_of_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DataError(f"{path} lists no images")
    seen: set[str] = set()
    doubles = [name for name in names if name in seen or seen.add(name)]
    if doubles:
        raise DataError(f"{path}: {len(doubles)} names are listed twice", doubles)
    return names


def _name_of_line(line: str) -> str:
    entry = line.split()[0]
    if entry.endswith(IMAGE_SUFFIXES):
        entry = entry.rsplit(".", 1)[0]
        # the first folder of a path from the data root is the image folder, which the settings name already
        entry = entry.lstrip("/").split("/", 1)[-1]
    return entry


def find_image(folder: str | Path, name: str) -> Path | None:
    """The photograph ``name`` in ``folder`` whatever its suffix, or None."""
    base = os.path.join(folder, name)
    return next((Path(base + suffix) for suffix in IMAGE_SUFFIXES if os.path.isfile(base + suffix)), None)


def read_photo(path: str | Path, upright: bool = False) -> torch.Tensor:
    """A photograph as uint8 [3, H, W], 0..255, RGB; see :func:`~afa_model.data.photographs.read_photograph`.

    Args:
        upright: turn it as its EXIF orientation says.
    """
    pixels = read_photograph(path, "apply" if upright else "ignore")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_label(path: str | Path) -> torch.Tensor:
    """A mask as int64 [H, W]: the raw index of a palette or grey PNG, never its colours.

    Raises:
        ValueError: the file holds colours (or 16 bits) instead of indices.
    """
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(
                f"{path}: a mask holds class indices (image mode P or L), this one is {image.mode}"
            )
        return torch.from_numpy(np.array(image)).long()


def values_in(mask: Image.Image) -> list[int]:
    """The values that occur in a mask of mode P or L, sorted."""
    return np.flatnonzero(np.bincount(np.asarray(mask).ravel(), minlength=256)).tolist()


def outside_classes(values: Sequence[int], num_classes: int) -> str | None:
    """What is wrong with mask values that are neither a class nor 255, or None."""
    wrong = [value for value in values if num_classes <= value != IGNORE]
    if not wrong:
        return None
    listed = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return f"label {listed} outside 0..{num_classes - 1} and {IGNORE}"


def write_label(path: str | Path, label: torch.Tensor | np.ndarray) -> None:
    """Write a label [H, W] of indices 0..255 as a PNG of mode P with the VOC palette; the folder is made if
    need be.
    """
    array = np.asarray(label)
    if array.ndim != 2 or array.size == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError(f"label: expected [H, W] with values 0..255, got {array.shape} {array.dtype}")
    image = Image.fromarray(array.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
