"""Which neighbours a pixel has: the taps of PAR and of a window, and what becomes of them at the border.

Weights lie in memory as an image with one channel for each tap, in the order of these lists. The references count
their taps themselves, so that an error in here shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pairs = Sequence[tuple[int, int]]

# (dy, dx) around a pixel, row-major, the centre left out.
RING = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def ring_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """(dy, dx) of PAR's taps: the ring of every dilation, one after the other."""
    return [(dilation * dy, dilation * dx) for dilation in dilations for dy, dx in RING]


def position_weights(dilations: Sequence[int], w2: float) -> list[float]:
    """PAR's position term, the same at every pixel: softmax of -(dist / (sigma + 1e-8) / w2)^2 over the taps, sigma the
    unbiased standard deviation of their distances.
    """
    distances = [math.hypot(dy, dx) for dy, dx in ring_offsets(dilations)]
    mean = math.fsum(distances) / len(distances)
    sigma = math.sqrt(math.fsum((distance - mean) ** 2 for distance in distances) / (len(distances) - 1))
    scaled = [distance / (sigma + 1e-8) / w2 for distance in distances]
    kappa = [-value * value for value in scaled]  # a product goes to infinity where a power would raise
    largest = max(kappa)
    exponentials = [math.exp(value - largest) for value in kappa]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def window_offsets(radius: int) -> list[tuple[int, int]]:
    """(dy, dx) of every tap of a window, row-major, the centre included."""
    steps = range(-radius, radius + 1)
    return [(dy, dx) for dy in steps for dx in steps]


def clipped(offsets: Pairs, height: int, width: int) -> list[tuple[int, int]]:
    """The same taps, none farther than the image is large: past that an offset reaches the same pixel, or none."""
    return [(max(-height, min(height, dy)), max(-width, min(width, dx))) for dy, dx in offsets]


def window_neighbours(height: int, width: int, radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixel that each tap of each pixel reaches, [taps, N] int64, and whether it exists, [taps, N] bool.

    Outside the image the index is N, one past the last pixel.
    """
    step = torch.arange(-radius, radius + 1, device=device)
    y = torch.arange(height, device=device) + step[:, None]  # [side, h]
    x = torch.arange(width, device=device) + step[:, None]  # [side, w]
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    index = torch.where(inside, y[:, None, :, None] * width + x[None, :, None, :], height * width)
    taps = (2 * radius + 1) ** 2
    return index.reshape(taps, -1), inside.reshape(taps, -1)


def dense_to_window(dense: Tensor, height: int, width: int, radius: int) -> Tensor:
    """[B, N, N] -> [B, taps, h, w]; 0 where the neighbour is outside the image."""
    index, inside = window_neighbours(height, width, radius, dense.device)
    index = torch.where(inside, index, 0).t().expand(dense.shape[0], -1, -1)  # [B, N, taps]
    window = dense.gather(2, index).transpose(1, 2)
    return torch.where(inside, window, 0).unflatten(2, (height, width))


def window_to_dense(affinity: Tensor, radius: int) -> Tensor:
    """[B, taps, h, w] -> [B, N, N]; 0 outside the window."""
    batch, _, height, width = affinity.shape
    count = height * width
    index, _ = window_neighbours(height, width, radius, affinity.device)
    # A column more than there are pixels takes what points outside the image.
    dense = affinity.new_zeros(batch, count, count + 1)
    dense = dense.scatter(2, index.t().expand(batch, -1, -1), affinity.flatten(2).transpose(1, 2))
    return dense[:, :, :count].contiguous()
