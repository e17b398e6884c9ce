"""The pixel correlation module in Triton: the ``triton`` backend.

A program has a tile of pixels j and a block of channels. Tile by tile of the pixels i it multiplies the features of
both, a few channels at a time, and adds up the tile of a times the values. For the gradient it is the features that are
added up, times g_j . values_i + values_j . g_i where a is positive. All in float32, not TF32. Floor: 2 N^2 (C + 64)
operations for each 64 channels of values, 2 N^2 (C + 2 K + 64) for each 64 of features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import interpreted, on_device

# Pixels i and j of a tile, and features multiplied at once.
ROWS, TILE, DEPTH = (128, 256, 128) if interpreted() else (32, 64, 16)
MOST_CHANNELS = 64


@triton.jit
def _products(
    rows, columns, i, j, count, depth, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """[ROWS, TILE]: pixels i of rows [depth, count] times pixels j of columns, over depth."""
    total = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for first in range(0, depth, DEPTH):
        channel = first + tl.arange(0, DEPTH)
        offset = channel.to(tl.int64) * count
        row = tl.load(
            rows + offset[None, :] + i[:, None], mask=(channel < depth)[None, :] & (i < count)[:, None], other=0.0
        )
        mask = (channel < depth)[:, None] & (j < count)[None, :]
        column = tl.load(columns + offset[:, None] + j[None, :], mask=mask, other=0.0)
        total = tl.dot(row, column, total, input_precision="ieee")
    return total


@triton.jit
def _pair_sums(
    added, features, rows, columns, out, count, channels, depth, inner,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """added, out [B, channels, count]; features [B, depth, count]; of GRADIENT alone rows, which are values and g, and
    columns, g and values, [B, inner, count].
    """
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    features += image * depth * count
    rows += image * inner * count
    columns += image * inner * count
    plane = (image * channels + channel)[:, None] * count
    total = tl.zeros((CHANNELS, TILE), dtype=tl.float32)
    for first in range(0, count, ROWS):
        i = first + tl.arange(0, ROWS)
        likeness = _products(features, features, i, j, count, depth, ROWS, TILE, DEPTH)
        if GRADIENT:
            weight = tl.where(likeness <= 0, 0.0, _products(rows, columns, i, j, count, inner, ROWS, TILE, DEPTH))
        else:
            weight = tl.where(likeness < 0, 0.0, likeness)  # NaN stays
        value = tl.load(
            added + plane + i[None, :], mask=(channel < channels)[:, None] & (i < count)[None, :], other=0.0
        )
        total = tl.dot(value, weight, total, input_precision="ieee")
    tl.store(out + plane + j[None, :], total, mask=(channel < channels)[:, None] & (j < count)[None, :])


def _add_up(added: Tensor, features: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """All of them [B, channels, N], contiguous, float32."""
    out = torch.empty_like(added)
    batch, channels, count = added.shape
    block = max(16, min(MOST_CHANNELS, triton.next_power_of_2(channels)))
    rows, columns = factors or (features, features)
    _pair_sums[(triton.cdiv(count, TILE), triton.cdiv(channels, block), batch)](
        added, features, rows, columns, out, count, channels, features.shape[1], rows.shape[1],
        GRADIENT=factors is not None, ROWS=ROWS, TILE=TILE, DEPTH=DEPTH, CHANNELS=block, num_warps=8,
    )  # fmt: skip
    return out


def _flat(tensor: Tensor, channels: int) -> Tensor:
    """[B, channels, N], contiguous, float32; a channel that is missing is 1."""
    flat = tensor.flatten(2).float()
    if channels > flat.shape[1]:
        flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
    return flat.contiguous()


@on_device
def pcm(values: Tensor, features: Tensor, ones: bool) -> Tensor:
    added, flat = _flat(values, values.shape[1] + ones), _flat(features, features.shape[1])
    return _add_up(added, flat).unflatten(2, values.shape[2:])


@on_device
def pcm_features_gradient(grad: Tensor, values: Tensor, features: Tensor) -> Tensor:
    flat, sides = _flat(features, features.shape[1]), (_flat(values, grad.shape[1]), _flat(grad, grad.shape[1]))
    return _add_up(flat, flat, (torch.cat(sides, 1), torch.cat(sides[::-1], 1))).unflatten(2, features.shape[2:])
