"""Dense conditional random fields by mean field (Krähenbühl and Koltun, 2011), on the bilateral filter.

    Q <- softmax(-U + sum_k w_k N_k filter_k(N_k Q))        num_iter times from softmax(-U)

with the unary U = -log probability, a Gaussian of place and a bilateral kernel, Potts compatibility or a matrix, and
N = 1 / sqrt(filter(1)). The formulas stand in `reference`; the gradient unrolls the iterations, of which it keeps the
distributions and nothing of the filters.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ...core import backends
from ...core.checks import FLOATS, check_float, check_int, check_same_device, check_tensor
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from . import reference
from .functional import check_images, check_method, lattice_sigmas, warn_unless_grey_levels

NORMALIZATIONS = ("symmetric", "before", "after", "none")
LEAST_PROBABILITY = 1e-5
MOST_FEATURES = 32

# --- checks ---


def check_normalization(normalization: str) -> str:
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    return normalization


def check_kernels(
    pos_w: float, pos_xy_std: float, bi_w: float, bi_xy_std: float, bi_rgb_std: float
) -> list[float]:
    """Weight, sigma_xy and sigma_rgb of each kernel that weighs anything; a sigma_rgb of 0 is none."""
    pos_w, bi_w = check_float(pos_w, "pos_w"), check_float(bi_w, "bi_w")
    pos = [pos_w, check_float(pos_xy_std, "pos_xy_std", positive=True), 0.0]
    bi = [bi_w, *(check_float(value, name, positive=True) for value, name in
                  ((bi_xy_std, "bi_xy_std"), (bi_rgb_std, "bi_rgb_std")))]  # fmt: skip
    return [*(pos if pos_w else []), *(bi if bi_w else [])]


@overload
def dense_crf(
    images: Tensor,
    probs: Tensor,
    num_iter: int = ...,
    pos_w: float = ...,
    pos_xy_std: float = ...,
    bi_w: float = ...,
    bi_xy_std: float = ...,
    bi_rgb_std: float = ...,
    *,
    compat: Tensor | None = ...,
    method: str = ...,
    normalization: str = ...,
    tolerance: float = ...,
    convergence: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dense_crf(
    images: Tensor,
    probs: Tensor,
    num_iter: int = ...,
    pos_w: float = ...,
    pos_xy_std: float = ...,
    bi_w: float = ...,
    bi_xy_std: float = ...,
    bi_rgb_std: float = ...,
    *,
    compat: Tensor | None = ...,
    method: str = ...,
    normalization: str = ...,
    tolerance: float = ...,
    convergence: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def dense_crf(
    images: Tensor,
    probs: Tensor,
    num_iter: int = 10,
    pos_w: float = 3,
    pos_xy_std: float = 3,
    bi_w: float = 4,
    bi_xy_std: float = 64,
    bi_rgb_std: float = 5,
    *,
    compat: Tensor | None = None,
    method: str = "lattice",
    normalization: str = "symmetric",
    tolerance: float = 0.0,
    convergence: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Refine class probabilities by a dense CRF (Krähenbühl and Koltun 2011; defaults as published for VOC by DeepLab).

    Args:
        images: [B, 3, H, W] in 0..255; uint8, or float32, float16 or bfloat16 (float64 in the reference path). On a CPU
            floats in 0..1 and normalised ones draw a warning, unless bi_rgb_std is below 1 or bi_w 0.
        probs: [B, C, H, W] in 0..1; floats likewise. Those below 1e-5 count as 1e-5. Gradients reach them.
        num_iter: iterations of mean field, at least 0.
        pos_w, pos_xy_std: weight of the Gaussian of place, and its standard deviation in pixels.
        bi_w, bi_xy_std, bi_rgb_std: weight of the bilateral kernel, its standard deviations in pixels and grey levels.
        compat: [C, C] penalties between classes, which the two weights multiply; the mean of it and its transpose
            counts. None is Potts: 1 between different classes.
        method: ``"lattice"``, as published numbers are, or ``"exact"``; see `bilateral_filter`.
        normalization: of the kernels: ``"symmetric"``, ``"before"``, ``"after"`` the filter, or ``"none"``.
        tolerance: an image whose probabilities changed by less than this, on average, in an iteration has no other.
        convergence: return the divergence from the CRF's distribution too, up to a constant: that of each iteration's
            probabilities, the first ones' first; what an image that stopped early ended with is repeated.
        backend: ``"native"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, C, H, W] in the dtype of probs, summing to 1 over the classes; with ``convergence`` also
        [B, num_iter + 1] float64. All sums are float32 (float64 in the reference path).

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import dense_crf
        >>> images, probs = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8), torch.rand(1, 21, 40, 50).softmax(1)
        >>> refined = dense_crf(images, probs, num_iter=5)
        >>> refined.shape, round(refined.sum(1).mean().item(), 4)
        (torch.Size([1, 21, 40, 50]), 1.0)
    """
    check_images(images)
    shape = {"B": images.shape[0], "H": images.shape[2], "W": images.shape[3]}
    check_tensor(probs, "probs", ("B", "C", "H", "W"), FLOATS, **shape)
    check_same_device(images, "images", probs=probs)
    num_iter = check_int(num_iter, "num_iter", 0)
    kernels = check_kernels(pos_w, pos_xy_std, bi_w, bi_xy_std, bi_rgb_std)
    warn_unless_grey_levels(images, bi_rgb_std if bi_w else None)
    if compat is not None:
        check_tensor(compat, "compat", ("C", "C"), FLOATS, C=probs.shape[1])
        check_same_device(images, "images", compat=compat)
        compat = compat.detach().to(torch.promote_types(probs.dtype, torch.float32))
    check_method(method), check_normalization(normalization)
    tolerance = check_float(tolerance, "tolerance")
    chosen = backends.choose("dense_crf", backend, probs)
    wide = torch.promote_types(probs.dtype, torch.float32)
    if probs.is_meta:
        refined = probs.clone(memory_format=torch.contiguous_format)
        return (refined, probs.new_empty(len(probs), num_iter + 1, dtype=torch.float64)) if convergence else refined
    with torch.autocast(probs.device.type, enabled=False):
        unary = probs.to(wide).clamp(LEAST_PROBABILITY, 1)
        # In place where it can be: fresh memory costs page faults.
        unary = (unary.log() if unary.requires_grad else unary.log_()).neg_()
        options = num_iter, kernels, compat, method, normalization, tolerance
        inputs = images.detach().to(wide), unary, *options
        if chosen == "reference":
            q, divergences = reference.dense_crf(*_unpacked(*inputs), convergence)
        else:
            q, divergences = _dense_crf(*inputs, convergence, chosen)
    return (q.to(probs.dtype), divergences.detach()) if convergence else q.to(probs.dtype)


