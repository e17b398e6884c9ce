"""The pixel correlation module of SEAM (Wang et al., CVPR 2020): class activation maps averaged over all
pixels that are alike.

    u_i = f_i / (|f_i| + 1e-5),   a_ij = max(u_i . u_j, 0),   out_j = sum_i cams_i a_ij / (sum_i a_ij + 1e-5)

The kernels have the sums over all pairs, of which no N x N is ever formed: a tile of a at a time, met by the values and
by a channel of ones, whose sum is the divisor. Resizing, norms and the quotient are PyTorch's. With g the gradient of
the sums, a being symmetric, that of the values is the same sum of g, and

    d u_j = sum_i [u_i . u_j > 0] (g_j . values_i + values_j . g_i) u_i

over all channels, the ones' included: a second sum over pairs, that forms its tiles of a again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import backends
from ...core.checks import FLOATS, check_same_device, check_tensor
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference

EPS = 1e-5  # of norms and of sums

# --- the public function ------------------------------------------------------------------------------------------


def pcm(cams: Tensor, features: Tensor, *, backend: str | None = None) -> Tensor:
    """Refine class activation maps by the likeness of all pairs of pixels (SEAM, Wang et al., CVPR 2020).

    Args:
        cams: [B, K, h, w], finite; resized to H x W (bilinear, aligned corners) where they are of another size.
            float32, float16 or bfloat16 (float64 in the reference path). SEAM detaches them and sets the background.
        features: [B, C, H, W], whose squares float32 can sum, likewise; may differ in dtype from cams. Each pixel is
            divided by its norm plus 1e-5: what counts is the cosine of two pixels, where it is positive.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, K, H, W] in the dtype of cams: means of cams over the image, weighted by the cosine with each pixel; 0 where
        a pixel's features are 0. Cosines and sums are float32. Gradients reach both inputs.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import pcm
        >>> pcm(torch.rand(1, 21, 28, 28), torch.randn(1, 192, 28, 28)).shape
        torch.Size([1, 21, 28, 28])
    """
    check_tensor(features, "features", ("B", "C", "H", "W"), FLOATS)
    check_tensor(cams, "cams", ("B", "K", "h", "w"), FLOATS, B=features.shape[0])
    check_same_device(features, "features", cams=cams)
    chosen = backends.choose("pcm", backend, cams, features)
    with no_autocast(cams.device):
        if chosen == "reference":
            return reference.pcm(cams, features)
        sums = _pcm(_resized(cams, features.shape[2:]), _units(features), True, chosen)
        return (sums[:, :-1] / (sums[:, -1:] + EPS)).to(cams.dtype)


def _resized(cams: Tensor, size: torch.Size) -> Tensor:
    if cams.shape[2:] == size:
        return cams
    return F.interpolate(cams.float(), size=size, mode="bilinear", align_corners=True)


def _units(features: Tensor) -> Tensor:
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS)


# --- the sums, which are their own adjoint ------------------------------------------------------------------------


@operator("pcm")
def _pcm(values: Tensor, features: Tensor, ones: bool, backend: str) -> Tensor:
    """values [B, K, H, W], features [B, C, H, W] -> [B, K, H, W] float32, the sums over all pixels weighted by the
    positive part of their features' products; with ``ones`` of one more channel, whose values are 1.
    """
    return implementation(__package__, backend).pcm(values, features, ones)


@_pcm.register_fake
def _(values, features, ones, backend):
    batch, channels, height, width = values.shape
    return torch.empty(batch, channels + ones, height, width, dtype=torch.float32, device=values.device)


# --- backward -----------------------------------------------------------------------------------------------------


@operator("pcm_features_gradient")
def _features_gradient(grad: Tensor, values: Tensor, features: Tensor, backend: str) -> Tensor:
    """The gradient of features; ``grad`` may have one more channel than ``values``, which has values of 1."""
    return implementation(__package__, backend).pcm_features_gradient(grad, values, features)


@_features_gradient.register_fake
def _(grad, values, features, backend):
    return torch.empty(features.shape, dtype=torch.float32, device=features.device)


def _save(ctx, inputs, output):
    values, features, ctx.ones, ctx.backend = inputs
    ctx.dtypes = values.dtype, features.dtype
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, features)


def _backward(ctx, grad):
    values, features = ctx.saved_tensors
    grad_values = grad_features = None
    if ctx.needs_input_grad[0]:
        own = grad[:, :-1] if ctx.ones else grad
        grad_values = _pcm(own, features, False, ctx.backend).to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        grad_features = _features_gradient(grad, values, features, ctx.backend).to(ctx.dtypes[1])
    return grad_values, grad_features, None, None


# --- registration -------------------------------------------------------------------------------------------------

_pcm.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    # Centred, or nearly all cosines of many channels would be positive.
    several = {"cams": draw(2, 5, 4, 6), "features": draw(2, 19, 9, 11) - 0.5}
    many = {"cams": draw(1, 40, 8, 13), "features": draw(1, 67, 8, 13) - 0.5}
    return [Sample(pcm, tensors, {}, ("cams", "features")) for tensors in (several, many)]


backends.register("pcm", _samples)
