"""Sinkhorn normalisation of the window as CLIP-ES takes it, three iterations and symmetric, against that of a matrix.

"dense" is the published way, on an affinity of N x N, given: every division writes the matrix. What the others return
is cut out of its result at the end, and out of its gradient: one gather. They are given the window, [B, 289, h, w].

Peaks are over the inputs (``harness.peak_memory``), so they leave out that the dense ones are N / 289 times as large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import afa_kernels

from ...ops.affinity.reference import window_mask
from ..harness import Case, compiled, kernels
from .affinity import RADIUS, pairs

NUM_ITER = 3
# Sides of the grid, which has 1/16 of the image's: 320 pixels, 448, 768, 1024.
SIDES = [20, 28, 48, 64]


def dense_sinkhorn(matrix: Tensor) -> Tensor:
    """[1, N, N] -> the same."""
    for _ in range(NUM_ITER):
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
        matrix = matrix / matrix.sum(dim=2, keepdim=True)
    return (matrix + matrix.transpose(1, 2)) / 2


def with_gradient(call: Callable[[Tensor], Tensor], affinity: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """-> result, and the gradient of what it is made of."""
    leaf = affinity.detach().requires_grad_()
    out = call(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def dense_way(call: Callable[[], Tensor | tuple[Tensor, ...]], side: int) -> tuple[Tensor, ...]:
    """What a call gives, as windows."""
    given = call()
    given = given if isinstance(given, tuple) else (given,)
    return tuple(afa_kernels.dense_to_window(dense, side, side, RADIUS) for dense in given)


def side_cases(side: int, device: str, compiling: bool) -> list[Case]:
    """Forward, and forward with backward; they share their inputs."""
    generator = torch.Generator().manual_seed(0)
    count, within = side * side, window_mask(side, side, RADIUS)
    scores, grad = (torch.randn(count, count, generator=generator) for _ in range(2))
    dense = (torch.sigmoid(scores + scores.t()) * within)[None].to(device)
    dense_grad = (grad * within)[None].to(device)
    affinity, grad = (afa_kernels.dense_to_window(matrix, side, side, RADIUS) for matrix in (dense, dense_grad))
    ours = partial(afa_kernels.sinkhorn, radius=RADIUS, num_iter=NUM_ITER, symmetric=True)
    ways = {"reference": partial(ours, backend="reference")}
    if compiling:
        ways["torch.compile"] = compiled(ways["reference"])
    ways |= {name: partial(ours, backend=name) for name in kernels("sinkhorn", device)}
    forward = {"dense": partial(dense_way, partial(dense_sinkhorn, dense), side)}
    forward |= {name: partial(way, affinity) for name, way in ways.items()}
    both = {"dense": partial(dense_way, partial(with_gradient, dense_sinkhorn, dense, dense_grad), side)}
    both |= {name: partial(with_gradient, way, affinity, grad) for name, way in ways.items()}
    title, window = f"N={count}, {NUM_ITER} iterations, symmetric", 4.0 * affinity.numel()
    # A product and a sum of each weight and half step, two factors; backwards also its share of each half step.
    steps = 2 * NUM_ITER
    return [
        Case(title, forward, bytes=2 * window, operations=pairs(side) * (2.0 * steps + 2)),
        # The window and the gradient in, the result and its gradient out.
        Case(
            f"{title}, with gradient",
            both,
            bytes=4 * window,
            operations=pairs(side) * (6.0 * steps + 8),
            tolerance=1e-4,
        ),
    ]


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    return [case for side in (SIDES[:2] if quick else SIDES) for case in side_cases(side, device, compiling)]