def _unpacked(images: Tensor, *inputs) -> tuple:
    """The arguments of a backend: custom operators take lists of numbers, and none of None."""
    *others, kernels, compat, method, normalization, tolerance = inputs
    triples = []
    for weight, sigma_xy, sigma_rgb in zip(kernels[::3], kernels[1::3], kernels[2::3]):
        rgb = sigma_rgb or None
        if method == "lattice":
            rgb, sigma_xy = lattice_sigmas(images.shape, rgb, sigma_xy)
        triples.append((weight, sigma_xy, rgb))
    return images, *others, triples, compat, method, normalization, tolerance


def crf_of_energies(
    images: Tensor, energies: Tensor, num_iter: int, kernels: list[tuple[float, float, float]], normalization: str
) -> Tensor:
    """`dense_crf` by the lattice, of energies, and of any kernels with Potts compatibility. Nothing is checked here.

    images [B, 3, H, W] float32 in 0..255; energies [B, C, H, W] float32, minus log probability; kernels of (weight,
    sigma_xy, sigma_rgb or 0 for one of place alone) -> [B, C, H, W] float32.
    """
    numbers = [number for kernel in kernels for number in kernel]
    options = num_iter, numbers, None, "lattice", normalization, 0.0
    chosen = backends.choose("dense_crf", None, energies)
    if chosen == "reference":
        return reference.dense_crf(*_unpacked(images, energies, *options), False)[0]
    return _dense_crf(images, energies, *options, False, chosen)[0]


