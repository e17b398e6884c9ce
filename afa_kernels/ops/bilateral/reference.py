"""The bilateral filter in plain PyTorch: the formulas of `afa_kernels.bilateral_filter`.

exact:    out_i = sum over all pixels j of exp(-|p_i - p_j|^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_rgb^2)) v_j
lattice:  the permutohedral lattice (Adams, Baek and Davis 2010) of (x, y) / sigma_xy and (r, g, b) / sigma_rgb

Which simplex of the lattice a pixel lies in is decided in float32, whatever the dtype of the values: a corner that only
exists by a weight of rounding size changes the blur, so two implementations agree only where they round alike.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

ROWS = 1 << 20  # pairs at once
LARGEST_SCALE = 1e30  # of squares: 0 times infinity would be NaN for a pixel with itself


def bilateral_filter(
    images: Tensor, values: Tensor, sigma_rgb: float | None, sigma_xy: float, method: str, transpose: bool = False
) -> Tensor:
    """images [B, 3, H, W], values [B, K, H, W] -> [B, K, H, W] in the dtype of values."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    wide = values.to(dtype)
    if method == "lattice":
        features = [lattice_features(image, sigma_rgb, sigma_xy) for image in images]
        rows = [
            filter_lattice(feature, value.flatten(1).t(), transpose).t().reshape(value.shape)
            for feature, value in zip(features, wide)
        ]
        return torch.stack(rows).to(values.dtype)
    if sigma_rgb is None:
        return gaussian(wide, sigma_xy).to(values.dtype)
    return torch.stack([_exact(*pair, sigma_rgb, sigma_xy) for pair in zip(images.to(dtype), wide)]).to(values.dtype)


