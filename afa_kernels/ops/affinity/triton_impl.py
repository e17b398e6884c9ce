"""Affinity from attention in Triton: the ``triton`` backend of `functional` and `losses`.

Grids, scratch memory and launches of `triton_kernels`. Sums of programs are added in a fixed order: the same
bits every run.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...core.triton_launch import interpreted, on_device
from .triton_kernels import (
    LOSS,
    SCORE_GRADIENT,
    SIDE,
    WINDOW,
    WINDOW_GRADIENT,
    _maps_product,
    _pairs,
    _product,
    _window_loss,
)

WARPS = 8  # to a program: with 4, the 64 x 64 scores in flight take more registers than a thread has


class _Grid:
    """Tiles, their neighbours below or to the right, and how much scratch they need."""

    def __init__(self, batch: int, height: int, width: int, radius: int, device: torch.device):
        self.batch, self.height, self.width, self.device = batch, height, width, device
        self.radius = radius
        # A window larger than the image reaches no further tile.
        self.reach = triton.cdiv(min(radius, max(height, width)), SIDE)
        self.tiles_y, self.tiles_x = triton.cdiv(height, SIDE), triton.cdiv(width, SIDE)
        self.tiles = self.tiles_y * self.tiles_x
        self.neighbours = ((2 * self.reach + 1) ** 2 + 1) // 2
        self.programs = batch * self.tiles * self.neighbours

    def sums(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(self.programs, count, dtype=dtype, device=self.device)

    def pair_gradients(self) -> Tensor:
        return torch.empty(self.programs, SIDE**2, SIDE**2, dtype=torch.float32, device=self.device)


def _channels(depth: int, dtype: torch.dtype) -> int:
    """Of one head at a time; four tiles of them, times the stages of the pipeline, share a block's memory."""
    return max(16, min(64 if dtype.itemsize == 2 else 32, triton.next_power_of_2(depth)))


def _head(head_weight: Tensor, head_bias: Tensor) -> Tensor:
    return torch.cat([head_weight.float(), head_bias.float()])


def _run_pairs(grid: _Grid, goal: int, *, query=None, key=None, maps=None, head=None, labels=None, grad_window=None,
               slopes=None, out=None, partial=None, counts=None) -> None:  # fmt: skip
    """`_pairs` over the whole grid; tensors that a goal does not use stay None."""
    some = query if maps is None else maps
    depth = 1 if query is None else query.shape[3]

    def strides(tensor: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0, 0) if tensor is None else tensor.stride()

    def given(tensor: Tensor | None) -> Tensor:
        return some if tensor is None else tensor

    _pairs[(grid.tiles, grid.neighbours, grid.batch)](
        *map(given, (query, key, maps, head, labels, grad_window, slopes, out, partial, counts)),
        grid.height, grid.width, grid.radius, grid.tiles_y, grid.tiles_x,
        *strides(query), *strides(key), *strides(maps), *strides(grad_window),
        HEADS=some.shape[1], DEPTH=depth, REACH=grid.reach, SIDE=SIDE, CHANNELS=_channels(depth, some.dtype),
        FROM_MAPS=maps is not None, GOAL=goal, WIDE=interpreted(), num_warps=WARPS,
    )  # fmt: skip


def _window(grid: _Grid, like: Tensor, **sources: Tensor) -> Tensor:
    shape = (grid.batch, (2 * grid.radius + 1) ** 2, grid.height, grid.width)
    # The interpreter would truncate to bfloat16 rather than round.
    out = torch.zeros(shape, dtype=torch.float32 if interpreted() else like.dtype, device=like.device)
    _run_pairs(grid, WINDOW.value, out=out, **sources)
    return out.to(like.dtype)


