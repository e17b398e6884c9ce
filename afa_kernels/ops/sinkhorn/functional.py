"""Sinkhorn normalisation of an affinity (Sinkhorn 1964), as before the walk of CLIP-ES (Lin et al., CVPR 2023).

    A_ij <- A_ij / (sum_i A_ij + eps),   A_ij <- A_ij / (sum_j A_ij + eps)      repeated num_iter times

over the window [B, (2r+1)^2, h, w] of `window_affinity`. No half step writes the window: what it has become is
T_ij = r_i A_ij c_j at any time, so a half step renews one of two vectors from the sums of r A c,

    c_j <- c_j / (c_j sum_i r_i A_ij + eps) = 1 / (sum_i r_i A_ij + eps / c_j),   r_i likewise from sum_j A_ij c_j,

and the window is written once, at the end. The vectors of every half step are kept for the gradient, which runs through
the half steps backwards on vectors too: with G = dL/dT,

    gc_j <- sum_i r_i A_ij G_ij,   gr_i <- sum_j A_ij c_j G_ij                   of the last of each, and
    u_i = -r_i^2 gr_i is dL/d(sum_j A_ij c_j) of a half step over rows, adds A' u to gc and eps u to u of the one before
    v_j = -c_j^2 gc_j, over columns, adds A v to gr, and eps v to v of the one before
    dL/dA_ij = r_i c_j G_ij + sums over half steps of u_i c_j (rows) and r_i v_j (columns), r and c those it was given
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import backends
from ...core.checks import FARTHEST, MOST_STEPS, check_float, check_int, check_window
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference


def sinkhorn(
    affinity: Tensor,
    radius: int,
    num_iter: int = 3,
    eps: float = 0.0,
    *,
    symmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divide the columns of an affinity by their sums, then the rows by theirs, and so on (Sinkhorn 1964).

    The window is a banded matrix: tap t of pixel i holds A_ij with j = i + offset_t. CLIP-ES (Lin et al., CVPR 2023)
    takes ``num_iter=3, symmetric=True``, and then two steps of the walk:
    ``diffuse(sinkhorn(...), cams, offsets, 2, "zero")``.

    Args:
        affinity: [B, (2 * radius + 1)^2, h, w] at least 0, as from `window_affinity`; what a tap outside the image
            holds plays no part. float32, float16 or bfloat16 (float64 in the reference path).
        radius: of the window, at least 0.
        num_iter: how often columns and rows are divided, at least 0. For the gradient 16 bytes are kept of every pixel
            and iteration.
        eps: added to every sum before it divides, at least 0. With 0 an empty column or row is 0 / 0, NaN, as are then
            those that share a pixel with it; with more it stays 0.
        symmetric: whether to return (T + T') / 2 of the result T, which is symmetric to the bit.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        The window, [B, (2 * radius + 1)^2, h, w] in the dtype of affinity, 0 where a tap leaves the image. Sums and
        factors are float64, products of them rounded to float32 at the end: affinities of any size float32 has, side
        by side, give what the divisions in float64 give, as long as the products of those stay within 1e-300..1e300.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import sinkhorn, window_to_dense
        >>> walk = window_to_dense(sinkhorn(torch.rand(1, 25, 8, 10), radius=2), radius=2)
        >>> torch.allclose(walk.sum(2), torch.ones(1, 80))  # the rows were divided last
        True
    """
    radius = check_int(radius, "radius", 0, FARTHEST)
    check_window(affinity, radius)
    num_iter, eps = check_int(num_iter, "num_iter", 0, MOST_STEPS), check_float(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    chosen = backends.choose("sinkhorn", backend, affinity)
    if chosen == "reference":
        with no_autocast(affinity.device):
            return reference.sinkhorn(affinity, radius, num_iter, eps, symmetric)
    return _sinkhorn(affinity, radius, num_iter, eps, symmetric, chosen)[0]


# --- forward ------------------------------------------------------------------------------------------------


@operator("sinkhorn")
def _sinkhorn(
    affinity: Tensor, radius: int, num_iter: int, eps: float, symmetric: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The window, and c and r after every half step, [B, 2 * num_iter, h, w] float64, c first."""
    return implementation(__package__, backend).sinkhorn(affinity, radius, num_iter, eps, symmetric)


@_sinkhorn.register_fake
def _(affinity, radius, num_iter, eps, symmetric, backend):
    batch, _, height, width = affinity.shape
    out = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    return out, torch.empty(batch, 2 * num_iter, height, width, dtype=torch.float64, device=affinity.device)


# --- backward -----------------------------------------------------------------------------------------------


@operator("sinkhorn_gradient")
def _gradient(
    affinity: Tensor, scales: Tensor, grad: Tensor, radius: int, eps: float, symmetric: bool, backend: str
) -> Tensor:
    return implementation(__package__, backend).sinkhorn_gradient(affinity, scales, grad, radius, eps, symmetric)


@_gradient.register_fake
def _(affinity, scales, grad, radius, eps, symmetric, backend):
    return torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)


def _save(ctx, inputs, output):
    affinity, ctx.radius, _, ctx.eps, ctx.symmetric, ctx.backend = inputs
    ctx.save_for_backward(affinity, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    affinity, scales = ctx.saved_tensors
    options = ctx.radius, ctx.eps, ctx.symmetric, ctx.backend
    return _gradient(affinity, scales, grad, *options), *[None] * 5


# --- registration -------------------------------------------------------------------------------------------

_sinkhorn.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    tensors = {"affinity": draw(2, 49, 9, 11)}
    plain, published = {"radius": 3, "num_iter": 2, "eps": 0.1}, {"radius": 3, "symmetric": True}
    return [Sample(sinkhorn, tensors, options, ("affinity",)) for options in (plain, published)]


backends.register("sinkhorn", _samples)
