"""Affinity along straight paths over an edge map, forward and with its gradient; and CAMs spread along it.

"dense" is the published way (IRN). Of the window: for each number of points that a path has, the edge map's values at
all points of all pairs are selected, their maximum pooled, and what comes out put where the window has it (twice, for a
pair is seen from both ends), as a matrix of all pairs would be filled. Of the propagation: such a matrix, to its power,
normalised and squared eight times.

The window has (2 * radius + 1)^2 channels; its gradient is given. Peaks are over the inputs (``harness.peak_memory``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import afa_kernels

from ...ops.path_affinity.reference import directions, path
from ..harness import Case, compiled, kernels

# Height, width, radius: the grid of a photograph of 375 x 500 at 1/8, with IRN's radius; a larger map.
MAPS = [(47, 62, 5), (128, 128, 5), (128, 128, 10)]
GRIDS = [(32, 40), (47, 62)]
CHANNELS, RADIUS, BETA, EXP_TIMES = 21, 5, 10, 8
Groups = list[tuple[Tensor, Tensor, Tensor]]


def groups_of(height: int, width: int, radius: int, device: str) -> Groups:
    """For each number of points: those of all paths [pairs, points], as indices into the map, and where the window,
    flat, holds both taps of each pair.
    """
    numbers, side, found = torch.arange(height * width).view(height, width), 2 * radius + 1, {}
    for dy, dx in directions(radius, height - 1, width - 1):
        left, right, points = max(0, -dx), width - max(0, dx), path(dy, dx)
        index = [numbers[py : height - dy + py, left + px : right + px].flatten() for py, px in points]
        tap, opposite = ((radius + s * dy) * side + radius + s * dx for s in (1, -1))
        start = numbers[: height - dy, left:right].flatten()
        taps = tap * height * width + start, opposite * height * width + start + dy * width + dx
        found.setdefault(len(points), []).append((torch.stack(index, 1), *taps))
    return [tuple(torch.cat(part).to(device) for part in zip(*group)) for group in found.values()]


def dense_window(edge: Tensor, groups: Groups, radius: int) -> Tensor:
    """edge [1, 1, H, W] -> [1, taps, H, W]."""
    height, width = edge.shape[2:]
    taps = (2 * radius + 1) ** 2
    numbers = torch.arange(height * width, device=edge.device)
    values, places = [torch.ones(height * width, device=edge.device)], [numbers + taps // 2 * height * width]
    for index, own, opposite in groups:
        selected = torch.index_select(edge.flatten(), 0, index.flatten()).view(1, 1, *index.shape)
        affinity = 1 - F.max_pool2d(selected, (1, index.shape[1])).flatten()
        values += [affinity, affinity]
        places += [own, opposite]
    window = torch.zeros(taps * height * width, device=edge.device)
    return window.index_put((torch.cat(places),), torch.cat(values)).view(1, taps, height, width)


def with_gradient(call: Callable[[Tensor], Tensor], edge: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = edge.detach().requires_grad_()
    window = call(leaf)
    return window.detach(), torch.autograd.grad(window, leaf, grad)[0]


def dense_propagation(cams: Tensor, edge: Tensor, groups: Groups) -> Tensor:
    """cams [1, C, H, W] -> the same, by a matrix of N x N."""
    height, width = edge.shape[2:]
    matrix = afa_kernels.window_to_dense(dense_window(edge, groups, RADIUS), RADIUS)[0] ** BETA
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(EXP_TIMES):
        matrix = matrix @ matrix
    return ((cams * (1 - edge))[0].flatten(1) @ matrix).view(1, -1, height, width)


def providers(dense: Callable, call: Callable, device: str, compiling: bool, around: Callable) -> dict[str, Callable]:
    """``around`` makes of each way what is timed."""
    ways = {"dense": dense, "reference": partial(call, backend="reference")}
    if compiling:
        ways["torch.compile"] = compiled(ways["reference"])
    ways |= {name: partial(call, backend=name) for name in kernels("path_affinity", device)}
    return {name: around(way) for name, way in ways.items()}


def window_cases(height: int, width: int, radius: int, device: str, compiling: bool) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    edge = torch.rand(1, 1, height, width, generator=generator).to(device)
    grad = torch.rand(1, (2 * radius + 1) ** 2, height, width, generator=generator).to(device)
    groups = groups_of(height, width, radius, device)
    points = sum(index.numel() for index, *_ in groups)
    dense = partial(dense_window, groups=groups, radius=radius)
    call = partial(afa_kernels.path_affinity, radius=radius)
    table = []
    for name, around, passes in (
        ("window", lambda way: partial(way, edge), 1),
        ("window and gradient", lambda way: partial(with_gradient, way, edge, grad), 2),
    ):
        table.append(
            Case(
                f"{name}, {height}x{width}, radius {radius}",
                providers(dense, call, device, compiling, around),
                # The window out, its gradient in; the map once each way.
                bytes=4.0 * passes * (grad.numel() + edge.numel()),
                # A maximum for each point of a path; backward that once more, and who has it.
                operations=points * (1.0 if passes == 1 else 3.0),
            )
        )
    return table


def propagation_case(height: int, width: int, device: str, compiling: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    edge = torch.rand(1, 1, height, width, generator=generator).to(device)
    cams = torch.rand(1, CHANNELS, height, width, generator=generator).to(device)
    groups = groups_of(height, width, RADIUS, device)
    pairs = height * width + sum(2 * own.numel() for _, own, _ in groups)
    dense = partial(dense_propagation, groups=groups)
    call = partial(afa_kernels.propagate_to_edge, radius=RADIUS, beta=BETA, exp_times=EXP_TIMES)
    return Case(
        f"propagation, {height}x{width}, {CHANNELS} channels, {EXP_TIMES} squarings",
        providers(dense, call, device, compiling, lambda way: partial(way, cams, edge)),
        bytes=4.0 * (edge.numel() + 2 * cams.numel()),
        operations=pairs * 2.0 * CHANNELS * 2**EXP_TIMES,
        tolerance=1e-4,  # 256 steps, or the rounding of eight squarings
    )


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    table = [case for size in (MAPS[:1] if quick else MAPS) for case in window_cases(*size, device, compiling)]
    return table + [propagation_case(*size, device, compiling) for size in (GRIDS[:1] if quick else GRIDS)]
