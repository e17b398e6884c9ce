"""The affinity loss: neighbours with the same label pull together, with different labels push apart.

    L = 1/2 sum_{y=1} (1 - A) / (N+ + 1) + 1/2 sum_{y=0} A / (N- + 1)        (AFA, Eq. 6)

y_ij says whether the labels of i and j agree; it is missing where either is ignored, and outside the window.
Either over a window that exists, or fused with `window_affinity`, which then never does: for the backward the kernels
keep dA/dz of each pair that was met, or nothing, and then compute the scores a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import backends, native_module
from ...core.checks import FARTHEST, INTEGERS, check_int, check_same_device, check_tensor, check_window
from ...core.implementations import implementation
from ...core.registration import operator
from ...core.self_check import Draw, Sample
from ...core.transforms import no_autocast
from . import reference
from .functional import HEAD, check_head, check_query_key, fake_gradients, gradients, sample_attention

# --- checks -----------------------------------------------------------------------------------------------


@operator("pair_labels")
def _pair_labels(labels: Tensor, ignore_index: int) -> Tensor:
    labels = labels.to(torch.int64)  # as uint8 -1 would be 255, as int8 255 would be -1
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
    """Labels as most backends take them: int32, contiguous, ignored ones -1."""
    return _pair_labels(labels, ignore_index)


def _labels_for(backend: str, tensor: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, int]:
    """Labels and which of them are ignored, as a backend takes them: the CUDA kernels do themselves what `check_labels`
    needs a dozen launches for.
    """
    if backend == "native" and native_module.on_cuda(tensor):
        return labels, ignore_index
    return check_labels(labels, ignore_index), -1


def _check_ignore_index(ignore_index: int) -> int:
    return check_int(ignore_index, "ignore_index", -(1 << 31), (1 << 31) - 1)


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

    Examples:
        >>> import torch
        >>> from afa_kernels import affinity_loss
        >>> affinity = torch.full((1, 9, 2, 2), 0.5, requires_grad=True)
        >>> loss, same, different = affinity_loss(affinity, torch.tensor([[[0, 0], [7, 7]]]), radius=1)
        >>> round(loss.item(), 4), same.item(), different.item()
        (0.4444, 9, 9)
        >>> loss.backward()
    """
    radius = check_int(radius, "radius", 0, FARTHEST)
    check_window(affinity, radius)
    batch, _, height, width = affinity.shape
    check_tensor(labels, "labels", ("B", "h", "w"), INTEGERS, B=batch, h=height, w=width)
    check_same_device(affinity, "affinity", labels=labels)
    ignore_index = _check_ignore_index(ignore_index)
    chosen = backends.choose("affinity_loss", backend, affinity)
    labels, ignored = _labels_for(chosen, affinity, labels, ignore_index)
    if chosen == "reference":
        return reference.affinity_loss(affinity, labels, radius)
    return _affinity_loss(affinity, labels, radius, ignored, chosen)