@on_device
def window_affinity(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    grid = _Grid(query.shape[0], height, width, radius, query.device)
    return _window(grid, query, query=query, key=key, head=_head(head_weight, head_bias))


@on_device
def affinity_from_maps(
    maps: Tensor, head_weight: Tensor, head_bias: Tensor, height: int, width: int, radius: int
) -> Tensor:
    grid = _Grid(maps.shape[0], height, width, radius, maps.device)
    return _window(grid, maps, maps=maps, head=_head(head_weight, head_bias))


def _loss(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    same, different = partial.double().sum(0).unbind()
    pos_count, neg_count = (counts.sum(0) + 1).unbind()
    loss = 0.5 * same / pos_count + 0.5 * different / neg_count
    return loss.float(), pos_count.clone(), neg_count.clone()


def empty_derivatives(query: Tensor, labels: Tensor, radius: int, keep: bool) -> Tensor:
    """Nothing is kept: the backward computes the scores again."""
    return torch.empty(0, dtype=torch.float32, device=query.device)


@on_device
def attention_affinity_loss(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, labels: Tensor, radius: int, ignore_index: int,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grid = _Grid(query.shape[0], labels.shape[1], labels.shape[2], radius, query.device)
    partial, counts = grid.sums(2), grid.sums(2, torch.int32)
    head = _head(head_weight, head_bias)
    _run_pairs(grid, LOSS.value, query=query, key=key, head=head, labels=labels, partial=partial, counts=counts)
    return _loss(partial, counts)


def _slopes(grad: Tensor, pos_count: Tensor, neg_count: Tensor) -> Tensor:
    return torch.stack([-0.5 * grad / pos_count, 0.5 * grad / neg_count]).float()


def _rounded(out: Tensor, like: Tensor) -> Tensor:
    return out if out.dtype == like.dtype else out.to(like.dtype)


def _products(
    grid: _Grid, gradient: Tensor, partial: Tensor, query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and head from those of the scores."""
    heads, depth = query.shape[1], query.shape[3]
    channels = _channels(depth, query.dtype)
    blocks = triton.cdiv(depth, channels)
    head = _head(head_weight, head_bias)
    dots = torch.empty(grid.batch * grid.tiles, heads, blocks, dtype=torch.float32, device=query.device)
    results = []
    for values, own, keep, first in ((key, query, wanted[0], True), (query, key, wanted[1], False)):
        dtype = torch.float32 if interpreted() else own.dtype
        out = torch.empty_like(own, dtype=dtype) if keep else own.new_empty(0)
        results.append(_rounded(out, own))
        if not (keep or first):
            continue
        _product[(grid.tiles, heads * blocks, grid.batch)](
            gradient, values, own, head, out, dots,
            grid.height, grid.width, grid.tiles_y, grid.tiles_x, depth,
            *values.stride(), *own.stride(), *(out.stride() if keep else (0, 0, 0, 0)),
            REACH=grid.reach, SIDE=SIDE, CHANNELS=channels, HALF=query.dtype != torch.float32, DOT=first, WRITE=keep,
            WIDE=interpreted(), num_warps=WARPS,
        )  # fmt: skip
        results[-1] = _rounded(out, own)
    grad_weight = dots.double().sum((0, 2)).to(head_weight.dtype)
    grad_bias = (0.5 * partial[:, :1].double().sum(0)).to(head_bias.dtype)
    return *results, grad_weight, grad_bias


@on_device
def attention_affinity_loss_backward(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, labels: Tensor, grad: Tensor,
    pos_count: Tensor, neg_count: Tensor, kept: Tensor, radius: int, ignore_index: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grid = _Grid(query.shape[0], labels.shape[1], labels.shape[2], radius, query.device)
    pairs, partial = grid.pair_gradients(), grid.sums(2)
    slopes, head = _slopes(grad, pos_count, neg_count), _head(head_weight, head_bias)
    sources = {"query": query, "key": key, "head": head, "labels": labels, "slopes": slopes}
    _run_pairs(grid, SCORE_GRADIENT.value, out=pairs, partial=partial, **sources)
    return _products(grid, pairs, partial, query, key, head_weight, head_bias, wanted)


@on_device
def window_affinity_backward(
    query: Tensor, key: Tensor, head_weight: Tensor, head_bias: Tensor, grad: Tensor, radius: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grid = _Grid(query.shape[0], grad.shape[2], grad.shape[3], radius, query.device)
    pairs, partial = grid.pair_gradients(), grid.sums(2)
    sources = {"query": query, "key": key, "head": _head(head_weight, head_bias)}
    _run_pairs(grid, WINDOW_GRADIENT.value, grad_window=grad, out=pairs, partial=partial, **sources)
    return _products(grid, pairs, partial, query, key, head_weight, head_bias, wanted)


@on_device
def affinity_from_maps_backward(
    maps: Tensor, head_weight: Tensor, head_bias: Tensor, grad: Tensor, radius: int, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grid = _Grid(maps.shape[0], grad.shape[2], grad.shape[3], radius, maps.device)
    pairs, partial, head = grid.pair_gradients(), grid.sums(2), _head(head_weight, head_bias)
    _run_pairs(grid, WINDOW_GRADIENT.value, maps=maps, head=head, grad_window=grad, out=pairs, partial=partial)
    dtype = torch.float32 if interpreted() else maps.dtype
    out = torch.empty_like(maps, dtype=dtype).zero_() if wanted[0] else maps.new_empty(0)
    dots = grid.sums(maps.shape[1])
    _maps_product[(grid.tiles, grid.neighbours, grid.batch)](
        pairs, maps, head, out, dots,
        grid.height, grid.width, grid.tiles_y, grid.tiles_x,
        *maps.stride(), *(out.stride() if wanted[0] else (0, 0, 0, 0)),
        HEADS=maps.shape[1], REACH=grid.reach, SIDE=SIDE, WRITE=wanted[0], num_warps=WARPS,
    )  # fmt: skip
    grad_bias = (0.5 * partial[:, :1].double().sum(0)).to(head_bias.dtype)
    return _rounded(out, maps), dots.double().sum(0).to(head_weight.dtype), grad_bias


def _run_window_loss(window: Tensor, labels: Tensor, radius: int, slopes: Tensor, out: Tensor, backward: bool):
    batch, _, height, width = window.shape
    pixels = 4096 if interpreted() else 128
    blocks = triton.cdiv(height * width, pixels)
    partial = torch.empty(batch * blocks, 2, dtype=torch.float32, device=window.device)
    counts = torch.empty(batch * blocks, 2, dtype=torch.int32, device=window.device)
    _window_loss[(blocks, batch)](
        window, labels, slopes, out, partial, counts, height, width, *window.stride(),
        RADIUS=radius, PIXELS=pixels, BACKWARD=backward,
    )  # fmt: skip
    return partial, counts


@on_device
def affinity_loss(
    affinity: Tensor, labels: Tensor, radius: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss(*_run_window_loss(affinity, labels, radius, affinity, affinity, False))


@on_device
def affinity_loss_backward(
    affinity: Tensor, labels: Tensor, grad: Tensor, pos_count: Tensor, neg_count: Tensor, radius: int, ignore_index: int
) -> Tensor:
    out = torch.empty_like(affinity, dtype=torch.float32 if interpreted() else affinity.dtype)
    _run_window_loss(out, labels, radius, _slopes(grad, pos_count, neg_count), out, True)
    return _rounded(out, affinity)
