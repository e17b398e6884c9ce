"""Inputs of the affinity that its tests share."""

from __future__ import annotations

import torch

from support.common import DEVICE


def random_case(rng, batch=2, heads=3, height=6, width=9, depth=5, dtype=torch.float32, classes=4):
    """Leaves of moderate scores, and labels in which every eighth pixel is ignored."""
    shape = (batch, heads, height * width, depth)
    query = torch.randn(shape, generator=rng).to(dtype)
    key = torch.randn(shape, generator=rng).to(dtype)
    head_weight = (torch.randn(heads, generator=rng) / depth**0.5).to(dtype)
    head_bias = torch.randn(1, generator=rng).to(dtype)
    labels = torch.randint(classes, (batch, height, width), generator=rng)
    labels[torch.rand(labels.shape, generator=rng) < 0.125] = 255
    leaves = [t.to(DEVICE).requires_grad_() for t in (query, key, head_weight, head_bias)]
    return leaves, labels.to(DEVICE)