def dense_crf(
    images: Tensor,
    unary: Tensor,
    num_iter: int,
    kernels: list[tuple[float, float, float | None]],
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float = 0.0,
    convergence: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean field over kernels (weight, sigma_xy, sigma_rgb): Q = softmax(-unary), then Q <- softmax(-unary -
    sum_k weight_k compat N_k filter_k(N'_k Q)), with compat = -1 for Potts.

    [B, C, H, W] -> the same, and the divergence of each Q, [B, num_iter + 1] if asked for, else [B, 0].
    """
    inverse = {"none": (0, 0), "before": (1, 0), "after": (0, 1), "symmetric": (0.5, 0.5)}[normalization]
    matrix = None if compat is None else -(compat + compat.t()).to(unary) / 2
    results, divergences = [], []
    for image, energy in zip(images.split(1), unary.split(1)):
        norms = []
        for _, sigma_xy, sigma_rgb in kernels:
            ones = torch.ones_like(energy[:, :1])
            norms.append(bilateral_filter(image, ones, sigma_rgb, sigma_xy, method) + 1e-20)

        def logits_of(q: Tensor) -> Tensor:
            logits = -energy  # noqa: B023
            for (weight, sigma_xy, sigma_rgb), norm in zip(kernels, norms):  # noqa: B023
                near = bilateral_filter(image, q / norm ** inverse[0], sigma_rgb, sigma_xy, method)  # noqa: B023
                near = near / norm ** inverse[1]
                logits = logits + weight * (near if matrix is None else torch.einsum("dc,bchw->bdhw", matrix, near))
            return logits

        def divergence(q: Tensor) -> Tensor:
            return (q * (q.clamp_min(1e-20).log() - logits_of(q))).double().sum()

        q, found = torch.softmax(-energy, 1), []
        for _ in range(num_iter):
            if convergence:
                found.append(divergence(q))
            before, q = q, torch.softmax(logits_of(q), 1)
            if (q - before).abs().mean() < tolerance:
                break
        if convergence:
            found.append(divergence(q))
            found += found[-1:] * (num_iter + 1 - len(found))
        results.append(q)
        divergences.append(torch.stack(found) if found else unary.new_zeros(0, dtype=torch.float64))
    return torch.cat(results), torch.stack(divergences)


# --- exact ---


def _scale(sigma: float) -> float:
    return min(0.5 / sigma / sigma, LARGEST_SCALE)


def _exact(image: Tensor, values: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    _, height, width = image.shape
    y = torch.arange(height, dtype=image.dtype, device=image.device)[:, None].expand(height, width)
    x = torch.arange(width, dtype=image.dtype, device=image.device).expand(height, width)
    features = [(x, sigma_xy), (y, sigma_xy), *((colour, sigma_rgb) for colour in image)]
    flat, count = values.flatten(1).t(), height * width
    out = []
    for rows in torch.arange(count, device=image.device).split(max(ROWS // count, 1)):
        distance = torch.zeros(len(rows), count, dtype=image.dtype, device=image.device)
        for feature, sigma in features:
            feature = feature.flatten()
            distance = distance + (feature[rows, None] - feature).square() * _scale(sigma)
        out.append(torch.exp(-distance) @ flat)
    return torch.cat(out).t().reshape(values.shape)


def gaussian(values: Tensor, sigma: float) -> Tensor:
    """The sum without colours, [..., H, W]."""

    def weights(size: int) -> Tensor:
        at = torch.arange(size, dtype=values.dtype, device=values.device)
        return torch.exp(-(at[:, None] - at).square() * _scale(sigma))

    return weights(values.shape[-2]) @ values @ weights(values.shape[-1])


# --- lattice ---


def lattice_features(image: Tensor, sigma_rgb: float | None, sigma_xy: float) -> Tensor:
    """[3, H, W] -> [N, 5], or [N, 2] without colours; float32."""
    _, height, width = image.shape
    y = torch.arange(height, dtype=torch.float32, device=image.device)[:, None].expand(height, width)
    x = torch.arange(width, dtype=torch.float32, device=image.device).expand(height, width)
    planes = [x / torch.full_like(x, sigma_xy), y / torch.full_like(y, sigma_xy)]
    if sigma_rgb is not None:
        planes += [colour / torch.full_like(colour, sigma_rgb) for colour in image.float()]
    return torch.stack([plane.flatten() for plane in planes], dim=1)


def simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of each point's simplex, [N, d+1, d] int64, and its barycentric weights, [N, d+1] float32."""
    count, dims = features.shape
    in_float = partial(torch.tensor, dtype=torch.float32, device="cpu")
    spread = in_float(math.sqrt(2 / 3) * (dims + 1)).item()
    scales = in_float([1 / math.sqrt((i + 1) * (i + 2)) * spread for i in range(dims)])
    scaled = features * scales.to(features.device)
    lifted, total = [None] * (dims + 1), torch.zeros(count, device=features.device)
    for j in range(dims, 0, -1):
        lifted[j] = total - j * scaled[:, j - 1]
        total = total + scaled[:, j - 1]
    lifted[0] = total
    lifted = torch.stack(lifted, dim=1)  # on the plane of coordinates that sum to 0
    inverse = in_float(1 / (dims + 1)).item()
    steps = (lifted * inverse).round()
    nearest = steps * (dims + 1)
    rest = lifted - nearest
    # The order of the remainders, the largest first; of equal ones that of the higher coordinate.
    less = rest[:, :, None] < rest[:, None, :]
    pairs = torch.ones(dims + 1, dims + 1, dtype=torch.bool, device=features.device).triu(1)
    rank = (less & pairs).sum(2) + (~less & pairs).sum(1)
    rank = rank + steps.sum(1, keepdim=True).long()
    wrap = (rank < 0).long() - (rank > dims).long()
    rank, nearest = rank + wrap * (dims + 1), nearest + wrap.float() * (dims + 1)
    part = (lifted - nearest) * inverse
    weights = torch.zeros(count, dims + 2, device=features.device)
    weights = weights.scatter_add(1, dims - rank, part).scatter_add(1, dims + 1 - rank, -part)
    weights = torch.cat([weights[:, :1] + (1 + weights[:, -1:]), weights[:, 1:-1]], dim=1)
    corner = torch.arange(dims + 1, device=features.device)[None, :, None]
    keys = nearest.long()[:, None, :] + corner - (rank[:, None, :] > dims - corner) * (dims + 1)
    return keys[..., :dims], weights


def filter_lattice(features: Tensor, values: Tensor, transpose: bool = False) -> Tensor:
    """features [N, d], values [N, K] -> [N, K]; ``transpose`` blurs along the axes in reverse order: the adjoint."""
    dims = features.shape[1]
    keys, weights = simplices(features)
    vertices, index = torch.unique(keys.flatten(0, 1), dim=0, return_inverse=True)
    count = len(vertices)
    weights = weights.to(values.dtype)
    table = values.new_zeros(count + 1, values.shape[1])  # the last row stays 0: neighbours that are not there
    table = table.index_add(0, index, (weights[:, :, None] * values[:, None]).flatten(0, 1))
    axes = range(dims + 1)
    for axis in reversed(axes) if transpose else axes:
        step = torch.ones(dims, dtype=torch.long, device=keys.device)
        if axis < dims:
            step[axis] -= dims + 1
        near = [_find(vertices, vertices + sign * step) for sign in (1, -1)]
        blurred = table[:count] + 0.5 * (table[near[0]] + table[near[1]])
        table = torch.cat([blurred, table[count:]])
    sliced = (weights[:, :, None] * table[index].view(*weights.shape, -1)).sum(1)
    return sliced / (1 + 2.0**-dims)


def _find(vertices: Tensor, keys: Tensor) -> Tensor:
    """The row of each key among sorted, different vertices; their number where it is none of them."""
    count = len(vertices)
    _, both = torch.unique(torch.cat([vertices, keys]), dim=0, return_inverse=True)
    row = torch.full((int(both.max()) + 1,), count, device=keys.device)
    row[both[:count]] = torch.arange(count, device=keys.device)
    return row[both[count:]]
