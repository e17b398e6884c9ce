"""Affinity of features in plain PyTorch: the oracle of the other backends.

    A_ij = |cos(f_i, f_j)|                     "cos"
    A_ij = exp(-mean_c |f_i,c - f_j,c|)        "exp_l1"
    A_ij = max(f_i . f_j, 0)                   "relu_dot"        for |dy| <= r and |dx| <= r, j = i + (dy, dx)

One tap after the other, so that memory holds the features of one at a time; autograd keeps the differences of "exp_l1".
A_ij = A_ji: half of the taps are computed, the others are their mirror images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..affinity.reference import window_offsets


def pair_affinity(own: torch.Tensor, other: torch.Tensor, kind: str) -> torch.Tensor:
    """Two sets of features [B, C, h, w], normalised for "cos" -> [B, h, w]."""
    if kind == "exp_l1":
        return torch.exp(-(own - other).abs().mean(1))
    product = (own * other).sum(1)
    return product.abs() if kind == "cos" else product.relu()


def feature_affinity(features: torch.Tensor, radius: int, kind: str = "cos") -> torch.Tensor:
    """features [B, C, H, W] -> [B, (2r+1)^2, H, W] in their dtype; taps row-major, 0 where one leaves the image."""
    batch, _, height, width = features.shape
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    if kind == "cos":
        values = F.normalize(values, dim=1, eps=1e-8)
    offsets = window_offsets(radius)
    planes = [values.new_zeros(batch, height, width)] * len(offsets)
    for tap in range(len(offsets) // 2, len(offsets)):
        dy, dx = offsets[tap]
        if dy >= height or abs(dx) >= width:
            continue
        left, right = max(-dx, 0), max(dx, 0)
        own = values[:, :, : height - dy, left : width - right]
        other = values[:, :, dy:, right : width - left]
        pairs = pair_affinity(own, other, kind)
        planes[tap] = F.pad(pairs, (left, right, 0, dy))
        planes[-1 - tap] = F.pad(pairs, (right, left, dy, 0))
    return torch.stack(planes, 1).to(features.dtype)
