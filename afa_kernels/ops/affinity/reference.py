"""Affinity from attention in plain PyTorch, dense maps and all: the published form, and everyone's oracle.

    S_h,ij = q_h,i . k_h,j                                   raw attention scores of every head, unscaled
    A_ij   = sigmoid(sum_h w_h (S_h,ij + S_h,ji) + bias)     for |dy| <= r and |dx| <= r
    L      = 1/2 sum_{y=1} (1 - A) / (N+ + 1) + 1/2 sum_{y=0} A / (N- + 1)

y_ij says whether the labels of pixels i and j agree; pairs with an ignored label or outside the window have
none. Ordered pairs, the diagonal included, counts over the whole batch (AFA, Eq. 5 and 6). Computes in
float32, or float64 where given.
"""

from __future__ import annotations

import torch

from ..diffusion.reference import shifted


def window_offsets(radius: int) -> list[tuple[int, int]]:
    """(dy, dx) of every tap of the window, row-major."""
    steps = range(-radius, radius + 1)
    return [(dy, dx) for dy in steps for dx in steps]


def window_neighbours(
    height: int, width: int, radius: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixel that each tap of each pixel reaches, [taps, N] int64, and whether it exists, [taps, N] bool.

    Taps run row-major over (dy, dx) from (-radius, -radius); a pixel that does not exist has index 0.
    """
    numbered = torch.arange(1, height * width + 1, device=device).view(1, 1, height, width)
    reached = shifted(numbered, window_offsets(radius), "zero").flatten(3)[0, 0]  # 0 is outside
    return (reached - 1).clamp(min=0), reached > 0


def window_mask(height: int, width: int, radius: int, device: torch.device | None = None) -> torch.Tensor:
    """[N, N] bool: which pairs of pixels are within each other's window."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def dense_to_window(dense: torch.Tensor, height: int, width: int, radius: int) -> torch.Tensor:
    """[B, N, N] -> [B, taps, h, w]; 0 where the neighbour is outside the image."""
    index, inside = window_neighbours(height, width, radius, dense.device)
    own = torch.arange(height * width, device=dense.device)
    return torch.where(inside, dense[:, own, index], 0).unflatten(2, (height, width))


def dense_affinity(maps: torch.Tensor, head_weight: torch.Tensor, head_bias: torch.Tensor) -> torch.Tensor:
    """A for every pair, [B, N, N], from the score maps [B, heads, N, N]."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    symmetric = maps.to(dtype)
    symmetric = symmetric + symmetric.transpose(2, 3)
    weight = head_weight.to(dtype).reshape(1, -1, 1, 1)
    return torch.sigmoid(torch.conv2d(symmetric, weight, head_bias.to(dtype).reshape(1))[:, 0])


def affinity_from_maps(
    maps: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    height: int,
    width: int,
    radius: int,
) -> torch.Tensor:
    """maps [B, heads, N, N] -> [B, taps, h, w] in the dtype of maps."""
    dense = dense_affinity(maps, head_weight, head_bias)
    return dense_to_window(dense, height, width, radius).to(maps.dtype)


def score_maps(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, N] in the computing type."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype) @ key.to(dtype).transpose(2, 3)


def window_affinity(
    query: torch.Tensor,
    key: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    height: int,
    width: int,
    radius: int,
) -> torch.Tensor:
    """query, key [B, heads, N, d] -> [B, taps, h, w] in the dtype of query."""
    maps = score_maps(query, key)
    return affinity_from_maps(maps, head_weight, head_bias, height, width, radius).to(query.dtype)


def _loss(
    affinity: torch.Tensor, own: torch.Tensor, other: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counted = inside & (own >= 0) & (other >= 0)
    same = counted & (own == other)
    different = counted & (own != other)
    pos_count, neg_count = same.sum() + 1, different.sum() + 1
    pos_loss = torch.where(same, 1 - affinity, 0).sum() / pos_count
    neg_loss = torch.where(different, affinity, 0).sum() / neg_count
    return 0.5 * pos_loss + 0.5 * neg_loss, pos_count, neg_count


def affinity_loss(
    affinity: torch.Tensor, labels: torch.Tensor, radius: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """affinity [B, taps, h, w], labels [B, h, w] with -1 for ignored -> loss, N+ + 1, N- + 1."""
    batch, _, height, width = affinity.shape
    index, inside = window_neighbours(height, width, radius, affinity.device)
    own = labels.reshape(batch, 1, -1)
    other = own[:, 0, index]  # [B, taps, N]
    dtype = torch.promote_types(affinity.dtype, torch.float32)
    return _loss(affinity.to(dtype).flatten(2), own, other, inside)


def attention_affinity_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    labels: torch.Tensor,
    radius: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key [B, heads, N, d], labels [B, h, w] with -1 for ignored -> loss, N+ + 1, N- + 1."""
    affinity = dense_affinity(score_maps(query, key), head_weight, head_bias)
    inside = window_mask(labels.shape[1], labels.shape[2], radius, labels.device)
    own = labels.flatten(1)
    return _loss(affinity, own[:, :, None], own[:, None, :], inside)
