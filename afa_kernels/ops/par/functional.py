"""Pixel-adaptive refinement: PAR of AFA, and PAMR of 1-stage-wseg, on which it builds.

    weights = par_weights(images)                     an affinity of each pixel to 8 neighbours for each dilation
    masks  <- sum over taps of weights * neighbour    num_iter times (`diffuse` with replicated borders)

The formulas stand in `reference`. The gradient of the masks is the adjoint diffusion, with the weights computed again
rather than kept. The gradient of the images is the one exception to the rule that only the ``"reference"`` backend runs
through `reference`: training does not ask for it, so it has no kernel, and PyTorch derives the formula, twice where
a second backward is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import backends
from ...core.checks import (
    FLOATS,
    MOST_STEPS,
    check_class_mask,
    check_dilations,
    check_float,
    check_images,
    check_int,
    check_same_device,
    check_tensor,
)
from ...core.implementations import implementation
from ...core.registration import operator
from ..diffusion import diffuse
from . import reference

DILATIONS = (1, 2, 4, 8, 12, 24)

# --- checks ---


def check_factors(w1: float, w2: float, w3: float) -> list[float]:
    return [check_float(w1, "w1", positive=True), check_float(w2, "w2", positive=True), check_float(w3, "w3")]


def check_resize(resize: str) -> str:
    if resize not in ("mask", "image"):
        raise ValueError(f"resize must be 'mask' or 'image', got {resize!r}")
    return resize


def _resized(value: Tensor, like: Tensor) -> Tensor:
    """To the height and width of ``like``; in float32, so that half precision is rounded once, at the end."""
    if value.shape[-2:] == like.shape[-2:]:
        return value
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return F.interpolate(wide, size=like.shape[-2:], mode="bilinear", align_corners=True)


def refine(
    images: Tensor,
    masks: Tensor | Sequence[Tensor],
    dilations: Sequence[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | Sequence[Tensor | None] | None,
    backend: str | None,
    resize: str = "mask",
    names: tuple[str, str] = ("images", "masks"),
) -> Tensor | list[Tensor]:
    """`par` (three factors) and `pamr` (none)."""
    check_images(images, names[0])
    if isinstance(masks, (list, tuple)):
        together, present = _together(masks, class_mask, names[1])
        options = dilations, num_iter, factors, present, backend, resize, names
        return list(refine(images, together, *options).split([each.shape[1] for each in masks], dim=1))
    check_tensor(masks, names[1], ("B", "C", "h", "w"), FLOATS)
    shown, scored = images.shape[0], masks.shape[0]  # len() would fix them where export takes any
    if 1 not in (shown, scored):
        check_tensor(masks, names[1], ("B", "C", "h", "w"), FLOATS, B=shown)
    check_same_device(images, names[0], **{names[1]: masks})
    check_class_mask(class_mask, masks, names[1])
    dilations = check_dilations(dilations)
    num_iter = check_int(num_iter, "num_iter", 0, MOST_STEPS)
    dtype = masks.dtype
    if check_resize(resize) == "mask":
        masks = _resized(masks, images)
    else:
        images = _resized(images, masks)
    if shown == 1 < scored:  # one image's weights, made once, for all the masks
        together = masks.reshape(1, -1, *masks.shape[2:])
        present = None if class_mask is None else class_mask.reshape(1, -1)
        refined = _refined(images, together, dilations, num_iter, factors, present, backend)
        return refined.to(dtype).view(masks.shape)
    if scored == 1 < shown:
        masks = masks.expand(shown, -1, -1, -1)
        class_mask = None if class_mask is None else class_mask.expand(shown, -1)
    refined = _refined(images, masks, dilations, num_iter, factors, class_mask, backend)
    return refined if refined.dtype == dtype else refined.to(dtype)


def _together(masks: Sequence[Tensor], class_mask: object, name: str) -> tuple[Tensor, Tensor | None]:
    """Several masks of the same images as channels side by side, and which of them are wanted."""
    if not masks:
        raise ValueError(f"{name} must hold at least one tensor, got none")
    for number, each in enumerate(masks):
        check_tensor(each, f"{name}[{number}]", ("B", "C", "h", "w"), FLOATS)
        same = {"B": masks[0].shape[0], "h": masks[0].shape[2], "w": masks[0].shape[3]}
        check_tensor(each, f"{name}[{number}]", ("B", "C", "h", "w"), (masks[0].dtype,), **same)
        check_same_device(masks[0], f"{name}[0]", **{f"{name}[{number}]": each})
    if class_mask is None:
        return torch.cat(list(masks), dim=1), None
    if not isinstance(class_mask, (list, tuple)) or len(class_mask) != len(masks):
        raise ValueError(f"class_mask must be a sequence of {len(masks)}, one for each of {name}, or None")
    present = []
    for wanted, each in zip(class_mask, masks):
        check_class_mask(wanted, each, name)
        everything = torch.ones(each.shape[:2], dtype=torch.bool, device=each.device)
        present.append(everything if wanted is None else wanted)
    return torch.cat(list(masks), dim=1), torch.cat(present, dim=1)


def _refined(
    images: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Of one batch and size."""
    images = _as_three(images)
    chosen = backends.choose("par", backend, images, masks)
    if chosen == "reference":
        return reference.refine(images, masks, dilations, num_iter, tuple(factors) or None, class_mask)
    if images.shape[1] == 3:
        return _par(images, masks, dilations, num_iter, factors, class_mask, False, chosen)
    weights = _by_formula(images.to(torch.promote_types(images.dtype, torch.float32)), dilations, factors)
    offsets = reference.tap_offsets(dilations)
    return diffuse(weights, masks, offsets, num_iter, "replicate", class_mask, backend=chosen)


