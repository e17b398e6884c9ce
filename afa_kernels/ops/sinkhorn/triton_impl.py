"""The Sinkhorn normalisation in Triton: the ``triton`` backend.

`_half_step` adds up the rows or columns of the window times a vector and leaves what the half step makes of the sums:
factors forward, u or v backward. `_window` and `_gradient` write the window at the end. Vectors are float64, those of
all half steps in one tensor: factors behind two planes of ones, for what nothing has divided yet, and u and v in front
of two of zeros. Floor: the window read 2 * num_iter + 1 times and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import interpreted, on_device


@triton.jit
def _wide(pointer, exists):
    return tl.load(pointer, mask=exists, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def _half_step(
    affinity, grad, vector, grad_vector, scale, later, out, height, width, vectors_b,
    affinity_b, affinity_t, affinity_y, affinity_x, grad_b, grad_t, grad_y, grad_x,
    COLUMNS: tl.constexpr, BACKWARD: tl.constexpr, WITH_GRAD: tl.constexpr, SYMMETRIC: tl.constexpr,
    EPS: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out = 1 / (sum + eps / scale) with the sums of A_ij vector, or backward -scale^2 sum + eps later. WITH_GRAD: not
    of A_ij vector but of A_ij (vector + G_ij grad_vector), vectors of the neighbour.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.zeros((PIXELS,), dtype=tl.float64)
    plane, slopes = affinity + image * affinity_b, grad + image * grad_b
    slopes_back = slopes + tl.full((), 4 * RADIUS * (RADIUS + 1), tl.int64) * grad_t  # of the last tap
    vector += image * vectors_b
    grad_vector += image * vectors_b
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        dy, dx = tap // (2 * RADIUS + 1) - RADIUS, tap % (2 * RADIUS + 1) - RADIUS
        if COLUMNS:
            near_y, near_x, from_y, from_x, to_y, to_x = y - dy, x - dx, y - dy, x - dx, y, x
        else:
            near_y, near_x, from_y, from_x, to_y, to_x = y + dy, x + dx, y, x, y + dy, x + dx
        exists = (y < height) & (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
        near = near_y * width + near_x
        factor = tl.load(vector + near, mask=exists, other=0.0)
        if WITH_GRAD:
            slope = _wide(slopes + from_y * grad_y + from_x * grad_x, exists)
            if SYMMETRIC:
                slope = (slope + _wide(slopes_back + to_y * grad_y + to_x * grad_x, exists)) * 0.5
            factor += slope * tl.load(grad_vector + near, mask=exists, other=0.0)
        total += _wide(plane + from_y * affinity_y + from_x * affinity_x, exists) * factor
        plane += affinity_t  # pointers, so that no index outgrows 32 bits
        slopes += grad_t
        slopes_back -= grad_t
    own = image * vectors_b + pixel
    before = tl.load(scale + own, mask=y < height, other=1.0)
    if BACKWARD:
        result = -(before * total) * before
        if EPS > 0:
            result += EPS * tl.load(later + own, mask=y < height, other=0.0)
    elif EPS > 0:
        # A column or row of zeros has eps / before alone; 0 times the inverse must stay 0.
        result = 1.0 / (total + EPS / before)
        result = tl.where(result > 1e300, 1e300, result)
    else:
        result = 1.0 / tl.where(y < height, total, 1.0)
    tl.store(out + own, result, mask=y < height)


@triton.jit
def _window(
    affinity, scales, out, height, width, steps, affinity_b, affinity_t, affinity_y, affinity_x,
    SYMMETRIC: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, taps, H, W]: r_i A_ij c_j of the last two of the 2 + steps planes of scales; 0 where a tap leaves the
    image.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    c = scales + (image * (steps + 2) + steps) * height * width
    r = c + height * width
    own_c = tl.load(c + pixel, mask=y < height, other=0.0)
    own_r = tl.load(r + pixel, mask=y < height, other=0.0)
    plane = affinity + image * affinity_b
    plane_back = plane + tl.full((), 4 * RADIUS * (RADIUS + 1), tl.int64) * affinity_t
    out += image * (2 * RADIUS + 1) * (2 * RADIUS + 1) * height * width
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        near = to_y * width + to_x
        value = _wide(plane + y * affinity_y + x * affinity_x, exists)
        value = (value * tl.load(c + near, mask=exists, other=0.0) * own_r).to(tl.float32)
        if SYMMETRIC:
            # Both are rounded before they are added, so that the pixel at the other end comes to the same bits.
            back = _wide(plane_back + to_y * affinity_y + to_x * affinity_x, exists)
            back = (back * own_c * tl.load(r + near, mask=exists, other=0.0)).to(tl.float32)
            value = ((value.to(tl.float64) + back.to(tl.float64)) * 0.5).to(tl.float32)
        tl.store(out + pixel, tl.where(exists, value, 0.0), mask=y < height)
        plane += affinity_t
        plane_back -= affinity_t
        out += height * width


@triton.jit
def _gradient(
    grad, scales, slopes, out, height, width, steps, grad_b, grad_t, grad_y, grad_x,
    SYMMETRIC: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, taps, H, W]: r_i c_j G_ij + the sums over half steps of r_i v_j and of u_i c_j; 0 where a tap leaves the
    image.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    pixels = height * width
    scales += image * (steps + 2) * pixels
    slopes += image * (steps + 2) * pixels
    plane = grad + image * grad_b
    plane_back = plane + tl.full((), 4 * RADIUS * (RADIUS + 1), tl.int64) * grad_t
    out += image * (2 * RADIUS + 1) * (2 * RADIUS + 1) * pixels
    for tap in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        to_y, to_x = y + tap // (2 * RADIUS + 1) - RADIUS, x + tap % (2 * RADIUS + 1) - RADIUS
        exists = (y < height) & (to_y >= 0) & (to_y < height) & (to_x >= 0) & (to_x < width)
        near = to_y * width + to_x
        total = _wide(plane + y * grad_y + x * grad_x, exists)
        if SYMMETRIC:
            total = (total + _wide(plane_back + to_y * grad_y + to_x * grad_x, exists)) * 0.5
        # c, r: what the half steps over columns and then over rows were given.
        c, slope = scales, slopes
        for _ in range(steps // 2):
            c += 2 * pixels
            slope += 2 * pixels
        total *= tl.load(c + near, mask=exists, other=0.0) * tl.load(c + pixels + pixel, mask=exists, other=0.0)
        for _ in range(steps // 2):
            slope -= 2 * pixels
            total += tl.load(slope + pixels + pixel, mask=exists, other=0.0) * tl.load(c + near, mask=exists, other=0.0)
            c -= 2 * pixels
            r = tl.load(c + pixels + pixel, mask=exists, other=0.0)
            total += r * tl.load(slope + near, mask=exists, other=0.0)
        tl.store(out + pixel, tl.where(exists, total, 0.0).to(tl.float32), mask=y < height)
        plane += grad_t
        plane_back -= grad_t
        out += pixels


def _launch(affinity: Tensor, radius: int) -> tuple[tuple[int, int], dict[str, int]]:
    batch, _, height, width = affinity.shape
    pixels = min(4096, triton.next_power_of_2(height * width)) if interpreted() else 128
    return (triton.cdiv(height * width, pixels), batch), {"RADIUS": radius, "PIXELS": pixels}


def _output(affinity: Tensor) -> Tensor:
    # The interpreter would truncate to bfloat16 rather than round.
    dtype = torch.float32 if interpreted() else affinity.dtype
    return torch.empty(affinity.shape, dtype=dtype, device=affinity.device)


@on_device
def sinkhorn(affinity: Tensor, radius: int, num_iter: int, eps: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = affinity.shape
    grid, options = _launch(affinity, radius)
    scales = torch.ones(batch, 2 + 2 * num_iter, height, width, dtype=torch.float64, device=affinity.device)
    strides = scales.stride(0), *affinity.stride(), *affinity.stride()
    for k in range(2 * num_iter):
        # Without a gradient nothing reads those; something must stand there.
        vectors = scales[:, k + 1], scales, scales[:, k], scales, scales[:, k + 2]
        _half_step[grid](
            affinity, affinity, *vectors, height, width, *strides, COLUMNS=k % 2 == 0, BACKWARD=False, WITH_GRAD=False,
            SYMMETRIC=False, EPS=eps, **options,
        )  # fmt: skip
    out = _output(affinity)
    sizes = height, width, 2 * num_iter, *affinity.stride()
    _window[grid](affinity, scales, out, *sizes, SYMMETRIC=symmetric, **options)
    return out.to(affinity.dtype), scales[:, 2:].clone(memory_format=torch.contiguous_format)


@on_device
def sinkhorn_gradient(
    affinity: Tensor, scales: Tensor, grad: Tensor, radius: int, eps: float, symmetric: bool
) -> Tensor:
    batch, steps, height, width = scales.shape
    grid, options = _launch(affinity, radius)
    scales = torch.cat([torch.ones_like(affinity[:, :1], dtype=torch.float64).expand(-1, 2, -1, -1), scales], dim=1)
    scales = scales.contiguous()
    slopes = torch.zeros_like(scales)
    strides = scales.stride(0), *affinity.stride(), *grad.stride()
    for k in range(steps - 1, -1, -1):
        given = scales[:, k + 1] if k == steps - 1 else scales[:, steps + 1]
        vectors = slopes[:, k + 1], given, scales[:, k + 2], slopes[:, k + 2], slopes[:, k]
        _half_step[grid](
            affinity, grad, *vectors, height, width, *strides, COLUMNS=k % 2 == 0, BACKWARD=True,
            WITH_GRAD=k >= steps - 2, SYMMETRIC=symmetric, EPS=eps, **options,
        )  # fmt: skip
    out = _output(affinity)
    inputs = grad, scales, slopes, out, height, width, steps, *grad.stride()
    _gradient[grid](*inputs, SYMMETRIC=symmetric, **options)
    return out.to(affinity.dtype)
