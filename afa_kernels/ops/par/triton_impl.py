"""PAR and PAMR in Triton: one kernel for the weights, then the diffusion's steps.

Each program holds a block of pixels and all taps, [PIXELS, TAPS] with the taps padded to a power of two, in
registers: mean, deviation, kappa and softmax are reductions along the taps, and every weight is written once.
Floor: 8*D*H*W*4 bytes written.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.taps import clipped, position_weights, ring_offsets
from ...core.triton_launch import interpreted, on_device, table
from ..diffusion import triton_impl as diffusion

SHRINK = tl.constexpr(2.0**-80)


@triton.jit
def _deviation(value, first, centre, real, count, centres, PAMR: tl.constexpr):
    """Unbiased standard deviation of ``count`` values [PIXELS, TAPS], of which the centre is so many.

    From deviations from the first neighbour: a constant neighbourhood gives exactly 0. Large values are shrunken by a
    power of two first, for their squares would overflow.
    """
    largest = tl.max(tl.abs(value), axis=1)
    if PAMR:
        largest = tl.maximum(largest, tl.abs(centre))
    shrink = tl.where(largest > 1e15, SHRINK, 1.0)
    start = first * shrink
    deviation = tl.where(real[None, :], value * shrink[:, None] - start[:, None], 0.0)
    own = centre * shrink - start
    mean = (tl.sum(deviation, axis=1) + centres * own) / count
    spread = tl.where(real[None, :], deviation - mean[:, None], 0.0)
    squares = tl.sum(spread * spread, axis=1) + centres * (own - mean) * (own - mean)
    return tl.sqrt(squares / (count - 1.0)) / shrink


@triton.jit
def _kappa_softmax(
    images, out, offsets, position,
    height, width, taps, dilations,
    images_b, images_c, images_y, images_x,
    w1,
    PAMR: tl.constexpr, PIXELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image = tl.program_id(1).to(tl.int64)
    tap = tl.arange(0, TAPS)
    inside = pixel < height * width
    real = tap < taps
    y, x = pixel // width, pixel % width
    dy = tl.load(offsets + 2 * tap, mask=real, other=0)
    dx = tl.load(offsets + 2 * tap + 1, mask=real, other=0)
    from_y = tl.minimum(tl.maximum(y[:, None] + dy[None, :], 0), height - 1)
    from_x = tl.minimum(tl.maximum(x[:, None] + dx[None, :], 0), width - 1)
    reads = inside[:, None] & real[None, :]
    base = images + image * images_b
    at = from_y * images_y + from_x * images_x
    # The standard deviation of PAMR has the centre among the values, once for each dilation. Times 1.0, for an argument
    # that is 1 is no tensor, which alone could be cast.
    count = taps * 1.0
    centres = 0.0
    if PAMR:
        centres = dilations * 1.0
        count += centres
    kappa = tl.zeros((PIXELS, TAPS), dtype=tl.float32)
    for colour in tl.static_range(3):
        plane = base + colour * images_c
        centre = tl.load(plane + y * images_y + x * images_x, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(plane + tl.minimum(tl.maximum(y + tl.load(offsets), 0), height - 1) * images_y
                        + tl.minimum(tl.maximum(x + tl.load(offsets + 1), 0), width - 1) * images_x,
                        mask=inside, other=0.0).to(tl.float32)  # fmt: skip
        value = tl.load(plane + at, mask=reads, other=0.0).to(tl.float32)
        sigma = _deviation(value, first, centre, real, count, centres, PAMR)
        distance = value - centre[:, None]
        if PAMR:
            kappa -= tl.abs(distance) / (1e-8 + 0.1 * sigma)[:, None]
        else:
            scaled = distance / (sigma + 1e-8)[:, None] / w1
            kappa -= scaled * scaled
    kappa = tl.where(real[None, :], kappa, float("-inf"))
    # A NaN must reach every weight of its pixel; max and where would drop it.
    poison = tl.sum(tl.where(real[None, :], kappa, 0.0) * 0.0, axis=1)
    # The mean of the three colours is taken behind the subtraction: a product in front of it could be fused into it,
    # while the maximum has been rounded, and where sigma is 0 half a unit in kappa's last place is 3e7 in the exponent.
    exponential = tl.exp((kappa - tl.max(kappa, axis=1)[:, None]) / 3.0)
    share = exponential / tl.sum(exponential, axis=1)[:, None] + poison[:, None]
    share += tl.load(position + tap, mask=real, other=0.0)[None, :]
    size = height * width
    out_at = (image * taps + tap[None, :]) * size + pixel[:, None]
    tl.store(out + out_at, share, mask=reads)


@functools.lru_cache(maxsize=256)
def _tables(dilations: tuple[int, ...], factors: tuple[float, ...], height: int, width: int) -> tuple[tuple, tuple]:
    """Offsets, dy and dx side by side, and position weights of the taps."""
    pairs = clipped(ring_offsets(dilations), height, width)
    position = (0.0,) * len(pairs)
    if factors:
        position = tuple(factors[2] * value for value in position_weights(dilations, factors[1]))
    return tuple(value for pair in pairs for value in pair), position


def _weights(images: Tensor, dilations: list[int], factors: list[float], dtype: torch.dtype) -> Tensor:
    """[B, 8*D, H, W] of PAR (three factors) or PAMR (none)."""
    batch, _, height, width = images.shape
    taps = 8 * len(dilations)
    offsets, position = _tables(tuple(dilations), tuple(factors), height, width)
    offsets = table(offsets, torch.int32, images.device)
    position = table(position, torch.float32, images.device)
    # The interpreter would truncate to bfloat16.
    written = torch.float32 if interpreted() else dtype
    out = torch.empty(batch, taps, height, width, dtype=written, device=images.device)
    pixels = 512 if interpreted() else 32
    grid = (triton.cdiv(height * width, pixels), batch)
    _kappa_softmax[grid](
        images, out, offsets, position,
        height, width, taps, len(dilations),
        *images.stride(),
        factors[0] if factors else 1.0,
        PAMR=not factors, PIXELS=pixels, TAPS=triton.next_power_of_2(taps), num_warps=8,
    )  # fmt: skip
    return out.to(dtype)


@on_device
def par_weights(images: Tensor, dilations: list[int], factors: list[float]) -> Tensor:
    return _weights(images, dilations, factors, images.dtype)


@on_device
def par(
    images: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    weights = _weights(images, dilations, factors, torch.float32)
    return diffusion.diffuse(weights, masks, ring_offsets(dilations), num_iter, "replicate", class_mask, transpose)