def _as_three(images: Tensor) -> Tensor:
    """The mean over three equal channels is that of the one."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _by_formula(images: Tensor, dilations: list[int], factors: list[float]) -> Tensor:
    """Weights of any number of channels: the kernels are for three."""
    return reference.par_weights(images, dilations, *factors) if factors else reference.pamr_weights(images, dilations)


@overload
def par(
    images: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = ...,
    num_iter: int = ...,
    w1: float = ...,
    w2: float = ...,
    w3: float = ...,
    *,
    class_mask: Tensor | None = ...,
    resize: str = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def par(
    images: Tensor,
    masks: Sequence[Tensor],
    dilations: Sequence[int] = ...,
    num_iter: int = ...,
    w1: float = ...,
    w2: float = ...,
    w3: float = ...,
    *,
    class_mask: Sequence[Tensor | None] | None = ...,
    resize: str = ...,
    backend: str | None = ...,
) -> list[Tensor]: ...
def par(
    images: Tensor,
    masks: Tensor | Sequence[Tensor],
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    w1: float = 0.3,
    w2: float = 0.3,
    w3: float = 0.01,
    *,
    class_mask: Tensor | Sequence[Tensor | None] | None = None,
    resize: str = "mask",
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Pixel-adaptive refinement (AFA, Eq. 9-12; defaults from Tables 2 and 3 of the supplement).

    Args:
        images: [B, 3, H, W] in 0..1; float32, float16 or bfloat16 (float64 in the reference path). Or of one channel,
            or of any number (the colour term is their mean; PyTorch makes the weights then).
        masks: [B, C, h, w], any range, such as class scores. One image is for all the masks (its weights are made
            once), and the reverse. Or several of one size and dtype, ``[masks_low, masks_high]``, as for pseudo-labels
            with two background scores: one call, whose weights are made once, gives them back as a list.
        dilations: distances of the taps in pixels, each at least 1.
        num_iter: diffusion steps, at least 0.
        w1, w2: smoothing of the colour and the position term, positive.
        w3: share of the position term; each pixel's weights sum to 1 + w3.
        class_mask: [B, C] bool; channels that are False (absent classes) cost nothing and are returned as 0. Of
            several masks one for each, or None.
        resize: where the sizes differ, ``"mask"`` resizes the masks to the image (bilinear, corners aligned; as
            published), ``"image"`` the image to the masks: cheaper, and the taps then count in mask pixels.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, C, H, W], or [B, C, h, w] with ``resize="image"``, in the dtype of masks. Weights and sums are float32. As
        published, a pixel that differs in one colour from taps that are all the same in it gets nearly uniform weights,
        whatever its other colours say: they are lost in float32 beside a distance over a deviation of 0.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import par
        >>> images, scores = torch.rand(2, 3, 64, 64), torch.rand(2, 21, 32, 32)
        >>> par(images, scores).shape
        torch.Size([2, 21, 64, 64])
        >>> low, high = par(images, [scores, 0.5 * scores])  # weights made once
    """
    return refine(images, masks, dilations, num_iter, check_factors(w1, w2, w3), class_mask, backend, resize)


def weights_of(images: Tensor, dilations: Sequence[int], factors: list[float], backend: str | None) -> Tensor:
    """`par_weights` (three factors) and `pamr_weights` (none)."""
    check_images(images, "images")
    dilations, images = check_dilations(dilations), _as_three(images)
    chosen = backends.choose("par_weights", backend, images)
    if chosen == "reference" or images.shape[1] != 3:
        return _by_formula(images, dilations, factors)
    return _par_weights(images, dilations, factors, chosen)


