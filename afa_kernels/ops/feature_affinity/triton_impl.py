"""The affinity of features in Triton: the ``triton`` backend.

`_window` sums a run of pixels with one tap, from the middle one on, and writes that and its mirror image. For the
gradient `_weights` writes w of every tap, 0 where one leaves the image, and `_gradient` sums a run of pixels and
channels over the taps. Floor: N * (2r+1)^2 * C multiply-adds, forward half of them. Bound: a load for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import interpreted, on_device

ABS_DOT, RELU_DOT, EXP_L1 = (tl.constexpr(i) for i in range(3))
CODES = {"abs_dot": 0, "relu_dot": 1, "exp_l1": 2}


@triton.jit
def _place(height, width, tap, RADIUS: tl.constexpr, PIXELS: tl.constexpr):
    """Pixels of this program, and the places of their neighbours: rows, columns, which exist."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
    exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
    return pixel, y, x, to_y, to_x, exists


@triton.jit
def _at(y, x, step_y, step_x):
    return y.to(tl.int64) * step_y + x.to(tl.int64) * step_x


@triton.jit
def _window(
    features, out, slopes, channels, height, width, features_b, features_c, features_y, features_x,
    RADIUS: tl.constexpr, KIND: tl.constexpr, KEEP: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, taps, N], zeros before; slopes [B, (taps + 1) / 2, N]."""
    middle = 2 * RADIUS * (RADIUS + 1)
    tap, image = middle + tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel, y, x, to_y, to_x, exists = _place(height, width, tap, RADIUS, PIXELS)
    own_at = features + image * features_b + _at(y, x, features_y, features_x)[None, :]
    near_at = features + image * features_b + _at(to_y, to_x, features_y, features_x)[None, :]
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    for begin in range(0, channels, CHANNELS):
        channel = (begin + tl.arange(0, CHANNELS)).to(tl.int64)[:, None]
        mask = (channel < channels) & exists[None, :]
        own = tl.load(own_at + channel * features_c, mask=mask, other=0.0).to(tl.float32)
        near = tl.load(near_at + channel * features_c, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(own - near) if KIND == EXP_L1 else own * near, axis=0)
    if KIND == EXP_L1:
        value = tl.exp(-(total / channels))
    elif KIND == ABS_DOT:
        value = tl.abs(total)
    else:
        value = tl.where(total <= 0, 0.0, total)
    count = height * width
    plane = image * (2 * middle + 1)
    tl.store(out + (plane + tap) * count + pixel, value, mask=exists)
    tl.store(out + (plane + 2 * middle - tap) * count + to_y * width + to_x, value, mask=exists)
    if KEEP:
        if KIND == ABS_DOT:
            slope = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, total * 0.0))
        else:
            slope = tl.where(total <= 0, 0.0, 1.0)
        kept = slopes + (image * (middle + 1) + tap - middle) * count + pixel
        tl.store(kept, tl.where(exists, slope, 0.0), mask=y < height)


@triton.jit
def _weights(
    slopes, grad, weights, height, width, factor,
    slopes_b, slopes_t, slopes_y, slopes_x, grad_b, grad_t, grad_y, grad_x,
    RADIUS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """weights [B, taps, N]: (G_ij + G_ji) dA_ij/ds_ij."""
    middle = 2 * RADIUS * (RADIUS + 1)
    tap, image = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel, y, x, to_y, to_x, exists = _place(height, width, tl.program_id(1), RADIUS, PIXELS)
    base = grad + image * grad_b
    total = tl.load(base + tap * grad_t + _at(y, x, grad_y, grad_x), mask=exists, other=0.0).to(tl.float32)
    back = base + (2 * middle - tap) * grad_t + _at(to_y, to_x, grad_y, grad_x)
    total += tl.load(back, mask=exists, other=0.0).to(tl.float32)
    mirrored = tap < middle
    at = tl.where(mirrored, _at(to_y, to_x, slopes_y, slopes_x), _at(y, x, slopes_y, slopes_x))
    kept = slopes + image * slopes_b + tl.where(mirrored, middle - tap, tap - middle) * slopes_t + at
    total *= tl.load(kept, mask=exists, other=0.0).to(tl.float32) * factor
    tl.store(weights + (image * (2 * middle + 1) + tap) * height * width + pixel, total, mask=y < height)


@triton.jit
def _gradient(
    features, weights, out, channels, height, width, features_b, features_c, features_y, features_x,
    RADIUS: tl.constexpr, KIND: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, C, N]."""
    taps: tl.constexpr = (2 * RADIUS + 1) * (2 * RADIUS + 1)
    image, count = tl.program_id(2).to(tl.int64), height * width
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[:, None]
    base = features + image * features_b + channel * features_c
    pixel, y, x, _, _, inside = _place(height, width, taps // 2, RADIUS, PIXELS)
    mask = (channel < channels) & inside[None, :]
    own = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    if KIND == EXP_L1:
        own += tl.load(base + _at(y, x, features_y, features_x)[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    weight_at = weights + image * taps * count + pixel
    for tap in range(taps):
        _, _, _, to_y, to_x, exists = _place(height, width, tap, RADIUS, PIXELS)
        weight = tl.load(weight_at, mask=exists, other=0.0)[None, :]
        near_at = base + _at(to_y, to_x, features_y, features_x)[None, :]
        near = tl.load(near_at, mask=(channel < channels) & exists[None, :], other=0.0).to(tl.float32)
        if KIND == EXP_L1:
            # Where the weight is 0, what the difference is does not matter.
            total += tl.where(own == near, 0.0, tl.where(own < near, -weight, weight))
        else:
            total += weight * near
        weight_at += count
    tl.store(out + (image * channels + channel) * count + pixel[None, :], total, mask=mask)


def _blocks(features: Tensor) -> dict[str, int]:
    """Pixels and channels of a program."""
    channels, height, width = features.shape[1:]
    if not interpreted():
        return {"CHANNELS": 16, "PIXELS": 128}
    most = triton.next_power_of_2(channels), triton.next_power_of_2(height * width)
    return {"CHANNELS": min(most[0], 128), "PIXELS": min(most[1], 1024)}


def _dtype(features: Tensor) -> torch.dtype:
    """The interpreter would truncate to bfloat16 rather than round."""
    return torch.float32 if interpreted() else features.dtype


@on_device
def feature_affinity(features: Tensor, radius: int, kind: str, keep: bool) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    taps, kept = (2 * radius + 1) ** 2, keep and kind != "exp_l1"
    shape = (batch, (taps + 1) // 2, height, width) if kept else (0,)
    out = torch.zeros((batch, taps, height, width), dtype=_dtype(features), device=features.device)
    slopes = torch.empty(shape, dtype=features.dtype, device=features.device)
    blocks = _blocks(features)
    grid = triton.cdiv(height * width, blocks["PIXELS"]), (taps + 1) // 2, batch
    inputs = features, out, slopes, channels, height, width, *features.stride()
    _window[grid](*inputs, RADIUS=radius, KIND=CODES[kind], KEEP=kept, **blocks)
    return out.to(features.dtype), slopes


@on_device
def feature_affinity_backward(features: Tensor, slopes: Tensor, grad: Tensor, radius: int, kind: str) -> Tensor:
    batch, channels, height, width = features.shape
    taps, blocks = (2 * radius + 1) ** 2, _blocks(features)
    weights = torch.empty((batch, taps, height, width), dtype=torch.float32, device=features.device)
    factor = -1.0 / channels if kind == "exp_l1" else 1.0
    runs = triton.cdiv(height * width, blocks["PIXELS"])
    inputs = slopes, grad, weights, height, width, factor, *slopes.stride(), *grad.stride()
    _weights[runs, taps, batch](*inputs, RADIUS=radius, PIXELS=blocks["PIXELS"])
    out = torch.empty(features.shape, dtype=_dtype(features), device=features.device)
    inputs = features, weights, out, channels, height, width, *features.stride()
    grid = runs, triton.cdiv(channels, blocks["CHANNELS"]), batch
    _gradient[grid](*inputs, RADIUS=radius, KIND=CODES[kind], **blocks)
    return out.to(features.dtype)
