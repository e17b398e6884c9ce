"""What the operators replace, the way it was published: dense matrices over all pairs of pixels, the window a mask."""

from __future__ import annotations

from torch import Tensor

IGNORE = 255


def transition(affinity: Tensor, window: Tensor, power: float, eps: float) -> Tensor:
    """affinity and window, [N, N] both -> the matrix of the random walk, [N, N]."""
    powered = (affinity * window) ** power
    return powered / (powered.sum(0) + eps)[:, None]


def affinity_loss(affinity: Tensor, labels: Tensor, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """affinity [B, N, N], labels [B, h, w] int64, window [N, N] bool."""
    own = labels.flatten(1)
    pairs = (own[:, :, None] == own[:, None, :]).long()
    pairs[(own == IGNORE)[:, :, None] | (own == IGNORE)[:, None, :]] = IGNORE
    pairs[:, ~window] = IGNORE
    same, different = (pairs == 1).float(), (pairs == 0).float()
    pos_count, neg_count = same.sum() + 1, different.sum() + 1
    loss = 0.5 * (same * (1 - affinity)).sum() / pos_count + 0.5 * (different * affinity).sum() / neg_count
    return loss, pos_count, neg_count
