"""Affinity of features in a window of radius 8: each kind, forward, and forward with its backward.

"dense" is how it is done in public: a matrix of N x N over all pairs of pixels, a product of features or, for the L1
distance, ``torch.cdist``; and one gather, which takes the window out of it. "reference" goes from tap to tap.

Peaks are over the inputs (``harness.peak_memory``); the gradient of the features, as large as these, is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_kernels

from ..harness import Case, compiled, kernels
from .affinity import RADIUS, pairs

# Channels and the side of the grid: AffinityNet's features of a crop of 448, ViT-S patches of one of 640.
SHAPES = [(256, 28), (384, 40)]
KINDS = ["cos", "exp_l1", "relu_dot"]


def dense_affinity(features: Tensor, kind: str) -> Tensor:
    """features [1, C, h, w] -> [1, taps, h, w]."""
    values = F.normalize(features, dim=1, eps=1e-8) if kind == "cos" else features
    values = values.flatten(2).transpose(1, 2)
    if kind == "exp_l1":
        dense = torch.exp(-torch.cdist(values, values, p=1) / values.shape[2])
    else:
        product = values @ values.transpose(1, 2)
        dense = product.abs() if kind == "cos" else product.relu()
    return afa_kernels.dense_to_window(dense, *features.shape[2:], RADIUS)


def with_gradient(call: Callable[[Tensor], Tensor], features: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    window = call(leaf)
    return window.detach(), torch.autograd.grad(window, leaf, grad)[0]


def shape_cases(channels: int, side: int, kind: str, device: str, compiling: bool) -> list[Case]:
    """Forward, and with its backward."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, channels, side, side, generator=generator).to(device)
    grad = torch.randn(1, (2 * RADIUS + 1) ** 2, side, side, generator=generator).to(device)
    call = partial(afa_kernels.feature_affinity, radius=RADIUS, kind=kind)
    ways = {"dense": partial(dense_affinity, kind=kind), "reference": partial(call, backend="reference")}
    if compiling:
        ways["torch.compile"] = compiled(ways["dense"])
    ways |= {name: partial(call, backend=name) for name in kernels("feature_affinity", device)}
    # A pair is summed once, in either order; its share of the gradient goes to both pixels.
    forward, backward = channels * (pairs(side) + side * side), 2.0 * channels * pairs(side)
    name = f"{kind}, C={channels}, N={side * side}"
    return [
        Case(
            f"{name}, forward",
            {way: partial(run, features) for way, run in ways.items()},
            bytes=4.0 * (features.numel() + grad.numel()),
            operations=forward,
        ),
        Case(
            f"{name}, with backward",
            {way: partial(with_gradient, run, features, grad) for way, run in ways.items()},
            bytes=4.0 * 2 * (features.numel() + grad.numel()),
            operations=forward + backward,
        ),
    ]


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    shapes = SHAPES[:1] if quick else SHAPES
    return [case for shape in shapes for kind in KINDS for case in shape_cases(*shape, kind, device, compiling)]
