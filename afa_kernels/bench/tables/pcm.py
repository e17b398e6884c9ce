"""The pixel correlation module of 21 channels by 192 features, all pairs of pixels, against the product with a dense
matrix.

"dense" is how it is commonly written: cosines of N x N by a matrix product, cut off at 0, divided by the sums of their
columns, times the CAMs; autograd keeps several such matrices for the gradients. The floor takes each cosine once,
forward and backward, a matrix of them being symmetric; the kernels form them again for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import afa_kernels

from ..harness import Case, compiled, kernels

CHANNELS, FEATURES, EPS = 21, 192, 1e-5
# Of the grid: an image of 224 pixels at 1/8, a crop of 384, SEAM's of 448.
SIDES = [28, 48, 56]


def dense_pcm(cams: Tensor, features: Tensor) -> Tensor:
    features = features / (torch.norm(features, dim=1, keepdim=True) + EPS)
    features = features.flatten(2)
    affinity = torch.relu(torch.matmul(features.transpose(1, 2), features))
    affinity = affinity / (torch.sum(affinity, dim=1, keepdim=True) + EPS)
    return torch.matmul(cams.flatten(2), affinity).view(cams.shape)


def with_gradients(call: Callable[[Tensor, Tensor], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def side_cases(side: int, device: str, compiling: bool) -> list[Case]:
    """Forward, and with gradients of both inputs."""
    generator = torch.Generator().manual_seed(0)
    cams = torch.rand(1, CHANNELS, side, side, generator=generator).to(device)
    features = torch.randn(1, FEATURES, side, side, generator=generator).to(device)
    grad = torch.randn(cams.shape, generator=generator).to(device)
    ways = {"dense": dense_pcm, "reference": partial(afa_kernels.pcm, backend="reference")}
    if compiling:
        ways["torch.compile"] = compiled(ways["reference"])
    ways |= {name: partial(afa_kernels.pcm, backend=name) for name in kernels("pcm", device)}
    count, summed = side * side, CHANNELS + 1
    inputs = 4.0 * count * (CHANNELS + FEATURES)
    return [
        Case(
            f"N={count}, {CHANNELS} channels, {FEATURES} features",
            {name: partial(way, cams, features) for name, way in ways.items()},
            bytes=inputs + 4.0 * count * CHANNELS,
            operations=float(count**2) * (FEATURES + 2 * summed),
        ),
        Case(
            f"N={count}, {CHANNELS} channels, {FEATURES} features, with gradients",
            {name: partial(with_gradients, way, [cams, features], grad) for name, way in ways.items()},
            bytes=2 * inputs + 8.0 * count * CHANNELS,
            # Two sums more, a product of values and gradients for each pair, and a multiple of its features both ways.
            operations=float(count**2) * (3 * FEATURES + 6 * summed),
        ),
    ]


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    return [case for side in (SIDES[:1] if quick else SIDES) for case in side_cases(side, device, compiling)]
