"""Affinity along straight paths over an edge map, and class activation spread along it (IRN: Ahn, Cho, Kwak, CVPR 2019,
"Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations").

    A_ij = 1 - max of edge over the path from i to j,   j within the radius of i
    T_ij = A_ij^beta / sum_k A_kj^beta,   out = cams (1 - edge) T^(2^exp_times)

A is a window [B, (2r+1)^2, H, W] as that of `window_affinity`, and the second line is `random_walk` on it: no matrix of
all pairs of pixels is ever formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import backends
from ...core.checks import FARTHEST, FLOATS, MOST_STEPS, check_float, check_int, check_same_device, check_tensor
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from ..random_walk import random_walk
from . import reference

MOST_SQUARINGS = MOST_STEPS.bit_length() - 1

# --- the public functions -----------------------------------------------------------------------------------


def path_affinity(edge: Tensor, radius: int, *, backend: str | None = None) -> Tensor:
    """Affinity of each pixel to its window, by the strongest edge on the straight path between the two (IRN).

    A_ij = 1 - max of edge over the path from i to j = i + (dy, dx), both of them included, for
    dy^2 + dx^2 < radius^2. A path has all whole points of the box between its ends whose distance from the line through
    them is below 1, so that A is symmetric, bit for bit. NaN on a path makes its affinity NaN.

    The gradient of an affinity goes to the largest edge of its path; where several are equal, to one of them, which is
    one subgradient: the first in the order of IRN's max pooling, that is by descending |py| + |px| from the end of the
    path that comes first row-major, then row-major (a NaN counts as the largest).

    Args:
        edge: [B, 1, H, W], in 0..1 where affinities are to be so. float32, float16 or bfloat16 (float64 in the
            reference path).
        radius: of the disc, in pixels, which its rim does not belong to; at least 1.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, (2 * radius + 1)^2, H, W] in the dtype of edge, taps row-major over (dy, dx) from (-radius, -radius). The
        centre holds 1, whatever the edge; taps outside the disc or the image hold 0.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import path_affinity
        >>> edge = torch.tensor([[[[0.0, 0.75, 0.0]]]])
        >>> affinity = path_affinity(edge, radius=3)
        >>> affinity.shape, affinity[0, 24 + 2, 0, 0].item()  # of the first pixel with the third: across the edge
        (torch.Size([1, 49, 1, 3]), 0.25)
    """
    check_tensor(edge, "edge", ("B", 1, "H", "W"))
    radius = check_int(radius, "radius", 1, FARTHEST)
    return _window(edge, radius, radius, backend)


def propagate_to_edge(
    cams: Tensor,
    edge: Tensor,
    radius: int = 5,
    beta: float = 10,
    exp_times: int = 8,
    *,
    backend: str | None = None,
) -> Tensor:
    """Spread class activation maps up to the edges around them, as IRN does.

    With A of `path_affinity`, T_ij = A_ij^beta / sum_k A_kj^beta: the result is (cams * (1 - edge)) T^(2^exp_times),
    the maps as row vectors. T is applied 2^exp_times times to the window, which costs
    H * W * (2 * radius - 1)^2 * C * 2^exp_times multiply-adds and never a matrix of all pairs.

    Args:
        cams: [B, C, H, W], any range; or [C, H, W], as IRN calls it. float32, float16 or bfloat16 (float64 in the
            reference path).
        edge: [B, 1, H, W], or [1, H, W] for cams without a batch; in 0..1, as a sigmoid gives it. May differ in dtype
            from cams.
        radius: of the disc of `path_affinity`, at least 1.
        beta: positive; higher ignores faint affinities.
        exp_times: how often T is squared, from 0 to 30.
        backend: as in `path_affinity`.

    Returns:
        [B, C, H, W] in the dtype of cams; [C, 1, H, W] for cams [C, H, W]. Affinities, weights and sums are float32.
        It has gradients in cams and in edge (by 1 - edge and by the affinities, see `path_affinity`); that of edge
        keeps the maps of all 2^exp_times steps, forth and back, in float32, a few megabytes for each class of a grid of
        47 x 62 at 8 squarings.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import propagate_to_edge
        >>> propagate_to_edge(torch.rand(1, 20, 32, 40), torch.rand(1, 1, 32, 40), exp_times=4).shape
        torch.Size([1, 20, 32, 40])
    """
    batched = not (isinstance(cams, Tensor) and cams.dim() == 3)
    if batched:
        check_tensor(cams, "cams", ("B", "C", "H", "W"), FLOATS)
        check_tensor(edge, "edge", ("B", 1, "H", "W"), FLOATS, B=cams.shape[0], H=cams.shape[2], W=cams.shape[3])
    else:
        check_tensor(cams, "cams", ("C", "H", "W"), FLOATS)
        check_tensor(edge, "edge", (1, "H", "W"), FLOATS, H=cams.shape[1], W=cams.shape[2])
    check_same_device(cams, "cams", edge=edge)
    radius = check_int(radius, "radius", 1, FARTHEST)
    beta = check_float(beta, "beta", positive=True)
    exp_times = check_int(exp_times, "exp_times", 0, MOST_SQUARINGS)
    if not batched:
        walked = propagate_to_edge(cams[None], edge[None], radius, beta, exp_times, backend=backend)
        return walked.transpose(0, 1)
    # Rounded to half precision, an affinity would be off by beta times that after its power.
    wide = edge.to(torch.promote_types(edge.dtype, torch.float32))
    affinity = _window(wide, radius, radius - 1, backend)  # the window's outermost ring is outside of the disc
    start = cams * (1 - wide)
    return random_walk(affinity, start, radius - 1, beta, 2**exp_times, 0, backend=backend).to(cams.dtype)


def _window(edge: Tensor, radius: int, reach: int, backend: str | None) -> Tensor:
    """`path_affinity` of the taps at most ``reach`` pixels away in each axis."""
    chosen = backends.choose("path_affinity", backend, edge)
    if chosen == "reference":
        with no_autocast(edge.device):
            return reference.path_affinity(edge, radius, reach)
    return _path_affinity(edge, radius, reach, chosen)


# --- forward and backward -----------------------------------------------------------------------------------


@operator("path_affinity")
def _path_affinity(edge: Tensor, radius: int, reach: int, backend: str) -> Tensor:
    return implementation(__package__, backend).path_affinity(edge, radius, reach)


@_path_affinity.register_fake
def _(edge, radius, reach, backend):
    return edge.new_empty((edge.shape[0], (2 * reach + 1) ** 2, *edge.shape[2:]))


@operator("path_affinity_gradient")
def _gradient(edge: Tensor, grad: Tensor, radius: int, reach: int, backend: str) -> Tensor:
    return implementation(__package__, backend).path_affinity_gradient(edge, grad, radius, reach)


@_gradient.register_fake
def _(edge, grad, radius, reach, backend):
    return edge.new_empty(edge.shape)


def _save(ctx, inputs, output):
    edge, *options = inputs
    ctx.save_for_backward(edge)
    ctx.options = options


def _backward(ctx, grad):
    (edge,) = ctx.saved_tensors
    return _gradient(edge, grad, *ctx.options), None, None, None


# --- registration -------------------------------------------------------------------------------------------

_path_affinity.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    return [Sample(path_affinity, {"edge": draw(2, 1, 18, 35)}, {"radius": 3}, ("edge",))]


backends.register("path_affinity", _samples)
