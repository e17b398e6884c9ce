"""Random walk of 21 channels over the window, normalised and propagated, against the product with a dense matrix.

"dense" is the published way (`published`): an affinity of N x N, given, as is the mask that cuts the window
out of it, is raised to its power, normalised and multiplied with the CAMs. Two steps are two products, which costs less
than the power of the matrix. The others are given the window, [B, 289, h, w].

On a GPU the native kernels have two ways: "resident" is one launch, with the weights on chip; "streaming" writes them
to memory and reads them in each step. "native" chooses by itself, the other two are made to take one, and "window made
dense" is the dense product of the same window, whose making is part of it: what pays on small grids, the rows say.

Peaks are over the inputs (``harness.peak_memory``), so they leave out that the dense ones are N / 289 times as large.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import afa_kernels

from ...ops.affinity.reference import window_mask
from ..harness import Case, compiled, kernels
from ..published import transition
from .affinity import RADIUS, pairs
from .par import PLANS, with_plan

CHANNELS, POWER, EPS = 21, 2, 0.1
# Sides of the grid, which has 1/16 of the image's: 320 pixels, 480, 768 (a crop of 512 at scale 1.5), 1024.
SIDES = [20, 30, 48, 64]
STEPS = [1, 2]
DENSE_UP_TO = 900  # pixels


def dense_walk(affinity: Tensor, window: Tensor, cams: Tensor, num_steps: int) -> Tensor:
    """affinity [N, N], window [N, N] bool, cams [1, C, h, w] -> [1, C, h, w]."""
    matrix, state = transition(affinity, window, POWER, EPS), cams[0].flatten(1).t()
    for _ in range(num_steps):
        state = matrix @ state
    return state.t().unflatten(1, cams.shape[2:])[None]


def walk_made_dense(affinity: Tensor, cams: Tensor, num_steps: int) -> Tensor:
    """affinity [1, taps, h, w], cams [1, C, h, w] -> [1, C, h, w], by a matrix [N, N] made of the window."""
    powered = afa_kernels.window_to_dense(affinity**POWER, RADIUS)[0]
    matrix, state = powered / (powered.sum(0)[:, None] + EPS), cams[0].flatten(1).t()
    for _ in range(num_steps):
        state = matrix @ state
    return state.t().unflatten(1, cams.shape[2:])[None]


def side_cases(side: int, device: str, compiling: bool) -> list[Case]:
    """Of each number of steps; they share their inputs."""
    generator = torch.Generator().manual_seed(0)
    count = side * side
    scores = torch.randn(count, count, generator=generator)
    window = window_mask(side, side, RADIUS)
    dense = torch.sigmoid(scores + scores.t()) * window
    affinity = afa_kernels.dense_to_window(dense[None], side, side, RADIUS).to(device)
    dense, window = dense.to(device), window.to(device)
    cams = torch.rand(1, CHANNELS, side, side, generator=generator).to(device)
    table = []
    for steps in STEPS:
        call = partial(afa_kernels.random_walk, affinity, cams, RADIUS, POWER, steps, EPS)
        providers = {
            "dense": partial(dense_walk, dense, window, cams, steps),
            "reference": partial(call, backend="reference"),
        }
        if compiling:
            providers["torch.compile"] = compiled(providers["reference"])
        ours = kernels("random_walk", device)
        providers |= {name: partial(call, backend=name) for name in ours}
        if device == "cuda" and "native" in ours:
            providers |= {f"native {plan}": partial(with_plan, plan, providers["native"]) for plan in PLANS}
        if device == "cuda" and count <= DENSE_UP_TO:
            providers["window made dense"] = partial(walk_made_dense, affinity, cams, steps)
        table.append(
            Case(
                f"N={count}, {CHANNELS} channels, {steps} step{'s' * (steps > 1)}",
                providers,
                # The window and the CAMs in, the CAMs out.
                bytes=4.0 * (affinity.numel() + 2 * cams.numel()),
                # Power, sum and quotient of each weight; then two a channel and step.
                operations=pairs(side) * (3.0 + 2.0 * CHANNELS * steps),
            )
        )
    return table


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    return [case for side in (SIDES[:2] if quick else SIDES) for case in side_cases(side, device, compiling)]
