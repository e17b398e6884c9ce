"""Diffusion over a fixed set of taps: the step that PAR, PAMR and the random walk share.

    out[b,c,y,x] = sum_t weights[b,t,y,x] * masks[b,c,y+dy_t,x+dx_t]        repeated num_iter times

A neighbour outside the image is its nearest pixel (``border="replicate"``) or 0 (``border="zero"``). The gradient
of the masks is the adjoint of the same linear map, exact at the borders; that of the weights repeats the steps and
correlates each with its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import backends
from ...core.checks import (
    FARTHEST,
    FLOATS,
    MOST_STEPS,
    check_class_mask,
    check_int,
    check_same_device,
    check_tensor,
)
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.taps import clipped
from . import reference

# --- checks ---

BORDERS = ("replicate", "zero")


def _check_offsets(offsets: Tensor | Sequence[Sequence[int]], taps: int) -> tuple[Tensor, list[tuple[int, int]] | None]:
    """Offsets as an int64 tensor, and as a list where they came as one."""
    if isinstance(offsets, Tensor):
        if offsets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
            raise TypeError(f"offsets must hold integers, got {offsets.dtype}")
        if tuple(offsets.shape) != (taps, 2):
            raise ValueError(
                f"offsets must be [T, 2] with T = {taps} as in weights, got {tuple(offsets.shape)}"
            )
        return offsets.to(torch.int64), None
    expected = f"offsets must be {taps} pairs (dy, dx), one per channel of weights"
    try:
        values = [tuple(pair) for pair in offsets]
    except TypeError:
        raise TypeError(f"{expected}, got {offsets!r}") from None
    pairs = [tuple(check_int(value, "offsets", -FARTHEST, FARTHEST) for value in pair) for pair in values]
    if len(pairs) != taps or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{expected}, got {len(pairs)}" if len(pairs) != taps else f"{expected}, got {pairs}")
    return torch.tensor(pairs, dtype=torch.int64, device="cpu"), pairs


def diffuse(
    weights: Tensor,
    masks: Tensor,
    offsets: Tensor | Sequence[Sequence[int]],
    num_iter: int,
    border: str = "replicate",
    class_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Diffuse masks over weighted taps, num_iter times (the iteration of AFA's Eq. 12; with one step, the walk of
    Eq. 8).

    Args:
        weights: [B, T, H, W] float32, float16 or bfloat16 (float64 in the reference path): one channel per tap,
        any range. masks: [B, C, H, W], likewise; may differ in dtype from weights.
        offsets: T pairs (dy, dx) in pixels, a sequence or an integer tensor [T, 2] (on the CPU, lest a call wait
        for the GPU). num_iter: how many steps, at least 0; 0 returns a copy of masks.
        border: what a tap outside the image reads: ``"replicate"``, its nearest pixel, or ``"zero"``.
        class_mask: [B, C] bool; channels that are False are skipped and returned as 0.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, C, H, W] in the dtype of masks, contiguous; sums are taken in float32, in the order of the taps.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import diffuse
        >>> weights = torch.ones(1, 1, 2, 4)  # of one tap: the neighbour on the left
        >>> masks = torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 1, 0]]]])
        >>> diffuse(weights, masks, offsets=[(0, -1)], num_iter=1, border="zero")[0, 0]
        tensor([[0., 1., 0., 0.],
                [0., 0., 0., 1.]])
    """
    check_tensor(weights, "weights", ("B", "T", "H", "W"))
    batch, taps, height, width = weights.shape
    check_tensor(masks, "masks", ("B", "C", "H", "W"), FLOATS, B=batch, H=height, W=width)
    check_same_device(weights, "weights", masks=masks)
    check_class_mask(class_mask, masks)
    num_iter = check_int(num_iter, "num_iter", 0, MOST_STEPS)
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    offsets, pairs = _check_offsets(offsets, taps)
    chosen = backends.choose("diffuse", backend, weights, masks)
    if chosen == "reference":
        pairs = pairs or [tuple(pair) for pair in offsets.tolist()]
        return reference.diffuse(weights, masks, pairs, num_iter, border, class_mask)
    return _diffuse(weights, masks, offsets, num_iter, border, class_mask, False, chosen)


# --- forward and its adjoint ---


