"""The exact bilateral filter and the Gaussian of place in Triton; the lattice has no kernels here.

PyTorch sorts the pixels by a key whose bits halve, one after the other, the widest axis of (x, y, r, g, b), each in
sigmas: runs of 64 of them, tiles, are compact. A program has such a tile and a block of channels. From the boxes around
tiles follows the most that a weight can be; tiles beyond a distance at which all pixels of the image together would
weigh less than 1e-6 of what the tile's own weights add up to are passed over, 32 at a time where they can be. Distances
are differences squared in float32; weights and values come to the tensor cores in two halves each, of whose products
the three larger ones count: 22 bits (TF32 has 11). Values that are not finite are added in float32, for what a half
leaves of infinity is no number. Floor: pairs * (10 float32 operations, an exponential, 3 to halve it),
tensor cores 6 K operations a pair. The Gaussian is a launch for each axis, over weights that end where 1e-8 of their
sum is left.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import interpreted, on_device

TILE = 256 if interpreted() else 64
TOGETHER = 32  # tiles whose boxes are looked at at once
KEY_BITS, AXIS_BITS = 60, 16
LARGEST_SCALE = 1e30  # of squares: 0 times infinity would be NaN for a pixel with itself
BRIGHTEST = 255.0
REST = tl.constexpr(2048.0)  # a half has 11 bits: what it leaves, times this, is a half again

# --- exact ---


@triton.jit
def _gap(boxes, tile, other, tiles, there, scale_xy, scale_rgb, TILES: tl.constexpr, FARTHEST: tl.constexpr):
    """Half the squared distance of the nearest, or the farthest, points of a tile's box and others'."""
    total = tl.zeros((TILES,), dtype=tl.float32)
    for k in tl.static_range(5):
        low = tl.load(boxes + k * tiles + other, mask=there, other=0.0)
        high = tl.load(boxes + (5 + k) * tiles + other, mask=there, other=0.0)
        own_low = tl.load(boxes + k * tiles + tile)
        own_high = tl.load(boxes + (5 + k) * tiles + tile)
        if FARTHEST:
            apart = tl.maximum(high - own_low, own_high - low)
        else:
            apart = tl.maximum(tl.maximum(low - own_high, own_low - high), 0.0)
        total += apart * apart * (scale_xy if k < 2 else scale_rgb)
    return total


@triton.jit
def _exact_sums(
    features, boxes, special, high, low, out,
    count, tiles, channels, farthest, scale_xy, scale_rgb,
    TILE: tl.constexpr, TOGETHER: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """features [B, 5, tiles * TILE], boxes [B, 10, tiles], special, high, low, out [B, tiles * TILE, channels]."""
    tile = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    size = tiles * TILE
    features += image * 5 * size
    boxes += image * 10 * tiles
    special += image * size * channels
    high += image * size * channels
    low += image * size * channels
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = tl.arange(0, TILE)
    several = tl.arange(0, TOGETHER)
    own = tile * TILE + within
    # At least: a pixel itself, and all others at their farthest.
    least = tl.zeros((TOGETHER,), dtype=tl.float32)
    for first in range(0, tiles, TOGETHER):
        other = first + several
        far = _gap(boxes, tile, other, tiles, other < tiles, scale_xy, scale_rgb, TOGETHER, True)
        held = tl.minimum(count - other * TILE, TILE).to(tl.float32)
        least += tl.where(other < tiles, held * tl.exp(-far), 0.0)
    reach = farthest - tl.log(tl.maximum(tl.sum(least, axis=0), 1.0))
    total = tl.zeros((TILE, CHANNELS), dtype=tl.float32)
    rest = tl.zeros((TILE, CHANNELS), dtype=tl.float32)
    for first in range(0, tiles, TOGETHER):
        other = first + several
        near = _gap(boxes, tile, other, tiles, other < tiles, scale_xy, scale_rgb, TOGETHER, False)
        meets = ((near <= reach) & (other < tiles)).to(tl.int32)
        if tl.max(meets, axis=0) > 0:
            for step in range(0, tl.minimum(tiles - first, TOGETHER)):
                if tl.sum(tl.where(several == step, meets, 0), axis=0) > 0:
                    theirs = (first + step) * TILE + within
                    distance = tl.zeros((TILE, TILE), dtype=tl.float32)
                    for k in tl.static_range(5):
                        a = tl.load(features + k * size + own)
                        b = tl.load(features + k * size + theirs)
                        apart = a[:, None] - b[None, :]
                        distance += apart * apart * (scale_xy if k < 2 else scale_rgb)
                    weight = tl.exp(-distance)
                    row = theirs.to(tl.int64) * channels
                    at, mask = row[:, None] + channel[None, :], (channel < channels)[None, :]
                    value_high = tl.load(high + at, mask=mask, other=0.0)
                    value_low = tl.load(low + at, mask=mask, other=0.0)
                    weight_high = weight.to(tl.float16)
                    weight_low = ((weight - weight_high.to(tl.float32)) * REST).to(tl.float16)
                    total = tl.dot(weight_high, value_high, total)
                    rest = tl.dot(weight_high, value_low, rest)
                    rest = tl.dot(weight_low, value_high, rest)
                    if tl.load(boxes + first + step) == float("-inf"):
                        last = tl.minimum(channels, (tl.program_id(1) + 1) * CHANNELS)
                        for one in range(tl.program_id(1) * CHANNELS, last):
                            added = tl.sum(weight * tl.load(special + row + one)[None, :], axis=1)
                            total += tl.where((channel == one)[None, :], added[:, None], 0.0)
    at = (image * size + own)[:, None] * channels + channel[None, :]
    tl.store(out + at, total + rest * (1.0 / REST), mask=(channel < channels)[None, :])


def _key(points: list[Tensor], sides: list[float]) -> Tensor:
    """points: five of [B, N], in sigmas, whose largest are ``sides`` -> [B, N] int64."""
    left, axes = list(sides), []
    while len(axes) < KEY_BITS and max(left) > 0:
        widest = left.index(max(left))
        axes.append(widest)
        left[widest] = left[widest] / 2 if axes.count(widest) < AXIS_BITS else 0.0
    used, key = [0] * 5, torch.zeros_like(points[0], dtype=torch.int64)
    bits = [axes.count(k) for k in range(5)]
    cells = [
        (point.nan_to_num(0) / max(side, 1e-30) * 2**most).clamp(0, 2**most - 1).long()
        for point, side, most in zip(points, sides, bits)
    ]
    for axis in axes:
        used[axis] += 1
        key = key * 2 + (cells[axis] >> bits[axis] - used[axis]) % 2
    for shift in (1, 2, 4, 8, 16, 32):  # the number whose Gray code it is: neighbours differ in one bit
        key = key ^ (key >> shift)
    return key


def _exact(images: Tensor, values: Tensor, sigma_rgb: float, sigma_xy: float) -> Tensor:
    batch, channels, height, width = values.shape
    count, device = height * width, values.device
    y = torch.arange(height, dtype=torch.float32, device=device)[:, None].expand(height, width).reshape(1, count)
    x = torch.arange(width, dtype=torch.float32, device=device).expand(height, width).reshape(1, count)
    features = torch.stack([x.expand(batch, count), y.expand(batch, count), *images.float().flatten(2).unbind(1)], 1)
    sigmas = [sigma_xy] * 2 + [sigma_rgb] * 3
    sides = [most / sigma for most, sigma in zip((width, height, *[BRIGHTEST] * 3), sigmas)]
    key = _key([feature / sigma for feature, sigma in zip(features.unbind(1), sigmas)], sides)
    order = torch.sort(key, dim=1, stable=True)[1]
    tiles = triton.cdiv(count, TILE)
    # The last tile is filled up with its last pixel, whose value there is 0.
    padded = torch.nn.functional.pad(order, (0, tiles * TILE - count), "replicate") if tiles * TILE > count else order
    features = features.gather(2, padded[:, None].expand(batch, 5, -1)).contiguous()
    rows = values.flatten(2).float().gather(2, padded[:, None].expand(batch, channels, -1))
    rows[:, :, count:] = 0
    by_tile, held = features.view(batch, 5, tiles, TILE), rows.view(batch, channels, tiles, TILE)
    # What is not finite must meet all others.
    odd = ~(by_tile.isfinite().all(3).all(1) & held.isfinite().all(3).all(1))[:, None]
    low, high = by_tile.amin(3), by_tile.amax(3)
    boxes = torch.cat([low.masked_fill(odd, -math.inf), high.masked_fill(odd, math.inf)], 1)
    # Each channel by a power of two that brings its largest number to 1..2: a half ends at 65,504.
    most = rows.abs().nan_to_num(0, 0).amax(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.frexp(most)[1].float() - 1)
    rows = (rows / scale).transpose(1, 2).contiguous()
    finite = rows.isfinite()
    special, rows = rows.masked_fill(finite, 0), rows.masked_fill(~finite, 0)
    high = rows.half()
    low = ((rows - high.float()) * REST.value).half()
    out = torch.empty_like(rows)
    block = max(16, min(64, triton.next_power_of_2(channels)))
    scales = [min(0.5 / sigma / sigma, LARGEST_SCALE) for sigma in (sigma_xy, sigma_rgb)]
    _exact_sums[(tiles, triton.cdiv(channels, block), batch)](
        features, boxes, special, high, low, out,
        count, tiles, channels, math.log(count / 1e-6), *scales,
        TILE=TILE, TOGETHER=TOGETHER, CHANNELS=block,
        num_warps=4,  # three of them on a multiprocessor of Hopper; with 8 one
    )  # fmt: skip
    places = torch.argsort(order, dim=1)
    filtered = (out.transpose(1, 2) * scale).gather(2, places[:, None].expand(batch, channels, count))
    return filtered.reshape(values.shape).to(values.dtype)


# --- the Gaussian ---


@triton.jit
def _gaussian_axis(
    values, out,
    height, width, channels, reach, scale,
    values_b, values_c, values_y, values_x,
    ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums down the columns (ROWS) or along the rows; out [B, channels, height, width] float32."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    plane = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    values += image * values_b + plane * values_c
    total = tl.load(values + y * values_y + x * values_x, mask=inside, other=0.0).to(tl.float32)
    for distance in range(1, reach + 1):
        apart = tl.zeros((1,), dtype=tl.float32) + distance
        weight = tl.exp(-(apart * apart * scale))
        if ROWS:
            before, after = values + (y - distance) * values_y, values + (y + distance) * values_y
            low, high = y >= distance, y + distance < height
            before, after = before + x * values_x, after + x * values_x
        else:
            before, after = values + (x - distance) * values_x, values + (x + distance) * values_x
            low, high = x >= distance, x + distance < width
            before, after = before + y * values_y, after + y * values_y
        total += weight * tl.load(before, mask=inside & low, other=0.0).to(tl.float32)
        total += weight * tl.load(after, mask=inside & high, other=0.0).to(tl.float32)
    tl.store(out + (image * channels + plane) * height * width + pixel, total, mask=inside)


def _gaussian(values: Tensor, sigma: float) -> Tensor:
    batch, channels, height, width = values.shape
    reach, scale = math.ceil(5.8 * sigma), min(0.5 / sigma / sigma, LARGEST_SCALE)
    pixels = 4096 if interpreted() else 256
    current = values
    for rows, size in ((True, height), (False, width)):
        out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        _gaussian_axis[(triton.cdiv(height * width, pixels), channels, batch)](
            current, out,
            height, width, channels, min(reach, size - 1), scale,
            *current.stride(),
            ROWS=rows, PIXELS=pixels,
        )  # fmt: skip
        current = out
    return current.to(values.dtype)


@on_device
def bilateral_filter(
    images: Tensor, values: Tensor, sigma_rgb: float | None, sigma_xy: float, method: str, transpose: bool
) -> Tensor:
    """Exact alone; either direction is the same."""
    return _gaussian(values, sigma_xy) if sigma_rgb is None else _exact(images, values, sigma_rgb, sigma_xy)
