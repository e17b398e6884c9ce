"""The random walk in Triton: the ``triton`` backend.

`_sums` adds up the columns of A^p that end at each pixel, `_weights` writes T, and the steps are the diffusion's with
zero border. The gradient of the affinity takes two launches of the same shape: `_slopes` forms dL/dT and each pixel's
D dL/dD, `_affinity_gradient` brings them together. Nothing is multiplied by 1 / D, which of a D below the normal
numbers is infinite. Floor: A read twice, T written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.taps import window_offsets
from ...core.triton_launch import interpreted, on_device
from ..diffusion import triton_impl as diffusion


@triton.jit
def _power(value, power, POWER: tl.constexpr):
    """value ** power for values of at least 0; POWER 0 stands for any."""
    if POWER == 1:
        return value
    if POWER == 2:
        return value * value
    return tl.where(value > 0, tl.exp2(power * tl.log2(tl.where(value > 0, value, 1.0))), value * 0.0)


@triton.jit
def _sums(
    affinity, totals, height, width, power, eps, affinity_b, affinity_t, affinity_y, affinity_x,
    RADIUS: tl.constexpr, POWER: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """totals [B, N]: D."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    plane = affinity + image * affinity_b
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        from_y, from_x = y - (tap // (2 * RADIUS + 1) - RADIUS), x - (tap % (2 * RADIUS + 1) - RADIUS)
        exists = (y < height) & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        value = tl.load(plane + from_y * affinity_y + from_x * affinity_x, mask=exists, other=0.0)
        total += _power(value.to(tl.float32), power, POWER)
        plane += affinity_t  # a pointer, so that no index outgrows 32 bits
    tl.store(totals + image * height * width + pixel, total + eps, mask=y < height)


@triton.jit
def _weights(
    affinity, totals, weights, height, width, power, affinity_b, affinity_t, affinity_y, affinity_x,
    RADIUS: tl.constexpr, POWER: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """weights [B, taps, H, W]: T, 0 where a tap leaves the image."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.load(totals + image * height * width + pixel, mask=y < height, other=1.0)
    plane = affinity + image * affinity_b
    out = weights + image * (2 * RADIUS + 1) * (2 * RADIUS + 1) * height * width
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        value = tl.load(plane + y * affinity_y + x * affinity_x, mask=exists, other=0.0)
        # Where a tap leaves the image that is 0, whatever D.
        weight = tl.where(exists, _power(value.to(tl.float32), power, POWER) / total, 0.0)
        tl.store(out + pixel, weight, mask=y < height)
        plane += affinity_t
        out += height * width


@triton.jit
def _slopes(
    weights, states, grads, slopes, sums, height, width,
    states_b, states_c, states_y, states_x, grads_b, grads_c, grads_y, grads_x,
    CHANNELS: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """slopes [B, taps, N]: dL/dT; sums [B, N]: D dL/dD = -sum_t T dL/dT."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    plane = image * (2 * RADIUS + 1) * (2 * RADIUS + 1) * height * width
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        slope = tl.zeros((PIXELS,), dtype=tl.float32)
        state, grad = states + image * states_b, grads + image * grads_b
        for _ in range(CHANNELS):
            value = tl.load(state + to_y * states_y + to_x * states_x, mask=exists, other=0.0)
            slope += value * tl.load(grad + y * grads_y + x * grads_x, mask=exists, other=0.0)
            state += states_c
            grad += grads_c
        tl.store(slopes + plane + pixel, slope, mask=y < height)
        total -= tl.load(weights + plane + pixel, mask=y < height, other=0.0) * slope
        plane += height * width
    tl.store(sums + image * height * width + pixel, total, mask=y < height)


@triton.jit
def _affinity_gradient(
    affinity, totals, slopes, sums, out, height, width, power, affinity_b, affinity_t, affinity_y, affinity_x,
    RADIUS: tl.constexpr, POWER: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, taps, H, W]: p A^(p-1) / D dL/dT + p A^(p-1) / D dL/dD, the second of the neighbour; 0 where a tap leaves
    the image.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.load(totals + image * height * width + pixel, mask=y < height, other=1.0)
    plane = image * (2 * RADIUS + 1) * (2 * RADIUS + 1) * height * width
    source = affinity + image * affinity_b
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        value = tl.load(source + y * affinity_y + x * affinity_x, mask=exists, other=0.0).to(tl.float32)
        if POWER == 2:
            base = 2.0 * value
        elif POWER == 1:
            base = value * 0.0 + 1.0
        else:
            base = power * tl.exp2((power - 1.0) * tl.log2(value))
        to = image * height * width + to_y * width + to_x
        result = base / total * tl.load(slopes + plane + pixel, mask=exists, other=0.0)
        result += base / tl.load(totals + to, mask=exists, other=1.0) * tl.load(sums + to, mask=exists, other=0.0)
        tl.store(out + plane + pixel, tl.where(exists, result, 0.0), mask=y < height)
        source += affinity_t
        plane += height * width


class _Walk:
    """D and T of an affinity."""

    def __init__(self, affinity: Tensor, radius: int, power: float, eps: float):
        batch, _, height, width = affinity.shape
        self.pixels = 4096 if interpreted() else 128
        self.grid = triton.cdiv(height * width, self.pixels), batch
        self.sizes = height, width
        self.options = {"RADIUS": radius, "PIXELS": self.pixels}
        self.power = {"POWER": int(power) if power in (1, 2) else 0}
        self.totals = torch.empty(batch, height, width, dtype=torch.float32, device=affinity.device)
        self.weights = torch.empty(affinity.shape, dtype=torch.float32, device=affinity.device)
        options = {**self.options, **self.power}
        _sums[self.grid](affinity, self.totals, height, width, power, eps, *affinity.stride(), **options)
        inputs = affinity, self.totals, self.weights, height, width, power
        _weights[self.grid](*inputs, *affinity.stride(), **options)


@on_device
def random_walk(
    affinity: Tensor,
    cams: Tensor,
    radius: int,
    power: float,
    num_steps: int,
    eps: float,
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    weights = _Walk(affinity, radius, power, eps).weights
    return diffusion.diffuse(weights, cams, window_offsets(radius), num_steps, "zero", class_mask, transpose)


@on_device
def random_walk_affinity_gradient(
    affinity: Tensor, states: Tensor, grads: Tensor, radius: int, power: float, eps: float
) -> Tensor:
    walk = _Walk(affinity, radius, power, eps)
    slopes, sums = torch.empty_like(walk.weights), torch.empty_like(walk.totals)
    inputs = walk.weights, states, grads, slopes, sums, *walk.sizes, *states.stride(), *grads.stride()
    _slopes[walk.grid](*inputs, CHANNELS=states.shape[1], **walk.options)
    # The interpreter would truncate to bfloat16 rather than round.
    dtype = torch.float32 if interpreted() else affinity.dtype
    out = torch.empty(affinity.shape, dtype=dtype, device=affinity.device)
    inputs = affinity, walk.totals, slopes, sums, out, *walk.sizes, power, *affinity.stride()
    _affinity_gradient[walk.grid](*inputs, **walk.options, **walk.power)
    return out.to(affinity.dtype)
