"""The path affinity in Triton: the ``triton`` backend.

A program takes some pixels and one direction of the half plane, walks its paths point by point, from a table, and
writes both taps of the direction. Backward `_choices` keeps of each path which point is the first maximum, and the sum
of its two gradients; `_gather` looks, for each pixel, at all paths that it may be a point of.
Floor: the window written once; backward its gradient read once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.triton_launch import interpreted, on_device, table


@triton.jit
def _largest(edge, y, x, exists, points, first, last, edge_y, edge_x):
    """The largest edge on the paths from pixels (y, x), where they exist, and which point is the first that has it."""
    best = tl.full(x.shape, float("-inf"), tl.float32)
    code = tl.zeros(x.shape, tl.int32)
    for point in range(first, last):
        py, px = tl.load(points + 2 * point), tl.load(points + 2 * point + 1)
        value = tl.load(edge + (y + py) * edge_y + (x + px) * edge_x, mask=exists, other=0.0).to(tl.float32)
        larger = (value > best) | ((value != value) & (best == best))
        best, code = tl.where(larger, value, best), tl.where(larger, point - first, code)
    return best, code


@triton.jit
def _window(
    edge, out, directions, points, height, width, reach, edge_b, edge_y, edge_x, PIXELS: tl.constexpr,
):  # fmt: skip
    """out [B, taps, H, W]: both taps of a direction, where its path is in the image."""
    image, direction = tl.program_id(1).to(tl.int64), directions + 4 * tl.program_id(2)
    dy, dx = tl.load(direction), tl.load(direction + 1)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = (pixel // width).to(tl.int64), pixel % width
    exists = (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    first, last = tl.load(direction + 2), tl.load(direction + 3)
    best, _ = _largest(edge + image * edge_b, y, x, exists, points, first, last, edge_y, edge_x)
    side, tap = 2 * reach + 1, dy * (2 * reach + 1) + dx
    centre = image * side * side + 2 * reach * (reach + 1)
    tl.store(out + ((centre + tap) * height + y) * width + x, 1.0 - best, mask=exists)
    tl.store(out + ((centre - tap) * height + y + dy) * width + x + dx, 1.0 - best, mask=exists)


@triton.jit
def _choices(
    edge, grad, slopes, codes, directions, points, height, width, reach,
    edge_b, edge_y, edge_x, grad_b, grad_t, grad_y, grad_x, PIXELS: tl.constexpr,
):  # fmt: skip
    """slopes, codes [B, directions, N]: the sum of the gradients of a path's two taps; its first maximum."""
    image, direction = tl.program_id(1).to(tl.int64), directions + 4 * tl.program_id(2)
    dy, dx = tl.load(direction), tl.load(direction + 1)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = (pixel // width).to(tl.int64), pixel % width
    exists = (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    first, last = tl.load(direction + 2), tl.load(direction + 3)
    _, code = _largest(edge + image * edge_b, y, x, exists, points, first, last, edge_y, edge_x)
    centre, tap = 2 * reach * (reach + 1), (dy * (2 * reach + 1) + dx).to(tl.int64)
    own = grad + image * grad_b + (centre + tap) * grad_t + y * grad_y + x * grad_x
    other = grad + image * grad_b + (centre - tap) * grad_t + (y + dy) * grad_y + (x + dx) * grad_x
    slope = tl.load(own, mask=exists, other=0.0).to(tl.float32)
    slope += tl.load(other, mask=exists, other=0.0).to(tl.float32)
    to = (image * tl.num_programs(2) + tl.program_id(2)) * height * width + pixel
    tl.store(slopes + to, slope, mask=y < height)
    tl.store(codes + to, code.to(codes.dtype.element_ty), mask=y < height)


@triton.jit
def _gather(slopes, codes, out, directions, points, height, width, count, PIXELS: tl.constexpr):
    """out [B, 1, H, W]: minus the slopes of all paths whose first maximum is this pixel."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x = pixel // width, pixel % width
    total = tl.zeros((PIXELS,), dtype=tl.float32)
    plane = image * count * height * width
    for number in range(count):
        first, last = tl.load(directions + 4 * number + 2), tl.load(directions + 4 * number + 3)
        for point in range(first, last):
            from_y, from_x = y - tl.load(points + 2 * point), x - tl.load(points + 2 * point + 1)
            there = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
            at = plane + from_y * width + from_x
            there &= tl.load(codes + at, mask=there, other=0).to(tl.int32) == point - first
            total -= tl.load(slopes + at, mask=there, other=0.0)
        plane += height * width
    tl.store(out + image * height * width + pixel, total, mask=y < height)


@functools.lru_cache(maxsize=64)
def _paths(radius: int, reach_y: int, reach_x: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Of every direction of the half plane (dy, dx, first, last of its points), row-major; (py, px) of the points,
    those of a path by descending |py| + |px|, then row-major; how many the longest path has.
    """
    directions, points, longest = [], [], 0
    for dy in range(reach_y + 1):
        for dx in range(-reach_x if dy else 1, reach_x + 1):
            square = dy * dy + dx * dx
            if square >= radius * radius:
                continue
            first, n, sign = len(points) // 2, dy + abs(dx), -1 if dx < 0 else 1
            for level in range(n, -1, -1):
                for py in range(level + 1):
                    if (dy * level - n * py) ** 2 < square:
                        points += [py, sign * (level - py)]
            directions += [dy, dx, first, len(points) // 2]
            longest = max(longest, len(points) // 2 - first)
    return tuple(directions), tuple(points), longest


class _Plan:
    """The paths that some pixel of an image has, at most ``reach`` away in each axis, and launches over them."""

    def __init__(self, edge: Tensor, radius: int, reach: int):
        batch, _, height, width = edge.shape
        farthest = min(reach, radius - 1)
        directions, points, longest = _paths(radius, min(farthest, height - 1), min(farthest, width - 1))
        self.count, self.sizes = len(directions) // 4, (height, width)
        self.strides = edge.stride(0), *edge.stride()[2:]
        self.code = torch.uint8 if longest <= 256 else torch.int16
        if self.count:
            self.tables = [table(values, torch.int32, edge.device) for values in (directions, points)]
        self.pixels = min(4096, triton.next_power_of_2(height * width)) if interpreted() else 128
        self.pixel_grid = triton.cdiv(height * width, self.pixels), batch
        self.grid = *self.pixel_grid, self.count


def _fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    # The interpreter would truncate to bfloat16 rather than round.
    return torch.zeros(shape, dtype=torch.float32 if interpreted() else like.dtype, device=like.device)


@on_device
def path_affinity(edge: Tensor, radius: int, reach: int) -> Tensor:
    plan, taps = _Plan(edge, radius, reach), (2 * reach + 1) ** 2
    out = _fresh((edge.shape[0], taps, *edge.shape[2:]), edge)
    out[:, taps // 2] = 1
    if plan.count:
        _window[plan.grid](edge, out, *plan.tables, *plan.sizes, reach, *plan.strides, PIXELS=plan.pixels)
    return out.to(edge.dtype)


@on_device
def path_affinity_gradient(edge: Tensor, grad: Tensor, radius: int, reach: int) -> Tensor:
    plan, out = _Plan(edge, radius, reach), _fresh(edge.shape, edge)
    if plan.count:
        shape = edge.shape[0], plan.count, *edge.shape[2:]
        slopes = torch.empty(shape, dtype=torch.float32, device=edge.device)
        codes = torch.empty(shape, dtype=plan.code, device=edge.device)
        inputs = edge, grad, slopes, codes, *plan.tables, *plan.sizes, reach, *plan.strides, *grad.stride()
        _choices[plan.grid](*inputs, PIXELS=plan.pixels)
        _gather[plan.pixel_grid](slopes, codes, out, *plan.tables, *plan.sizes, plan.count, PIXELS=plan.pixels)
    return out.to(edge.dtype)