class LatticeKernel:
    """A kernel of a dense CRF over points of any features, by the permutohedral lattice, which is built once.

    Args:
        features: [N, d] float32, d at most 32; those that are 1 apart are a standard deviation apart.
        shape: (H, W) with H * W = N, if the points are those of an image.
        normalization: as in `dense_crf`.
        silent: [m, d] features of points that have no values, but are in the lattice: where it has corners, it blurs.
    """

    def __init__(
        self,
        features: Tensor,
        shape: tuple[int, int] | None = None,
        normalization: str = "symmetric",
        silent: Tensor | None = None,
    ) -> None:
        check_tensor(features, "features", ("N", "d"), (torch.float32,))
        if features.shape[1] > MOST_FEATURES:
            raise ValueError(f"features must have at most {MOST_FEATURES} columns, got {features.shape[1]}")
        self._normalization = check_normalization(normalization)
        points, self._silent = len(features), 0 if silent is None else len(silent)
        if self._silent:
            features, shape = torch.cat([features, silent]), None
        self._shape = shape or (len(features), 1)
        native = backends.choose("lattice_filter", None, features) == "native"
        self._kernels = implementation(__package__, "native") if native else None
        self._features = self._kernels.lattice(features, self._shape) if native else features
        ones = torch.ones(1, points, device=features.device)
        self._inverse = 1 / (self._filtered(ones) + 1e-20)

    def _filtered(self, values: Tensor) -> Tensor:
        if self._silent:
            values = torch.nn.functional.pad(values, (0, self._silent))
        if self._kernels is None:
            filtered = reference.filter_lattice(self._features, values.t()).t()
        else:
            planes = values.reshape(1, -1, *self._shape)
            filtered = self._kernels.filter_lattice(self._features, planes).view(values.shape)
        return filtered[:, : values.shape[1] - self._silent]

    def __call__(self, values: Tensor) -> Tensor:
        """values [K, N] float32 -> the same, filtered and normalised."""
        if self._normalization == "symmetric":
            return self._inverse.sqrt() * self._filtered(self._inverse.sqrt() * values)
        if self._normalization == "before":
            return self._filtered(self._inverse * values)
        filtered = self._filtered(values)
        return self._inverse * filtered if self._normalization == "after" else filtered


# --- forward ---


@operator("dense_crf")
def _dense_crf(
    images: Tensor,
    unary: Tensor,
    num_iter: int,
    kernels: list[float],
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
    convergence: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = _unpacked(images, unary, num_iter, kernels, compat, method, normalization, tolerance)
    return implementation(__package__, backend).dense_crf(*inputs, convergence)


@_dense_crf.register_fake
def _(images, unary, num_iter, kernels, compat, method, normalization, tolerance, convergence, backend):
    divergences = unary.new_empty(unary.shape[0], num_iter + 1 if convergence else 0, dtype=torch.float64)
    return torch.empty(unary.shape, dtype=unary.dtype, device=unary.device), divergences


# --- backward ---


@operator("dense_crf_gradient")
def _dense_crf_gradient(
    images: Tensor,
    unary: Tensor,
    grad: Tensor,
    num_iter: int,
    kernels: list[float],
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
    backend: str,
) -> Tensor:
    inputs = _unpacked(images, unary, grad, num_iter, kernels, compat, method, normalization, tolerance)
    return implementation(__package__, backend).dense_crf_gradient(*inputs)


@_dense_crf_gradient.register_fake
def _(images, unary, grad, num_iter, kernels, compat, method, normalization, tolerance, backend):
    return torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)


def _save(ctx, inputs, output):
    images, unary, num_iter, kernels, compat, *options, _, backend = inputs
    ctx.save_for_backward(images, unary, compat)
    ctx.mark_non_differentiable(output[1])
    ctx.options = num_iter, kernels, options, backend


def _backward(ctx, grad, _):
    (images, unary, compat), (num_iter, kernels, options, backend) = ctx.saved_tensors, ctx.options
    gradient = None
    if ctx.needs_input_grad[1]:
        inputs = images, unary, grad, num_iter, kernels, compat, *options, backend
        gradient = _dense_crf_gradient(*inputs)
    return None, gradient, *[None] * 8


# --- registration ---

_dense_crf.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    images = (255 * draw(2, 3, 9, 14)).to(torch.uint8)
    options = {"images": images, "num_iter": 2, "bi_xy_std": 8.0, "bi_rgb_std": 60.0}
    probs = {"probs": 0.1 + draw(2, 3, 9, 14)}
    return [Sample(dense_crf, probs, options, ("probs",))]


backends.register("dense_crf", _samples, ("native",))