def par_weights(
    images: Tensor,
    dilations: Sequence[int] = DILATIONS,
    w1: float = 0.3,
    w2: float = 0.3,
    w3: float = 0.01,
    *,
    backend: str | None = None,
) -> Tensor:
    """The weights of `par` (AFA, Eq. 9-11): images [B, 3, H, W] in 0..1 -> [B, 8*len(dilations), H, W], positive,
    sum 1 + w3.

    Channels: for each dilation the 8 neighbours, row-major in (dy, dx), centre left out. Arguments and errors as
    `par`.

    Examples:
        >>> import torch
        >>> from afa_kernels import par_weights
        >>> weights = par_weights(torch.rand(1, 3, 32, 32), dilations=(1, 2))
        >>> weights.shape, round(weights.sum(1).mean().item(), 4)
        (torch.Size([1, 16, 32, 32]), 1.01)
    """
    return weights_of(images, dilations, check_factors(w1, w2, w3), backend)


# --- forward and its adjoint ---


@operator("par")
def _par(
    images: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | None,
    transpose: bool,
    backend: str,
) -> Tensor:
    inputs = images, masks, dilations, num_iter, factors, class_mask, transpose
    return implementation(__package__, backend).par(*inputs)


@_par.register_fake
def _(images, masks, dilations, num_iter, factors, class_mask, transpose, backend):
    return torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)


@operator("par_weights")
def _par_weights(images: Tensor, dilations: list[int], factors: list[float], backend: str) -> Tensor:
    return implementation(__package__, backend).par_weights(images, dilations, factors)


@_par_weights.register_fake
def _(images, dilations, factors, backend):
    shape = (images.shape[0], 8 * len(dilations), *images.shape[2:])
    return torch.empty(shape, dtype=images.dtype, device=images.device)


# --- backward ---


def _save(ctx, inputs, output):
    images, masks, dilations, num_iter, factors, class_mask, transpose, backend = inputs
    ctx.save_for_backward(images, masks if ctx.needs_input_grad[0] else None, class_mask)
    ctx.options = dilations, num_iter, factors, transpose, backend, masks.dtype


def _backward(ctx, grad):
    images, masks, class_mask = ctx.saved_tensors
    dilations, num_iter, factors, transpose, backend, dtype = ctx.options
    grad_images = grad_masks = None
    if ctx.needs_input_grad[1]:
        grad_masks = _par(images, grad, dilations, num_iter, factors, class_mask, not transpose, backend)
        grad_masks = grad_masks.to(dtype)
    if ctx.needs_input_grad[0]:
        # <grad, A masks> is also <A^T grad, masks>: the adjoint's images have the same gradient with the two
        # exchanged.
        start, end = (grad, masks) if transpose else (masks, grad)
        grad_images = _images_gradient(images, start, end, dilations, num_iter, factors, class_mask)
    return grad_images, grad_masks, None, None, None, None, None, None


def _images_gradient(
    images: Tensor,
    masks: Tensor,
    grad: Tensor,
    dilations: list[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | None,
) -> Tensor:
    if num_iter == 0:
        return torch.zeros_like(images)

    def refined(images: Tensor, masks: Tensor) -> Tensor:
        return reference.refine(images, masks, dilations, num_iter, tuple(factors) or None, class_mask)

    return _through_formula(refined, images, grad, masks)


def _weights_gradient(images: Tensor, grad: Tensor, dilations: list[int], factors: list[float]) -> Tensor:
    return _through_formula(lambda images: _by_formula(images, dilations, factors), images, grad)


def _through_formula(formula: Callable[..., Tensor], images: Tensor, grad: Tensor, *others: Tensor) -> Tensor:
    """The gradient of the images in ``formula(images, *others)``, with a backward of its own where one may follow."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if again:
            leaf = images.view_as(images)  # others may come from the images too, which is no part of this
        else:
            leaf, *others = (tensor.detach() for tensor in (images, *others))
            leaf.requires_grad_()
        out = formula(leaf.float(), *(other.float() for other in others))
        return torch.autograd.grad(out, leaf, grad.float(), create_graph=again)[0]


def _save_images(ctx, inputs, output):
    images, *ctx.options = inputs
    ctx.save_for_backward(images)


def _backward_weights(ctx, grad):
    dilations, factors, _ = ctx.options
    return _weights_gradient(*ctx.saved_tensors, grad, dilations, factors), None, None, None


_par.register_autograd(_backward, setup_context=_save)
_par_weights.register_autograd(_backward_weights, setup_context=_save_images)
