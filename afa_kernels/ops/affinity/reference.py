"""Affinity from attention in plain PyTorch, dense maps and all: the published form, and everyone's oracle.

    S_h,ij = q_h,i . k_h,j                                   raw attention scores of every head, unscaled
    A_ij   = sigmoid(sum_h w_h (S_h,ij + S_h,ji) + bias)     for |dy| <= r and |dx| <= r
    L      = 1/2 sum_{y=1} (1 - A) / (N+ + 1) + 1/2 sum_{y=0} A / (N- + 1)

y_ij says whether the labels of pixels i and j agree; pairs with an ignored label or outside the window have
none. Ordered pairs, the diagonal included, counts over the whole batch (AFA, Eq. 5 and 6). Computes in
float32, or float64 where given.

1 - A is the sigmoid of -z, which does not cancel where A is near 1. A query or key that is no finite number makes the
pairs that it counts in what they are then, and no others, also in the gradients: those are masked by selection.
"""

from __future__ import annotations

from collections.abc import Callable

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


def sigmoid(z: torch.Tensor) -> torch.Tensor:
    """torch.sigmoid has a derivative of 0 where A is rounded to 1; this one's is as exact as its value."""
    decay = torch.exp(torch.where(z >= 0, -z, z))
    return torch.where(z >= 0, 1, decay) / (1 + decay)


def head_scores(maps: torch.Tensor, head_weight: torch.Tensor, head_bias: torch.Tensor) -> torch.Tensor:
    """z for every pair, [B, N, N], from the score maps [B, heads, N, N]."""
    dtype = torch.promote_types(maps.dtype, torch.float32)
    symmetric = maps.to(dtype)
    symmetric = symmetric + symmetric.transpose(2, 3)
    weight = head_weight.to(dtype).reshape(1, -1, 1, 1)
    return torch.conv2d(symmetric, weight, head_bias.to(dtype).reshape(1))[:, 0]


def dense_affinity(maps: torch.Tensor, head_weight: torch.Tensor, head_bias: torch.Tensor) -> torch.Tensor:
    """A for every pair, [B, N, N], from the score maps [B, heads, N, N], as published."""
    return torch.sigmoid(head_scores(maps, head_weight, head_bias))


def contained(scores: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """``scores(*tensors)``, a sum of products, such that a gradient of 0 is not multiplied by what is not finite."""
    with torch.no_grad():
        exact = scores(*(tensor.detach() for tensor in tensors))
    finite = scores(*(torch.where(tensor.isfinite(), tensor, 0) for tensor in tensors))
    return finite + torch.where(exact.isfinite(), 0, exact)


def affinity_from_maps(
    maps: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    height: int,
    width: int,
    radius: int,
) -> torch.Tensor:
    """maps [B, heads, N, N] -> [B, taps, h, w] in the dtype of maps."""
    dense = contained(lambda maps: head_scores(maps, head_weight, head_bias), maps)
    return _window_of(dense, height, width, radius).to(maps.dtype)


def _window_of(scores: torch.Tensor, height: int, width: int, radius: int) -> torch.Tensor:
    inside = window_neighbours(height, width, radius, scores.device)[1].unflatten(1, (height, width))
    return torch.where(inside, sigmoid(dense_to_window(scores, height, width, radius)), 0)


def score_maps(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, N] in the computing type."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype) @ key.to(dtype).transpose(2, 3)


def attention_scores(
    query: torch.Tensor, key: torch.Tensor, head_weight: torch.Tensor, head_bias: torch.Tensor
) -> torch.Tensor:
    """z for every pair, [B, N, N]."""
    return contained(lambda query, key: head_scores(score_maps(query, key), head_weight, head_bias), query, key)


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
    scores = attention_scores(query, key, head_weight, head_bias)
    return _window_of(scores, height, width, radius).to(query.dtype)


Pairs = tuple[torch.Tensor, torch.Tensor]


def _pairs(own: torch.Tensor, other: torch.Tensor, inside: torch.Tensor) -> Pairs:
    """Which pairs have the same label, and which have different ones."""
    counted = inside & (own >= 0) & (other >= 0)
    return counted & (own == other), counted & (own != other)


def _loss(
    pairs: Pairs, affinity: torch.Tensor, complement: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    same, different = pairs
    pos_count, neg_count = same.sum() + 1, different.sum() + 1
    pos_loss = torch.where(same, complement, 0).sum() / pos_count
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
    affinity = affinity.to(torch.promote_types(affinity.dtype, torch.float32)).flatten(2)
    return _loss(_pairs(own, other, inside), affinity, 1 - affinity)


def attention_affinity_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    labels: torch.Tensor,
    radius: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key [B, heads, N, d], labels [B, h, w] with -1 for ignored -> loss, N+ + 1, N- + 1."""
    inside = window_mask(labels.shape[1], labels.shape[2], radius, labels.device)
    own = labels.flatten(1)
    same, different = _pairs(own[:, :, None], own[:, None, :], inside)
    scores = attention_scores(query, key, head_weight, head_bias)
    scores = torch.where(same | different, scores, 0)
    return _loss((same, different), sigmoid(scores), sigmoid(-scores))
