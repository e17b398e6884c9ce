"""Random-walk propagation over the affinity window in plain PyTorch: the oracle of the other backends.

    D_jj = sum_i A_ij^p + eps,   T = D^-1 A^p,   M' = T M       (AFA, Eq. 7 and 8), repeated num_steps times

In window layout tap t of pixel i holds A_ij for j = i + offset_t, so D sums each tap's plane moved by its
offset and the product is a diffusion with zero border. T is computed in float64, for a D below float32's normal
numbers has no inverse there, and is then rounded to float32, or stays float64 where that is given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..affinity.reference import window_neighbours, window_offsets
from ..diffusion.reference import diffuse, no_steps


def walk_weights(affinity: torch.Tensor, radius: int, power: float, eps: float) -> torch.Tensor:
    """T in window layout, [B, taps, h, w]. What a tap outside the image holds plays no part."""
    batch, taps, height, width = affinity.shape
    _, inside = window_neighbours(height, width, radius, affinity.device)
    dtype = torch.promote_types(affinity.dtype, torch.float32)
    powered = torch.where(inside.view(taps, height, width), affinity.double(), 0) ** power
    # fold adds every tap of every pixel onto the pixel it points at: the sums of the columns of A^p.
    column = F.fold(powered.flatten(2), (height, width), kernel_size=2 * radius + 1, padding=radius)
    return (powered / (column + eps)).to(dtype)


def random_walk(
    affinity: torch.Tensor,
    cams: torch.Tensor,
    radius: int,
    power: float = 2,
    num_steps: int = 1,
    eps: float = 0.1,
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """affinity [B, taps, h, w], cams [B, C, h, w] -> [B, C, h, w] in the dtype of cams."""
    if num_steps == 0:
        return no_steps(cams, affinity, class_mask)
    weights = walk_weights(affinity, radius, power, eps)
    return diffuse(weights, cams, window_offsets(radius), num_steps, "zero", class_mask)