def attention_affinity_loss(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    radius: int,
    ignore_index: int = 255,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affinity_loss` of `window_affinity`, fused: there is no affinity in memory, and no score map.

    Args:
        query, key, head_weight, head_bias, radius: as in `window_affinity`; N = h * w.
        labels, ignore_index: as in `affinity_loss`.
        recompute: whether the backward computes the scores a second time. By default the native kernels keep from the
            forward to the backward what it needs of them, the derivatives dA/dz, wherever gradients are enabled and one
            of the inputs requires one. On a GPU that is 8 KB for each pair of tiles of 8 x 8 pixels in the band, 16 KB
            with float32 queries: at radius 8 a grid of 32 x 32 has 58 such pairs, and 8 of them keep 3.8 MB in half
            precision, 7.6 MB in float32. On the CPU it is 4 (r + 1) (2r + 1) bytes for each pixel, 5.0 MB of the same.
            Where the window is so wide that it would be more than 1024 numbers a pixel and than twice those of its
            queries and keys, nothing is kept either way. True is for those who want that memory rather than the time.
            Triton and the reference do as they do either way.
        backend: as in `window_affinity`.

    Returns:
        (loss, pos_count, neg_count) as `affinity_loss`; differentiable in query, key, head_weight and
        head_bias.

    Raises:
        As `window_affinity` and `affinity_loss`.

    Examples:
        >>> import torch
        >>> from afa_kernels import attention_affinity_loss
        >>> query, key = torch.randn(1, 16, 400, 64, requires_grad=True), torch.randn(1, 16, 400, 64)
        >>> labels = torch.randint(21, (1, 20, 20))
        >>> loss, same, different = attention_affinity_loss(query, key, torch.randn(16), torch.zeros(1), labels, 8)
        >>> loss.backward()
        >>> query.grad.shape
        torch.Size([1, 16, 400, 64])
    """
    radius = check_int(radius, "radius", 0, FARTHEST)
    if not isinstance(query, Tensor) or query.dim() != 4:
        check_tensor(query, "query", ("B", "heads", "N", "d"))
    check_tensor(labels, "labels", ("B", "h", "w"), INTEGERS, B=query.shape[0])
    check_query_key(query, key, labels.shape[1], labels.shape[2])
    check_same_device(query, "query", labels=labels)
    head_weight, head_bias = check_head(head_weight, head_bias, query, "query")
    ignore_index = _check_ignore_index(ignore_index)
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute must be True or False, got {recompute!r}")
    chosen = backends.choose("attention_affinity_loss", backend, query, key, learned=(head_weight, head_bias))
    labels, ignored = _labels_for(chosen, query, labels, ignore_index)
    inputs = query, key, head_weight, head_bias, labels, radius
    if chosen == "reference":
        with no_autocast(query.device):
            return reference.attention_affinity_loss(*inputs)
    learns = query.requires_grad or key.requires_grad or head_weight.requires_grad or head_bias.requires_grad
    keep = not recompute and learns and torch.is_grad_enabled()
    loss, pos_count, neg_count, _ = _attention_affinity_loss(*inputs, ignored, keep, chosen)
    return loss, pos_count, neg_count


# --- forward ----------------------------------------------------------------------------------------------


def _fake_loss(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = [tensor.new_empty((), dtype=torch.int64) for _ in range(2)]
    return tensor.new_empty((), dtype=torch.float32), *counts


@operator("affinity_loss")
def _affinity_loss(
    affinity: Tensor, labels: Tensor, radius: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(__package__, backend).affinity_loss(affinity, labels, radius, ignore_index)


@_affinity_loss.register_fake
def _(affinity, labels, radius, ignore_index, backend):
    return _fake_loss(affinity)


@operator("attention_affinity_loss")
def _attention_affinity_loss(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    radius: int,
    ignore_index: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the counts, and what the backward needs of the scores; that is empty if it is not to be kept, or if the
    backend keeps nothing.
    """
    kernels = implementation(__package__, backend)
    kept = kernels.empty_derivatives(query, labels, radius, keep)
    inputs = query, key, head_weight, head_bias, labels, radius, ignore_index
    return *kernels.attention_affinity_loss(*inputs, kept), kept


@_attention_affinity_loss.register_fake
def _(query, key, head_weight, head_bias, labels, radius, ignore_index, keep, backend):
    kept = implementation(__package__, backend).empty_derivatives(query, labels, radius, keep)
    return *_fake_loss(query), kept


# --- backward ---------------------------------------------------------------------------------------------


@operator("affinity_loss_backward")
def _affinity_loss_gradient(
    affinity: Tensor,
    labels: Tensor,
    grad: Tensor,
    pos_count: Tensor,
    neg_count: Tensor,
    radius: int,
    ignore_index: int,
    backend: str,
) -> Tensor:
    kernels = implementation(__package__, backend)
    return kernels.affinity_loss_backward(affinity, labels, grad, pos_count, neg_count, radius, ignore_index)


@_affinity_loss_gradient.register_fake
def _(affinity, labels, grad, pos_count, neg_count, radius, ignore_index, backend):
    return torch.empty_like(affinity)


def _save_loss(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-3], *output[1:])
    ctx.options = inputs[-3:]
    ctx.set_materialize_grads(False)  # zeros for the counts would be two launches


def _affinity_loss_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    affinity, labels, *counts = ctx.saved_tensors
    return _affinity_loss_gradient(affinity, labels, grad, *counts, *ctx.options), *[None] * 4


@operator("attention_affinity_loss_backward")
def _attention_affinity_loss_gradients(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    grad: Tensor,
    pos_count: Tensor,
    neg_count: Tensor,
    kept: Tensor,
    radius: int,
    ignore_index: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = query, key, head_weight, head_bias, labels, grad, pos_count, neg_count, kept, radius, ignore_index, wanted
    return implementation(__package__, backend).attention_affinity_loss_backward(*inputs)


@_attention_affinity_loss_gradients.register_fake
def _(query, key, head_weight, head_bias, labels, grad, pos, neg, kept, radius, ignore_index, wanted, backend):
    return fake_gradients(wanted, query, key, head_weight, head_bias)


def _save_attention_loss(ctx, inputs, output):
    *tensors, radius, ignore_index, _, backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = radius, ignore_index, backend
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _attention_affinity_loss_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    *inputs, pos_count, neg_count, kept = ctx.saved_tensors
    *options, backend = ctx.options
    wanted = list(ctx.needs_input_grad[:2])
    grads = _attention_affinity_loss_gradients(*inputs, grad, pos_count, neg_count, kept, *options, wanted, backend)
    return gradients(ctx, grads, 9)


# --- registration -----------------------------------------------------------------------------------------

_affinity_loss.register_autograd(_affinity_loss_backward, setup_context=_save_loss)
_attention_affinity_loss.register_autograd(_attention_affinity_loss_backward, setup_context=_save_attention_loss)


def _labels(draw: Draw) -> Tensor:
    """[2, 9, 10]: class 0 above, 1 and 2 mixed below, some ignored."""
    classes = 1 + (2 * draw(2, 9, 10)).long()
    classes[:, :4] = 0
    return torch.where(draw(2, 9, 10) > 0.9, 255, classes)


def _loss_samples(draw: Draw) -> list[Sample]:
    tensors, options = {"affinity": draw(2, 81, 9, 10)}, {"labels": _labels(draw), "radius": 4}
    return [Sample(affinity_loss, tensors, options, ("affinity",))]


def _attention_samples(draw: Draw) -> list[Sample]:
    tensors, head = sample_attention(draw)
    options = {**head, "labels": _labels(draw), "radius": 4}
    return [
        Sample(attention_affinity_loss, tensors, {**options, "recompute": recompute}, (*tensors, *HEAD))
        for recompute in (False, True)
    ]


backends.register("affinity_loss", _loss_samples)
backends.register("attention_affinity_loss", _attention_samples)
