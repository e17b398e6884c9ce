"""Photographs and labels of one file each, as tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..conventions import SOFTWARE
from ..errors import DataError, reason
from .classes import voc_palette
from .masks import index_values, load_mask
from .photographs import MAX_PIXELS, Exif, read_photograph


def digest(path: Path) -> str:
    """SHA-256 of a file's contents; of one that cannot be read its path's, which no other has."""
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError:
        found.update(os.fsencode(path.absolute()))
    return found.hexdigest()


def files_below(folder: Path, without: Collection[Path] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from ``folder`` down with the names of what is in it and no folder, sorted. Links are followed, but
    for those to a folder that they lie in; hidden folders and those ``without`` are left out.

    Raises:
        DataError: a folder cannot be listed, and what is in it would be missing without a word.
    """
    yield from _below(Path(folder), {path.resolve() for path in without}, ())


def _below(folder: Path, without: Collection[Path], above: tuple[Path, ...]) -> Iterator[tuple[Path, list[str]]]:
    real = folder.resolve()
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({reason(error)})") from error
    folders = {name for name in names if os.path.isdir(folder / name)}
    yield folder, [name for name in names if name not in folders]
    for name in sorted(folders):
        if not name.startswith(".") and (folder / name).resolve() not in without:
            yield from _below(folder / name, without, (*above, real))


def read_photo(path: str | Path, exif: Exif = "apply", max_pixels: int | None = MAX_PIXELS) -> torch.Tensor:
    """A photograph as uint8 [3, H, W], 0..255, RGB; see :func:`~afa_model.data.photographs.read_photograph`."""
    pixels = read_photograph(path, exif, max_pixels=max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_label(path: str | Path) -> torch.Tensor:
    """A mask as int64 [H, W]: the stored index of a palette or grey image, never its colours.

    Raises:
        DataError: the file cannot be decoded; ValueError: it holds colours instead of indices.
    """
    image, bits, _ = load_mask(path, "ignore")
    if image.mode in ("RGB", "RGBA", "LA"):
        raise ValueError(f"{path}: a mask holds class indices (image mode P or L), this one is {image.mode}")
    return torch.from_numpy(index_values(image, bits).astype(np.int64))


def _made_here() -> PngInfo:
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def made_here(path: str | Path) -> bool:
    """Whether a PNG is a label or a panel of this project's, which is no photograph."""
    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get("Software") == SOFTWARE
    except Exception:  # whatever is wrong with it will be said when it is read
        return False


def write_grey(path: str | Path, values: torch.Tensor) -> None:
    """Write a map [H, W] in 0..1 as a grey PNG of 8 bits, 255 for 1."""
    Image.fromarray(values.float().mul(255).round().to(torch.uint8).cpu().numpy()).save(path, pnginfo=_made_here())


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
    image.save(path, pnginfo=_made_here())
