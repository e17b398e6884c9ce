"""Pixels of a picture: a photograph under heat or under class colours, and one point's affinity as a map."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from ..data.classes import voc_palette

CAM_COLORS = "turbo"
AFFINITY_COLORS = "magma"


def photo_of(image: Tensor) -> np.ndarray:
    """float [3, H, W] in [0,1], or uint8, -> uint8 [H, W, 3]."""
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        image = image.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def thumbnail(picture: Tensor, side: int = 1024) -> np.ndarray:
    """What is drawn of a large picture, of which a panel shows less: at most ``side`` pixels along its longer side.

    picture: uint8 [3, H, W], a photograph, whose pixels are averaged -> [h, w, 3]; or [H, W], a label, some of whose
    pixels are taken -> [h, w]. One that is small enough comes back as it is.
    """
    array = picture.detach().cpu().numpy()
    array = array if array.ndim == 2 else array.transpose(1, 2, 0)
    share = side / max(array.shape[:2])
    if share >= 1:
        return np.ascontiguousarray(array)
    size = [max(1, round(share * pixels)) for pixels in (array.shape[1], array.shape[0])]
    how = Image.Resampling.NEAREST if array.ndim == 2 else Image.Resampling.BOX
    return np.array(Image.fromarray(array).resize(size, how))


def heat_overlay(photo: np.ndarray, heat: Tensor | np.ndarray, colors: str = CAM_COLORS) -> np.ndarray:
    """A heat map over a photograph: the hotter, the more colour and the less photograph.

    Args:
        photo: uint8 [H, W, 3].
        heat: [h, w] in 0..1, resized to the photograph; NaN where there is nothing to show (the photograph is
            dimmed).
        colors: name of a matplotlib colour map.

    Returns:
        uint8 [H, W, 3].
    """
    heat = _fit(heat, photo.shape[:2])
    known = ~np.isnan(heat)
    heat = np.where(known, np.clip(heat, 0, 1), 0)
    tint = colormaps[colors](heat)[..., :3] * 255
    grey = photo.mean(-1, keepdims=True) * 0.75 + photo * 0.25
    share = np.where(known, 0.35 + 0.4 * heat, 0.0)[..., None]
    base = np.where(known[..., None], grey, grey * 0.45 + 40)
    return (base * (1 - share) + tint * share).round().astype(np.uint8)


def label_overlay(photo: np.ndarray, label: Tensor | np.ndarray, share: float = 0.6) -> np.ndarray:
    """Classes in their VOC colours over a photograph, a bright line around each; ignored pixels pale.

    Args:
        photo: uint8 [H, W, 3].
        label: integers [H, W], 0..K-1 and 255.
        share: of the colour where there is an object; the background keeps the photograph, a little darker.

    Returns:
        uint8 [H, W, 3].
    """
    label = np.asarray(label)
    if label.shape != photo.shape[:2]:
        raise ValueError(f"label: expected the photograph's size {photo.shape[:2]}, got {label.shape}")
    colors = voc_palette()[label].astype(np.float64)
    weight = np.where(label == 0, 0.35, share)[..., None]
    picture = photo * (1 - weight) + colors * weight
    edge = np.zeros(label.shape, dtype=bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    picture[edge] = 255
    return picture.round().astype(np.uint8)


def affinity_of_point(affinity: Tensor, point: tuple[int, int]) -> Tensor:
    """What one cell of the grid says about its neighbours (paper, Figures 5 and 7).

    Args:
        affinity: [(2r+1)^2, h, w] in 0..1, taps row-major in (dy, dx).
        point: (y, x), a cell of the grid.

    Returns:
        float32 [h, w], NaN outside the window.
    """
    taps, height, width = affinity.shape
    radius = (round(taps**0.5) - 1) // 2
    y, x = point
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"point: expected a cell of the {height}x{width} grid, got {point}")
    window = affinity[:, y, x].detach().float().cpu().view(2 * radius + 1, 2 * radius + 1)
    out = torch.full((height, width), torch.nan)
    top, left = max(0, y - radius), max(0, x - radius)
    bottom, right = min(height, y + radius + 1), min(width, x + radius + 1)
    out[top:bottom, left:right] = window[
        top - y + radius : bottom - y + radius, left - x + radius : right - x + radius
    ]
    return out


def cell_of(point: tuple[int, int], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The grid cell (y, x) that holds a pixel (y, x) of an image of ``size`` (height, width)."""
    return tuple(
        min(cells - 1, int(place * cells / pixels)) for place, pixels, cells in zip(point, size, grid)
    )


def _fit(heat: Tensor | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] resized to ``size``: NaN stays what it is (nearest), numbers are interpolated between
    themselves.
    """
    heat = torch.as_tensor(heat).detach().float().cpu()
    if tuple(heat.shape) == tuple(size):
        return heat.numpy()
    known = ~heat.isnan()
    resize = torch.nn.functional.interpolate
    value = resize(heat.nan_to_num(0)[None, None], size, mode="bilinear", align_corners=False)
    weight = resize(known.float()[None, None], size, mode="bilinear", align_corners=False)
    sharp = resize(known.float()[None, None], size, mode="nearest")
    return torch.where(sharp > 0, value / weight.clamp_min(1e-6), torch.nan)[0, 0].numpy()
