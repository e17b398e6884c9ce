"""Affinity from attention: which pixels of a window belong together, and the loss that teaches it.

    S_h,ij = q_h,i . k_h,j                                   raw attention scores of every head, unscaled
    A_ij   = sigmoid(sum_h w_h (S_h,ij + S_h,ji) + bias)     for |dy| <= r and |dx| <= r     (AFA, Eq. 5)
    L      = 1/2 sum_{y=1} (1 - A) / (N+ + 1) + 1/2 sum_{y=0} A / (N- + 1)                   (AFA, Eq. 6)

Folding w_h into the queries makes the sum over heads one dot product of length heads * d for each ordered
pair: a banded matrix product, whose result is kept as an image with one channel for each tap, [B, (2r+1)^2,
h, w]. Taps run row-major over (dy, dx) from (-r, -r); a tap that points outside the image holds 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends, affinity_reference
from ._checks import FLOATS, check_int, check_same_device, check_tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# --- checks -------------------------------------------------------------------------------------------------


def _check_head(head_weight: Tensor, head_bias: Tensor, scores: Tensor, name: str) -> tuple[Tensor, Tensor]:
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


def _check_query_key(query: Tensor, key: Tensor, height: int, width: int) -> None:
    check_tensor(query, "query", ("B", "heads", "N", "d"))
    batch, heads, count, depth = query.shape
    check_tensor(key, "key", ("B", "heads", "N", "d"), (query.dtype,), B=batch, heads=heads, N=count, d=depth)
    check_same_device(query, "query", key=key)
    if count != height * width:
        raise ValueError(
            f"query must have N = height * width = {height} * {width} = {height * width}, got {count}"
        )


def _check_grid(height: int, width: int, radius: int) -> tuple[int, int, int]:
    return check_int(height, "height", 1), check_int(width, "width", 1), check_int(radius, "radius", 0)


def check_window(affinity: Tensor, radius: int) -> None:
    """``affinity`` is a window [B, (2r+1)^2, h, w] of this radius."""
    taps = (2 * radius + 1) ** 2
    check_tensor(affinity, "affinity", ("B", "taps", "h", "w"))
    if affinity.shape[1] != taps:
        raise ValueError(f"affinity must have {taps} channels, (2 * radius + 1)^2, got {affinity.shape[1]}")


@torch.library.custom_op("afa::pair_labels", mutates_args=())
def _pair_labels(labels: Tensor, ignore_index: int) -> Tensor:
    ignored = labels == ignore_index
    wrong = ((labels < 0) | (labels > 255)) & ~ignored
    if labels.device.type == "cpu":
        if wrong.any():
            found = labels[wrong][0].item()
            raise ValueError(f"labels must be in 0..255 or ignore_index = {ignore_index}, got {found}")
    else:
        # Reading the answer would make the host wait, which a training step must not and a CUDA graph cannot.
        torch._assert_async(~wrong.any(), "labels must be in 0..255 or ignore_index")
    return torch.where(ignored, -1, labels.to(torch.int32)).contiguous()


@_pair_labels.register_fake
def _(labels, ignore_index):
    return torch.empty(labels.shape, dtype=torch.int32, device=labels.device)


def check_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels as the kernels take them: int32, contiguous, ignored ones -1."""
    return _pair_labels(labels, check_int(ignore_index, "ignore_index", -(1 << 31), (1 << 31) - 1))


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
    """
    height, width, radius = _check_grid(height, width, radius)
    _check_query_key(query, key, height, width)
    head_weight, head_bias = _check_head(head_weight, head_bias, query, "query")
    _backends.choose("window_affinity", backend, query, key)
    with torch.autocast(query.device.type, enabled=False):
        return affinity_reference.window_affinity(query, key, head_weight, head_bias, height, width, radius)


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
    """
    height, width, radius = _check_grid(height, width, radius)
    check_tensor(maps, "maps", ("B", "heads", "N", "N"))
    for axis in (2, 3):
        if maps.shape[axis] != height * width:
            raise ValueError(
                f"maps must be [B, heads, N, N] with N = {height} * {width}, got {tuple(maps.shape)}"
            )
    head_weight, head_bias = _check_head(head_weight, head_bias, maps, "maps")
    _backends.choose("affinity_from_maps", backend, maps)
    with torch.autocast(maps.device.type, enabled=False):
        return affinity_reference.affinity_from_maps(maps, head_weight, head_bias, height, width, radius)


