"""Photographs and labels of one file each, as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..conventions import SOFTWARE
from .classes import voc_palette
from .masks import index_values, load_mask
from .photographs import MAX_PIXELS, Exif, read_photograph


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
