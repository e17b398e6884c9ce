"""Affinity from attention: the loss with its gradients, as a training step calls it, and the window on its own.

"dense" is the published way: 16 score maps of N x N (of a ViT-B 24), their transposes added, projected, compared with
int64 label matrices, the window a mask made beforehand (`published`). "reference" is the oracle of the tests: the same
maps, boolean labels; for the window it is the dense way, with one gather at the end.
At N = 9216 the maps alone are 5.4 GB, and a backward pass holds several times that. There the first provider, "by
rows", is dense arithmetic for eight lines of pixels at a time against the lines in their reach.
"native, recomputed" keeps nothing of the scores for the backward: what keeping them is worth.

Peaks are over the inputs (``harness.peak_memory``); the gradients of query and key, as large as these, are in them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import afa_kernels

from ...ops.affinity.reference import dense_affinity, window_mask
from ..harness import Case, compiled, kernels
from ..published import IGNORE, affinity_loss

HEADS, DEPTH, RADIUS = 16, 64, 8  # two blocks of MiT-B1
# (batch, grid): crop 320 and crop 512 of training, 48x48 of multi-scale inference, a photograph of 1536 pixels.
SHAPES = [(2, 20), (2, 32), (1, 48)]
LARGE = (1, 96)
VIT, VIT_HEADS = (2, 28), 24  # two blocks of ViT-B/16, of 12 heads each, at a crop of 448
Results = tuple[Tensor, ...]


def pairs(side: int) -> int:
    """Ordered pairs of pixels of a square grid within each other's window."""
    line = sum(min(at + RADIUS, side - 1) - max(at - RADIUS, 0) + 1 for at in range(side))
    return line * line


def make_inputs(
    batch: int, side: int, device: str, dtype: torch.dtype, heads: int = HEADS
) -> tuple[list[Tensor], Tensor]:
    """-> [query, key, head weight, head bias]; labels [B, h, w] int64 in patches of 4 x 4, some of them ignored.

    Pixels with the same label are alike, so that the sums over both kinds of pairs do not cancel in the gradients.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(6, (batch, side // 4, side // 4), generator=generator)
    labels = torch.tensor([0, 0, 0, 7, 15, IGNORE])[drawn].repeat_interleave(4, 1).repeat_interleave(4, 2)
    common = 0.3 * torch.randn(IGNORE + 1, heads, DEPTH, generator=generator)[labels.flatten(1)].transpose(1, 2)
    query, key = (torch.randn(common.shape, generator=generator) + common for _ in range(2))
    weight, bias = 0.03 * torch.rand(heads, generator=generator), torch.full((1,), -0.5)
    moved = [tensor.to(device, dtype) for tensor in (query, key)] + [tensor.to(device) for tensor in (weight, bias)]
    return moved, labels.to(device)


# --- providers ---


def with_gradients(loss: Callable[..., Results], inputs: list[Tensor], *arguments: object) -> Results:
    """-> loss, and its gradients in query, key, head weight and head bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = loss(*leaves, *arguments)[0]
    return (value.detach(), *torch.autograd.grad(value, leaves))


def dense_loss(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, window: Tensor) -> Results:
    return affinity_loss(dense_affinity(query @ key.transpose(2, 3), weight, bias), labels, window)


def row_blocks(labels: Tensor, lines: int) -> list[tuple[slice, slice, Tensor, Tensor]]:
    """Some lines of pixels, those in their reach, and which pairs have the same and which different labels."""
    side, own, blocks = labels.shape[1], labels.flatten(1), []
    # The window of the lines in the middle of a strip is that of lines anywhere, cut where the grid ends.
    near = window_mask(lines + 2 * RADIUS, side, RADIUS, labels.device)[RADIUS * side : (RADIUS + lines) * side]
    for y in range(0, side, lines):
        top, bottom = max(y - RADIUS, 0), min(y + lines + RADIUS, side)
        rows, columns = slice(y * side, (y + lines) * side), slice(top * side, bottom * side)
        start = (top - (y - RADIUS)) * side
        inside = near[:, start : start + (bottom - top) * side]
        counted = inside & (own[:, rows, None] != IGNORE) & (own[:, None, columns] != IGNORE)
        same = counted & (own[:, rows, None] == own[:, None, columns])
        blocks.append((rows, columns, same, counted & ~same))
    return blocks


