"""The bilateral filter: sums over all pixels that are near in place and in colour, as dense CRFs and the dense energy
loss take them.

    out_i = sum_j exp(-|p_i - p_j|^2 / (2 sigma_xy^2) - |I_i - I_j|^2 / (2 sigma_rgb^2)) v_j        j = i included

``exact`` forms that sum, ``lattice`` the approximation of published numbers by the permutohedral lattice (Adams, Baek
and Davis, 2010). The formulas stand in `reference`. The adjoint with respect to the values is the filter itself; the
lattice's blurs along its axes in reverse order.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...core import backends
from ...core.checks import FLOATS, check_float, check_same_device, check_tensor
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from . import reference

METHODS = ("exact", "lattice")
# Further from one pixel, in sigmas, than the lattice has coordinates in float32: what is farther apart does not meet.
MOST_SIGMAS = 1 << 16
MOST_NORMALISED = 10.0  # above what photographs reach whose mean and deviation were taken off, 2.7
APART = 0.2  # of a pixel's side or a grey level: as a standard deviation it lets no neighbour in, 4e-6

# --- checks ---


def check_method(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"method must be 'exact' or 'lattice', got {method!r}")
    return method


def check_images(images: Tensor, name: str = "images") -> None:
    """[B, 3, H, W], which no gradient can be asked of."""
    check_tensor(images, name, ("B", 3, "H", "W"), (torch.uint8, *FLOATS))
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, there is none with respect to them: detach them")


def warn_unless_grey_levels(images: Tensor, sigma_rgb: float | None, name: str = "images") -> None:
    """Where the images are floats in 0..1, or normalised, and sigma_rgb is one of grey levels: no colour is then told
    from another, and the result looks plausible. Looked at on a CPU only, for a GPU would have to be waited for.

    Nothing is said of what a denormalisation's roundings or a bicubic resize leave below 0: those are grey levels.
    """
    if sigma_rgb is None or sigma_rgb < 1 or images.device.type != "cpu" or not images.is_floating_point():
        return
    traced = torch.compiler.is_compiling() or type(images) not in (Tensor, torch.nn.Parameter)
    if traced or torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0:
        return  # the last: fake tensors and make_fx, whose tensors may be plain ones, let no number out
    lowest, highest = (bound.item() for bound in torch.aminmax(images.detach()))
    normalised = lowest < -0.1 and highest < MOST_NORMALISED
    if normalised or 0 < highest <= 1:
        expected = f"{name} must be in 0..255, as sigma_rgb = {sigma_rgb:g} grey levels is"
        warnings.warn(f"{expected}; these are in {lowest:.3g}..{highest:.3g}", UserWarning, stacklevel=3)


def lattice_sigmas(shape: torch.Size, sigma_rgb: float | None, sigma_xy: float) -> tuple[float | None, float]:
    """Sigmas of which the lattice can number the multiples: smaller ones are made so large, which no pixel notices.

    Raises:
        ValueError: the image is so long that one would.
    """
    rgb = None if sigma_rgb is None else max(sigma_rgb, 255 / MOST_SIGMAS)
    longest = max(shape[-2:])
    least = longest / MOST_SIGMAS
    if least > max(sigma_xy, APART):
        expected = f"at least {least:g} for the lattice of an image of {longest} pixels"
        raise ValueError(f"sigma_xy must be {expected}, got {sigma_xy:g}")
    return rgb, max(sigma_xy, least)


def bilateral_filter(
    images: Tensor,
    values: Tensor,
    sigma_rgb: float | None,
    sigma_xy: float,
    method: str = "exact",
    *,
    backend: str | None = None,
) -> Tensor:
    """Unnormalised Gaussian sums over place and colour (Tang et al. 2018, Krähenbühl and Koltun 2011).

    Args:
        images: [B, 3, H, W] in 0..255; uint8, or float32, float16 or bfloat16 (float64 in the reference path). No
            gradient reaches them. On a CPU floats in 0..1, and normalised ones, draw a warning, unless sigma_rgb is
            below 1.
        values: [B, K, H, W], any range; floats likewise.
        sigma_rgb: standard deviation in grey levels, positive; None for a Gaussian of place alone.
        sigma_xy: standard deviation in pixels, positive.
        method: ``"exact"`` leaves out pairs of pixels only as long as all of them together stay below 1e-6 of the sum
            of weights times the largest value; ``"lattice"`` is the permutohedral lattice, faster, of which published
            numbers are; its sums are smaller by a factor of about two.
        backend: ``"native"``, ``"reference"`` or, of the exact filter, ``"triton"``; None takes the best that can run.
            `backends` lists the lattice as ``lattice_filter``.

    Returns:
        [B, K, H, W] in the dtype of values. Weights and sums are float32; those of many pixels can exceed what float16
        holds.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import bilateral_filter
        >>> images, values = torch.randint(256, (1, 3, 40, 50), dtype=torch.uint8), torch.rand(1, 21, 40, 50)
        >>> bilateral_filter(images, values, sigma_rgb=15, sigma_xy=50, method="lattice").shape
        torch.Size([1, 21, 40, 50])
    """
    check_images(images)
    shape = {"B": images.shape[0], "H": images.shape[2], "W": images.shape[3]}
    check_tensor(values, "values", ("B", "K", "H", "W"), FLOATS, **shape)
    check_same_device(images, "images", values=values)
    sigma_rgb = None if sigma_rgb is None else check_float(sigma_rgb, "sigma_rgb", positive=True)
    warn_unless_grey_levels(images, sigma_rgb)
    sigma_xy = check_float(sigma_xy, "sigma_xy", positive=True)
    if check_method(method) == "lattice":
        sigma_rgb, sigma_xy = lattice_sigmas(images.shape, sigma_rgb, sigma_xy)
    chosen = backends.choose("bilateral_filter" if method == "exact" else "lattice_filter", backend, values)
    if values.is_meta:  # no numbers: the lattice could not say which of its points are the same
        return values.clone(memory_format=torch.contiguous_format)
    images = images.detach().to(torch.promote_types(values.dtype, torch.float32))
    if chosen == "reference":
        with torch.autocast(values.device.type, enabled=False):
            return reference.bilateral_filter(images, values, sigma_rgb, sigma_xy, method)
    return _bilateral_filter(images, values, sigma_rgb, sigma_xy, method, False, chosen)


# --- forward and its adjoint ---


@operator("bilateral_filter")
def _bilateral_filter(
    images: Tensor,
    values: Tensor,
    sigma_rgb: float | None,
    sigma_xy: float,
    method: str,
    transpose: bool,
    backend: str,
) -> Tensor:
    inputs = images, values, sigma_rgb, sigma_xy, method, transpose
    return implementation(__package__, backend).bilateral_filter(*inputs)


@_bilateral_filter.register_fake
def _(images, values, sigma_rgb, sigma_xy, method, transpose, backend):
    return torch.empty(values.shape, dtype=values.dtype, device=values.device)


# --- backward ---


def _save(ctx, inputs, output):
    images, values, *ctx.options = inputs
    ctx.save_for_backward(images)


def _backward(ctx, grad):
    *options, transpose, backend = ctx.options
    grad_values = None
    if ctx.needs_input_grad[1]:
        grad_values = _bilateral_filter(*ctx.saved_tensors, grad, *options, not transpose, backend)
    return None, grad_values, *[None] * 5


# --- registration ---

_bilateral_filter.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    # Images of 0..255, whatever the dtype of the values: rounded to half precision they would be others.
    options = {"images": (255 * draw(2, 3, 13, 21)).to(torch.uint8), "sigma_rgb": 80.0, "sigma_xy": 6.0}
    values = {"values": draw(2, 5, 13, 21)}
    return [
        Sample(bilateral_filter, values, options, ("values",)),
        Sample(bilateral_filter, {"values": draw(2, 26, 13, 21)}, options, ("values",)),
        Sample(bilateral_filter, values, {**options, "sigma_rgb": None, "sigma_xy": 2.0}, ("values",)),
    ]


def _lattice_samples(draw: Draw) -> list[Sample]:
    options = {"images": (255 * draw(2, 3, 13, 21)).to(torch.uint8), "sigma_rgb": 80.0, "sigma_xy": 6.0}
    return [Sample(bilateral_filter, {"values": draw(2, 5, 13, 21)}, {**options, "method": "lattice"}, ("values",))]


backends.register("bilateral_filter", _samples)
# The lattice is an operator of its own to those who ask what can run: its kernels are those of the dense CRF.
backends.register("lattice_filter", _lattice_samples, ("native",), kernels="dense_crf")
