"""Sinkhorn normalisation of the affinity window in plain PyTorch: the oracle of the other backends.

    A_ij <- A_ij / (sum_i A_ij + eps),   A_ij <- A_ij / (sum_j A_ij + eps)      repeated num_iter times

In window layout tap t of pixel i holds A_ij for j = i + offset_t, so a row is what one pixel holds and a column what
points at one pixel. Divided is in float64; the end is rounded to the dtype of the affinity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..affinity.reference import window_neighbours


def transposed(window: torch.Tensor, index: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """A_ji in the place of A_ij, [B, taps, N]: what the neighbour holds in the tap that points back."""
    back = torch.arange(window.shape[1] - 1, -1, -1, device=window.device)[:, None]
    return torch.where(inside, window[:, back, index], 0)


def sinkhorn(
    affinity: torch.Tensor, radius: int, num_iter: int = 3, eps: float = 0.0, symmetric: bool = False
) -> torch.Tensor:
    """affinity [B, taps, h, w] -> the same, 0 where a tap leaves the image."""
    height, width = affinity.shape[2:]
    index, inside = window_neighbours(height, width, radius, affinity.device)
    window = torch.where(inside, affinity.double().flatten(2), 0)
    for _ in range(num_iter):
        # fold adds every tap of every pixel onto the pixel it points at.
        column = F.fold(window, (height, width), kernel_size=2 * radius + 1, padding=radius).flatten(1) + eps
        window = torch.where(inside, window / torch.where(inside, column[:, index], 1), 0)
        row = window.sum(1, keepdim=True) + eps
        window = torch.where(inside, window / row, 0)
    if symmetric:
        window = (window + transposed(window, index, inside)) / 2
    return window.to(affinity.dtype).view(affinity.shape)