def loss_by_rows(inputs: list[Tensor], labels: Tensor, lines: int = 8) -> Results:
    """`with_gradients` of the loss, some lines of pixels at a time; the side of the grid is a multiple of lines."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    query, key, weight, bias = leaves
    blocks = row_blocks(labels, lines)
    pos_count, neg_count = (1 + sum(block[place].sum() for block in blocks) for place in (2, 3))
    total, sums = torch.zeros((), device=labels.device), [torch.zeros_like(leaf) for leaf in leaves]
    for rows, columns, same, different in blocks:
        maps = query[:, :, rows] @ key[:, :, columns].transpose(2, 3)
        maps = maps + key[:, :, rows] @ query[:, :, columns].transpose(2, 3)
        affinity = torch.sigmoid(torch.conv2d(maps, weight.view(1, -1, 1, 1), bias)[:, 0])
        loss = 0.5 * (same * (1 - affinity)).sum() / pos_count + 0.5 * (different * affinity).sum() / neg_count
        for running, grad in zip(sums, torch.autograd.grad(loss, leaves)):
            running += grad
        total += loss.detach()
    return total, *sums


# --- cases ---


def loss_case(
    batch: int, side: int, device: str, dtype: torch.dtype, compiling: bool, heads: int = HEADS
) -> Case:
    inputs, labels = make_inputs(batch, side, device, dtype, heads)
    loss = partial(afa_kernels.attention_affinity_loss, radius=RADIUS)
    ways = {}
    if (batch, side) == LARGE:
        providers = {"by rows": partial(loss_by_rows, inputs, labels)}
    else:
        window = window_mask(side, side, RADIUS, torch.device(device))
        providers = {"dense": partial(with_gradients, dense_loss, inputs, labels, window)}
        ways["reference"] = partial(loss, backend="reference")
        if compiling:
            ways["torch.compile"] = compiled(ways["reference"])
    ways |= {name: partial(loss, backend=name) for name in kernels("attention_affinity_loss", device)}
    if "native" in ways:
        ways["native, recomputed"] = partial(ways["native"], recompute=True)
    providers |= {name: partial(with_gradients, way, inputs, labels) for name, way in ways.items()}
    return Case(
        title("loss and gradients", batch, side, dtype, heads),
        providers,
        # Queries and keys in, their gradients out.
        bytes=4.0 * batch * heads * side * side * DEPTH * dtype.itemsize,
        # One dot product over all heads for an ordered pair; a multiple of a key and of a query for its gradients.
        operations=3 * 2.0 * batch * pairs(side) * heads * DEPTH,
        dtype=dtype,
        # bfloat16: the dense way rounds every score before they are summed.
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
    )


def window_case(
    batch: int, side: int, device: str, dtype: torch.dtype, compiling: bool, heads: int = HEADS
) -> Case:
    inputs, _ = make_inputs(batch, side, device, dtype, heads)
    call = partial(afa_kernels.window_affinity, *inputs, side, side, RADIUS)
    providers = {"reference": partial(call, backend="reference")}
    if compiling:
        providers["torch.compile"] = compiled(providers["reference"])
    providers |= {name: partial(call, backend=name) for name in kernels("window_affinity", device)}
    taps = (2 * RADIUS + 1) ** 2
    return Case(
        title("window", batch, side, dtype, heads),
        providers,
        bytes=batch * side * side * (2.0 * heads * DEPTH + taps) * dtype.itemsize,
        operations=2.0 * batch * pairs(side) * heads * DEPTH,
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
    )


def title(what: str, batch: int, side: int, dtype: torch.dtype, heads: int) -> str:
    of = "" if heads == HEADS else f", {heads} heads"
    suffix = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    return f"{what}, N={side * side}, B={batch}{of}{suffix}"


def cases(device: str, quick: bool = False, compiling: bool = False) -> list[Case]:
    shapes = [(*shape, HEADS) for shape in SHAPES]
    shapes = shapes[:2] if quick else [*shapes, (*VIT, VIT_HEADS)]
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    both = [(*shape, dtype) for dtype in dtypes for shape in shapes]
    table = [loss_case(batch, side, device, dtype, compiling, heads) for batch, side, heads, dtype in both]
    if not quick:
        table.append(loss_case(*LARGE, device, torch.float32, compiling))
    return table + [window_case(batch, side, device, dtype, compiling, heads) for batch, side, heads, dtype in both]