def affinity_loss(
    affinity: Tensor, labels: Tensor, radius: int, ignore_index: int = 255, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The affinity loss of a window: same labels pull together, different labels push apart (AFA, Eq. 6).

    Args:
        affinity: [B, (2 * radius + 1)^2, h, w] in 0..1, as from `window_affinity`; what a tap outside the
            image holds plays no part.
        labels: [B, h, w], integers in 0..255 or ignore_index, on the grid of the affinity. AFA samples them
            from the label at image size as ``F.interpolate(mode="nearest")`` does: ``labels[:, ::16, ::16]``
            for a grid of 1/16.
        radius: of the window, at least 0.
        ignore_index: pairs with this label at either pixel do not count.
        backend: as in `window_affinity`.

    Returns:
        (loss, pos_count, neg_count), scalars: the loss in float32 (float64 for float64), and the int64
        divisors N+ + 1 and N- + 1, the numbers of ordered pairs with the same and with different labels over
        the whole batch, plus one, each pixel's pair with itself included. With every label ignored the loss
        is 0 and gradients are 0.

    Raises:
        TypeError, ValueError: naming the argument that is wrong. On CUDA, labels out of range end in an
            assertion on the device instead.
    """
    radius = check_int(radius, "radius", 0)
    check_window(affinity, radius)
    batch, _, height, width = affinity.shape
    check_tensor(labels, "labels", ("B", "h", "w"), INTEGERS, B=batch, h=height, w=width)
    check_same_device(affinity, "affinity", labels=labels)
    labels = check_labels(labels, ignore_index)
    _backends.choose("affinity_loss", backend, affinity)
    return affinity_reference.affinity_loss(affinity, labels, radius)


def attention_affinity_loss(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    radius: int,
    ignore_index: int = 255,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affinity_loss` of `window_affinity`, fused: no affinity is kept, the backward computes it again.

    Args:
        query, key, head_weight, head_bias, radius: as in `window_affinity`; N = h * w.
        labels, ignore_index: as in `affinity_loss`.
        backend: as in `window_affinity`.

    Returns:
        (loss, pos_count, neg_count) as `affinity_loss`; differentiable in query, key, head_weight and
        head_bias.

    Raises:
        As `window_affinity` and `affinity_loss`.
    """
    radius = check_int(radius, "radius", 0)
    check_tensor(query, "query", ("B", "heads", "N", "d"))
    check_tensor(labels, "labels", ("B", "h", "w"), INTEGERS, B=query.shape[0])
    _check_query_key(query, key, labels.shape[1], labels.shape[2])
    check_same_device(query, "query", labels=labels)
    head_weight, head_bias = _check_head(head_weight, head_bias, query, "query")
    labels = check_labels(labels, ignore_index)
    _backends.choose("attention_affinity_loss", backend, query, key)
    with torch.autocast(query.device.type, enabled=False):
        return affinity_reference.attention_affinity_loss(query, key, head_weight, head_bias, labels, radius)


def window_to_dense(affinity: Tensor, radius: int) -> Tensor:
    """[B, (2 * radius + 1)^2, h, w] -> [B, N, N] with N = h * w: A_ij of every pair, 0 outside the window."""
    radius = check_int(radius, "radius", 0)
    check_window(affinity, radius)
    return affinity_reference.window_to_dense(affinity, radius)


def dense_to_window(dense: Tensor, height: int, width: int, radius: int) -> Tensor:
    """[B, N, N], N = height * width -> [B, (2 * radius + 1)^2, height, width], 0 for taps that leave it."""
    height, width, radius = _check_grid(height, width, radius)
    check_tensor(dense, "dense", ("B", "N", "N"))
    if tuple(dense.shape[1:]) != (height * width,) * 2:
        raise ValueError(f"dense must be [B, N, N] with N = {height} * {width}, got {tuple(dense.shape)}")
    return affinity_reference.dense_to_window(dense, height, width, radius)


# --- registration -------------------------------------------------------------------------------------------

for _operator in ("window_affinity", "affinity_from_maps", "affinity_loss", "attention_affinity_loss"):
    _backends.register(_operator)
