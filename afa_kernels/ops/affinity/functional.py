"""Affinity from attention: which pixels of a window belong together.

    S_h,ij = q_h,i . k_h,j                                   raw attention scores of every head, unscaled
    A_ij   = sigmoid(sum_h w_h (S_h,ij + S_h,ji) + bias)     for |dy| <= r and |dx| <= r     (AFA, Eq. 5)

Folding w_h into the queries makes the sum over heads one dot product of length heads * d for each ordered
pair: a banded matrix product, whose result is kept as an image with one channel for each tap, [B, (2r+1)^2,
h, w]. Taps run row-major over (dy, dx) from (-r, -r); a tap that points outside the image holds 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import backends, taps
from ...core.checks import FARTHEST, FLOATS, check_int, check_same_device, check_tensor, check_window
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference

# --- checks -------------------------------------------------------------------------------------------------


def check_head(head_weight: Tensor, head_bias: Tensor, scores: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The affinity head as [heads] and [1]; a 1x1 convolution's [1, heads, 1, 1] is taken too."""
    heads = scores.shape[1]
    if isinstance(head_weight, Tensor) and tuple(head_weight.shape) == (1, heads, 1, 1):
        head_weight = head_weight.reshape(heads)
    check_tensor(head_weight, "head_weight", ("heads",), FLOATS, heads=heads)
    if isinstance(head_bias, Tensor) and head_bias.dim() == 0:
        head_bias = head_bias.reshape(1)
    check_tensor(head_bias, "head_bias", (1,))
    check_same_device(scores, name, head_weight=head_weight, head_bias=head_bias)
    return head_weight, head_bias


def check_query_key(query: Tensor, key: Tensor, height: int, width: int) -> None:
    check_tensor(query, "query", ("B", "heads", "N", "d"))
    batch, heads, count, depth = query.shape
    if not isinstance(key, Tensor) or key.shape != query.shape or key.dtype != query.dtype:
        check_tensor(key, "key", ("B", "heads", "N", "d"), (query.dtype,), B=batch, heads=heads, N=count, d=depth)
    check_same_device(query, "query", key=key)
    if count != height * width:
        raise ValueError(
            f"query must have N = height * width = {height} * {width} = {height * width}, got {count}"
        )


def _check_grid(height: int, width: int, radius: int) -> tuple[int, int, int]:
    return check_int(height, "height", 1), check_int(width, "width", 1), check_int(radius, "radius", 0, FARTHEST)


