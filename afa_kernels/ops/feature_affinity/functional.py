"""Affinity of features: how alike the features of a pixel are to those of its window.

    A_ij = |cos(f_i, f_j)|,   exp(-mean_c |f_i,c - f_j,c|)   or   max(f_i . f_j, 0)        for |dy| <= r and |dx| <= r

The first is the absolute value of the products of features that PyTorch has normalised, so the kernels know three
functions of one sum over channels, s_ij = s_ji. With G the gradient of A, that of the features is

    dL/df_i = sum_j w_ij f_j   or   sum_j w_ij sign(f_i - f_j),        w_ij = (G_ij + G_ji) dA_ij/ds_ij

The slopes dA/ds are not computed again: that of "exp_l1" is -A / C, from the result; of the other two the forward keeps
the sign, for one half of the window, which the other half mirrors. Only a call that autograd records does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import backends
from ...core.checks import FARTHEST, check_int, check_tensor
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference

# What the kernels call a kind: "abs_dot" takes its features as they are.
KINDS = {"cos": "abs_dot", "exp_l1": "exp_l1", "relu_dot": "relu_dot"}
EPS = 1e-8


def _check_kind(kind: str) -> str:
    if not isinstance(kind, str):
        raise TypeError(f"kind must be a string, got {kind!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def feature_affinity(features: Tensor, radius: int, kind: str = "cos", *, backend: str | None = None) -> Tensor:
    """Affinity of every pixel to its window by how alike their features are, without a matrix of N x N.

    Args:
        features: [B, C, H, W] of any strides, so large that sums of squares fit float32. float32, float16 or
            bfloat16 (float64 in the reference path).
        radius: of the square window, in pixels, at least 0; it may reach across the whole grid.
        kind: ``"cos"``, |cos(f_i, f_j)|, features shorter than 1e-8 divided by that (ToCo: Ru et al., CVPR 2023, whose
            patch token contrast takes absolute cosines); ``"exp_l1"``, exp(-mean_c |f_i,c - f_j,c|) (AffinityNet: Ahn
            and Kwak, CVPR 2018, with the L1 norm; its public code takes the mean over channels, as here);
            ``"relu_dot"``, max(f_i . f_j, 0) (the pixel correlation of SEAM: Wang et al., CVPR 2020, within a window,
            when the features have been normalised before).
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, (2 * radius + 1)^2, H, W] in the dtype of features, as `random_walk` and `affinity_loss` take it; taps
        row-major in (dy, dx), 0 where a tap points outside the image. Symmetric bit for bit: tap o of pixel i is tap
        -o of pixel i + o. Sums are float32. Where A has a corner (a product of 0, equal features) its slope is 0.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import feature_affinity
        >>> affinity = feature_affinity(torch.randn(1, 192, 28, 28), radius=4, kind="cos")
        >>> affinity.shape, round(affinity[0, 40].mean().item(), 4)  # tap 40 of 81: a pixel with itself
        (torch.Size([1, 81, 28, 28]), 1.0)
    """
    radius = check_int(radius, "radius", 0, FARTHEST)
    check_tensor(features, "features", ("B", "C", "H", "W"))
    kind = _check_kind(kind)
    chosen = backends.choose("feature_affinity", backend, features)
    with no_autocast(features.device):
        if chosen == "reference":
            return reference.feature_affinity(features, radius, kind)
        values = F.normalize(features.float(), dim=1, eps=EPS) if kind == "cos" else features
        # vmap's tensors do not always say that they need a gradient.
        keep = torch.is_grad_enabled() and (values.requires_grad or torch._C._are_functorch_transforms_active())
        affinity, _ = _feature_affinity(values, radius, KINDS[kind], keep, chosen)
        return affinity.to(features.dtype)


# --- forward ----------------------------------------------------------------------------------------------


def _window_shape(features: Tensor, taps: int) -> tuple[int, int, int, int]:
    return features.shape[0], taps, *features.shape[2:]


@operator("feature_affinity")
def _feature_affinity(features: Tensor, radius: int, kind: str, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The affinity, and the slopes of its taps from the middle one on, [B, (taps + 1) / 2, H, W]: empty unless they are
    to be kept, and for "exp_l1", whose slopes the affinity tells.
    """
    return implementation(__package__, backend).feature_affinity(features, radius, kind, keep)


@_feature_affinity.register_fake
def _(features, radius, kind, keep, backend):
    taps = (2 * radius + 1) ** 2
    kept = _window_shape(features, (taps + 1) // 2) if keep and kind != "exp_l1" else (0,)
    return features.new_empty(_window_shape(features, taps)), features.new_empty(kept)


# --- backward ---------------------------------------------------------------------------------------------


@operator("feature_affinity_backward")
def _gradient(features: Tensor, slopes: Tensor, grad: Tensor, radius: int, kind: str, backend: str) -> Tensor:
    """slopes [B, (taps + 1) / 2, H, W]: dA/ds, of "exp_l1" times -C, which is A."""
    return implementation(__package__, backend).feature_affinity_backward(features, slopes, grad, radius, kind)


@_gradient.register_fake
def _(features, slopes, grad, radius, kind, backend):
    return torch.empty(features.shape, dtype=features.dtype, device=features.device)


def _save(ctx, inputs, output):
    features, *ctx.options = inputs
    affinity, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.save_for_backward(features, affinity if ctx.options[1] == "exp_l1" else slopes)


def _backward(ctx, grad, _):
    features, slopes = ctx.saved_tensors
    radius, kind, _, backend = ctx.options
    if kind == "exp_l1":
        slopes = slopes[:, slopes.shape[1] // 2 :]
    grad_features = _gradient(features, slopes, grad, radius, kind, backend)
    return grad_features, None, None, None, None


# --- registration -----------------------------------------------------------------------------------------

_feature_affinity.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    tensors = {"features": draw(2, 40, 9, 11) - 0.5}
    return [Sample(feature_affinity, tensors, {"radius": 3, "kind": kind}, ("features",)) for kind in KINDS]


backends.register("feature_affinity", _samples)