@operator("diffuse")
def _diffuse(
    weights: Tensor,
    masks: Tensor,
    offsets: Tensor,
    num_iter: int,
    border: str,
    class_mask: Tensor | None,
    transpose: bool,
    backend: str,
) -> Tensor:
    inputs = weights, masks, offsets, num_iter, border, class_mask, transpose
    return implementation(__package__, backend).diffuse(*inputs)


@_diffuse.register_fake
def _(weights, masks, offsets, num_iter, border, class_mask, transpose, backend):
    return torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)


# --- backward ---


def _save(ctx, inputs, output):
    weights, masks, offsets, num_iter, border, class_mask, transpose, backend = inputs
    ctx.save_for_backward(weights, masks if ctx.needs_input_grad[0] else None, offsets, class_mask)
    ctx.options = num_iter, border, transpose, backend, masks.dtype


def _backward(ctx, grad):
    weights, masks, offsets, class_mask = ctx.saved_tensors
    num_iter, border, transpose, backend, dtype = ctx.options
    grad_weights = grad_masks = None
    if ctx.needs_input_grad[1]:
        grad_masks = _diffuse(weights, grad, offsets, num_iter, border, class_mask, not transpose, backend)
        grad_masks = grad_masks.to(dtype)
    if ctx.needs_input_grad[0]:
        # <grad, A masks> is also <A^T grad, masks>: the adjoint's weights have the same gradient with the two
        # exchanged.
        start, end = (grad, masks) if transpose else (masks, grad)
        grad_weights = _weights_gradient(weights, start, end, offsets, num_iter, border, class_mask, backend)
    return grad_weights, grad_masks, None, None, None, None, None, None


def _weights_gradient(
    weights: Tensor,
    masks: Tensor,
    grad: Tensor,
    offsets: Tensor,
    num_iter: int,
    border: str,
    class_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Sum over steps k and channels of grad_k * neighbour of masks_(k-1): the steps are run again and kept."""
    steps = [masks.float()]
    for _ in range(num_iter - 1):
        steps.append(_diffuse(weights, steps[-1], offsets, 1, border, class_mask, False, backend))
    grad, total = grad.float(), None
    for step in reversed(steps[:num_iter]):
        term = _correlation(grad, step, offsets, border, class_mask)
        total = term if total is None else total + term
        grad = _diffuse(weights, grad, offsets, 1, border, class_mask, True, backend)
    return torch.zeros_like(weights) if total is None else total.to(weights.dtype)


@operator("diffuse_correlation")
def _correlation(grad: Tensor, masks: Tensor, offsets: Tensor, border: str, class_mask: Tensor | None) -> Tensor:
    """[B, T, H, W]: sum over channels of grad * neighbour of masks, the gradient of one step's weights."""
    batch, _, height, width = grad.shape
    pairs = clipped(offsets.tolist(), height, width)
    if class_mask is not None:
        keep = class_mask[:, :, None, None]
        grad, masks = torch.where(keep, grad, 0), torch.where(keep, masks, 0)
    pad_y, pad_x = (max(abs(pair[axis]) for pair in pairs) for axis in (0, 1))
    mode = "replicate" if border == "replicate" else "constant"
    padded = F.pad(masks, (pad_x, pad_x, pad_y, pad_y), mode=mode)
    out = torch.empty(batch, len(pairs), height, width, dtype=grad.dtype, device=grad.device)
    for tap, (dy, dx) in enumerate(pairs):  # one by one: all neighbours at once are T times the masks
        neighbour = padded[..., pad_y + dy : pad_y + dy + height, pad_x + dx : pad_x + dx + width]
        out[:, tap] = (grad * neighbour).sum(dim=1)
    return out


@_correlation.register_fake
def _(grad, masks, offsets, border, class_mask):
    batch, _, height, width = grad.shape
    return torch.empty((batch, offsets.shape[0], height, width), dtype=grad.dtype, device=grad.device)


# --- registration ---

_diffuse.register_autograd(_backward, setup_context=_save)


def _samples(draw: Draw) -> list[Sample]:
    tensors = {"weights": draw(2, 6, 11, 19), "masks": draw(2, 5, 11, 19)}
    taps = [(0, 0), (1, -2), (-3, 1), (0, 5), (40, -1), (-1, -40)]
    many = {"offsets": taps, "num_iter": 3}
    one = {"offsets": taps, "num_iter": 1, "border": "zero", "class_mask": draw(2, 5) > 0.3}
    return [Sample(diffuse, tensors, options, ("weights", "masks")) for options in (many, one)]


backends.register("diffuse", _samples)