def window_affinity(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    height: int,
    width: int,
    radius: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Affinity of every pixel to its window, from queries and keys, without attention maps (AFA, Eq. 5).

    Args:
        query, key: [B, heads, N, d] with N = height * width, unscaled; all blocks and heads that take part
            side by side. float32, float16 or bfloat16 (float64 in the reference path), any strides.
        head_weight: [heads] or [1, heads, 1, 1], the weight of each head's scores.
        head_bias: [1] or a scalar.
        height, width: the grid, any size, smaller than the window too.
        radius: of the square window, in pixels, at least 0.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None takes the best that can run.

    Returns:
        [B, (2 * radius + 1)^2, height, width] in 0..1, in the dtype of query; taps row-major in (dy, dx), 0
        where a tap points outside the image. Symmetric: tap o of pixel i is tap -o of pixel i + o. Sums are
        float32.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, or why the backend cannot run.

    Examples:
        >>> import torch
        >>> from afa_kernels import window_affinity
        >>> query, key = torch.randn(2, 1, 16, 20 * 20, 64)  # of 16 heads
        >>> window_affinity(query, key, torch.randn(16), torch.zeros(1), 20, 20, radius=8).shape
        torch.Size([1, 289, 20, 20])
    """
    height, width, radius = _check_grid(height, width, radius)
    check_query_key(query, key, height, width)
    head_weight, head_bias = check_head(head_weight, head_bias, query, "query")
    chosen = backends.choose("window_affinity", backend, query, key, learned=(head_weight, head_bias))
    inputs = query, key, head_weight, head_bias, height, width, radius
    if chosen == "reference":
        with no_autocast(query.device):
            return reference.window_affinity(*inputs)
    return _window_affinity(*inputs, chosen)


def affinity_from_maps(
    maps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    height: int,
    width: int,
    radius: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """As `window_affinity`, from score maps [B, heads, N, N] that exist already, unscaled, before softmax.

    For models whose attention gives out its maps; where queries and keys are at hand, `window_affinity` needs
    neither the memory nor most of the time. Other arguments, result and errors as there.

    Examples:
        >>> import torch
        >>> from afa_kernels import affinity_from_maps
        >>> maps = torch.randn(1, 16, 20 * 20, 20 * 20)
        >>> affinity_from_maps(maps, torch.randn(16), torch.zeros(1), 20, 20, radius=8).shape
        torch.Size([1, 289, 20, 20])
    """
    height, width, radius = _check_grid(height, width, radius)
    check_tensor(maps, "maps", ("B", "heads", "N", "N"))
    for axis in (2, 3):
        if maps.shape[axis] != height * width:
            raise ValueError(
                f"maps must be [B, heads, N, N] with N = {height} * {width}, got {tuple(maps.shape)}"
            )
    head_weight, head_bias = check_head(head_weight, head_bias, maps, "maps")
    chosen = backends.choose("affinity_from_maps", backend, maps, learned=(head_weight, head_bias))
    inputs = maps, head_weight, head_bias, height, width, radius
    if chosen == "reference":
        with no_autocast(maps.device):
            return reference.affinity_from_maps(*inputs)
    return _affinity_from_maps(*inputs, chosen)


def window_to_dense(affinity: Tensor, radius: int) -> Tensor:
    """[B, (2 * radius + 1)^2, h, w] -> [B, N, N] with N = h * w: A_ij of every pair, 0 outside the window.

    Examples:
        >>> import torch
        >>> from afa_kernels import window_to_dense
        >>> window_to_dense(torch.rand(1, 25, 8, 10), radius=2).shape
        torch.Size([1, 80, 80])
    """
    radius = check_int(radius, "radius", 0, FARTHEST)
    check_window(affinity, radius)
    return taps.window_to_dense(affinity, radius)


def dense_to_window(dense: Tensor, height: int, width: int, radius: int) -> Tensor:
    """[B, N, N], N = height * width -> [B, (2 * radius + 1)^2, height, width], 0 for taps that leave it.

    Examples:
        >>> import torch
        >>> from afa_kernels import dense_to_window
        >>> dense_to_window(torch.rand(1, 80, 80), height=8, width=10, radius=2).shape
        torch.Size([1, 25, 8, 10])
    """
    height, width, radius = _check_grid(height, width, radius)
    check_tensor(dense, "dense", ("B", "N", "N"))
    if tuple(dense.shape[1:]) != (height * width,) * 2:
        raise ValueError(f"dense must be [B, N, N] with N = {height} * {width}, got {tuple(dense.shape)}")
    return taps.dense_to_window(dense, height, width, radius)


# --- forward ----------------------------------------------------------------------------------------------


@operator("window_affinity")
def _window_affinity(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    height: int,
    width: int,
    radius: int,
    backend: str,
) -> Tensor:
    kernels = implementation(__package__, backend)
    return kernels.window_affinity(query, key, head_weight, head_bias, height, width, radius)


@_window_affinity.register_fake
def _(query, key, head_weight, head_bias, height, width, radius, backend):
    return query.new_empty(query.shape[0], (2 * radius + 1) ** 2, height, width)


@operator("affinity_from_maps")
def _affinity_from_maps(
    maps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    height: int,
    width: int,
    radius: int,
    backend: str,
) -> Tensor:
    return implementation(__package__, backend).affinity_from_maps(maps, head_weight, head_bias, height, width, radius)


@_affinity_from_maps.register_fake
def _(maps, head_weight, head_bias, height, width, radius, backend):
    return maps.new_empty(maps.shape[0], (2 * radius + 1) ** 2, height, width)


# --- backward ---------------------------------------------------------------------------------------------
# One operator for each, so that compiled graphs hold a single node. Gradients nobody wants come back empty. The scores
# are computed again: a window that was rounded to half precision, where it is 1, no longer tells its slope. (The fused
# loss of `losses` has no window, and may keep the slopes themselves.)


def fake_gradients(wanted: list[bool], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of the inputs before the head as wanted, of the head always."""
    flags = [*wanted, True, True]
    return tuple(torch.empty_like(t) if keep else t.new_empty(0) for t, keep in zip(inputs, flags))


def gradients(ctx, grads: tuple[Tensor, ...], arguments: int) -> tuple[Tensor | None, ...]:
    kept = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
    return (*kept, *[None] * (arguments - len(kept)))


@operator("window_affinity_backward")
def _window_affinity_gradients(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = implementation(__package__, backend)
    return kernels.window_affinity_backward(query, key, head_weight, head_bias, grad, radius, wanted)


@_window_affinity_gradients.register_fake
def _(query, key, head_weight, head_bias, grad, radius, wanted, backend):
    return fake_gradients(wanted, query, key, head_weight, head_bias)


def _save_window(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-4])
    ctx.options = inputs[-2:]


def _window_affinity_backward(ctx, grad):
    radius, backend = ctx.options
    wanted = list(ctx.needs_input_grad[:2])
    grads = _window_affinity_gradients(*ctx.saved_tensors, grad, radius, wanted, backend)
    return gradients(ctx, grads, 8)


@operator("affinity_from_maps_backward")
def _affinity_from_maps_gradients(
    maps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    grad: Tensor,
    radius: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = implementation(__package__, backend)
    return kernels.affinity_from_maps_backward(maps, head_weight, head_bias, grad, radius, wanted)


@_affinity_from_maps_gradients.register_fake
def _(maps, head_weight, head_bias, grad, radius, wanted, backend):
    return fake_gradients(wanted, maps, head_weight, head_bias)


def _affinity_from_maps_backward(ctx, grad):
    radius, backend = ctx.options
    wanted = list(ctx.needs_input_grad[:1])
    grads = _affinity_from_maps_gradients(*ctx.saved_tensors, grad, radius, wanted, backend)
    return gradients(ctx, grads, 7)


# --- registration -----------------------------------------------------------------------------------------

_window_affinity.register_autograd(_window_affinity_backward, setup_context=_save_window)
_affinity_from_maps.register_autograd(_affinity_from_maps_backward, setup_context=_save_window)


HEAD = ("head_weight", "head_bias")


def sample_attention(draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Queries and keys of a grid of 9 x 10, which is 2 x 2 tiles of the kernels, 72 channels in two parts, and a head.

    Scores grow from the first pixel to the last: the loss's gradients of equal ones cancel.
    """
    growing = torch.linspace(0, 6, 90, dtype=torch.float32, device="cpu")[:, None]
    query, key = growing * (draw(2, 2, 90, 72) - 0.5), draw(2, 2, 90, 72) - 0.5
    return {"query": query, "key": key}, {"head_weight": draw(2) - 0.5, "head_bias": draw(1)}


def _window_samples(draw: Draw) -> list[Sample]:
    tensors, head = sample_attention(draw)
    grid = {"height": 9, "width": 10, "radius": 4}
    return [Sample(window_affinity, tensors, {**head, **grid}, (*tensors, *HEAD))]


def _maps_samples(draw: Draw) -> list[Sample]:
    tensors, head = {"maps": draw(2, 2, 90, 90) - 0.5}, {"head_weight": draw(2), "head_bias": draw(1)}
    grid = {"height": 9, "width": 10, "radius": 4}
    return [Sample(affinity_from_maps, tensors, {**head, **grid}, (*tensors, *HEAD))]


backends.register("window_affinity", _window_samples)
backends.register("affinity_from_maps", _maps_samples)
