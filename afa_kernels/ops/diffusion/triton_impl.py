"""Diffusion in Triton.

One launch per step: each program takes a block of pixels of one image and a block of channels, walks the taps and
keeps the sums in registers. Floor per step: T*H*W weights read once for each block of channels, masks from L2. The
adjoint gathers over the image grown by the farthest tap (each program's pixels are then written by it alone: the
same bits every run) and the margins are folded back onto the border afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.taps import Pairs, clipped
from ...core.triton_launch import interpreted, on_device, table


@triton.jit
def _step(
    weights, masks, out, offsets, present,
    height, width, channels,
    weights_b, weights_t, weights_y, weights_x,
    masks_b, masks_c, masks_y, masks_x,
    grow_y, grow_x,
    TAPS: tl.constexpr, TRANSPOSE: tl.constexpr, ZERO: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out [B, C, height + 2 grow_y, width + 2 grow_x]: one step; grow is 0 unless TRANSPOSE."""
    out_width = width + 2 * grow_x
    out_size = (height + 2 * grow_y) * out_width
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    y = pixel // out_width - grow_y
    x = pixel % out_width - grow_x
    inside = pixel < out_size
    wanted = tl.load(present + image * channels + channel, mask=channel < channels, other=0) != 0
    total = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    planes = image * masks_b + channel.to(tl.int64) * masks_c
    plane = weights + image * weights_b
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        for tap in range(TAPS):
            dy = tl.load(offsets + 2 * tap)
            dx = tl.load(offsets + 2 * tap + 1)
            if TRANSPOSE:
                # Pixel (y, x) of the grown image hears from the pixel whose tap points at it.
                from_y, from_x, weight_y, weight_x = y - dy, x - dx, y - dy, x - dx
                reads = inside & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
                weighs = reads
            else:
                from_y, from_x, weight_y, weight_x = y + dy, x + dx, y, x
                weighs = inside
                if ZERO:
                    reads = inside & (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
                else:
                    reads = inside
                    from_y = tl.minimum(tl.maximum(from_y, 0), height - 1)
                    from_x = tl.minimum(tl.maximum(from_x, 0), width - 1)
            mask_at = (from_y * masks_y + from_x * masks_x)[None, :] + planes[:, None]
            weight = tl.load(plane + weight_y * weights_y + weight_x * weights_x, mask=weighs, other=0.0).to(tl.float32)
            value = tl.load(masks + mask_at, mask=reads[None, :] & wanted[:, None], other=0.0).to(tl.float32)
            total += weight[None, :] * value
            plane += weights_t  # a pointer, so that no index outgrows 32 bits
    total = tl.where(wanted[:, None], total, 0.0)
    out_at = (image * channels + channel)[:, None] * out_size + pixel[None, :]
    tl.store(out + out_at, total, mask=inside[None, :] & (channel < channels)[:, None])


def _fold(grown: Tensor, height: int, width: int, grow_y: int, grow_x: int, border: str) -> Tensor:
    """Adds the margins of the grown gradient to the border pixels they were read from (replicate) or drops them
    (zero).
    """
    if border == "replicate":
        middle = grown[..., grow_x : grow_x + width].clone()
        middle[..., 0] += grown[..., :grow_x].sum(-1)
        middle[..., -1] += grown[..., grow_x + width :].sum(-1)
        folded = middle[..., grow_y : grow_y + height, :].clone()
        folded[..., 0, :] += middle[..., :grow_y, :].sum(-2)
        folded[..., -1, :] += middle[..., grow_y + height :, :].sum(-2)
        return folded
    return grown[..., grow_y : grow_y + height, grow_x : grow_x + width].contiguous()


@on_device
def diffuse(
    weights: Tensor,
    masks: Tensor,
    offsets: Tensor | Pairs,
    num_iter: int,
    border: str,
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    """`afa_kernels.diffuse`, checked arguments; offsets [T, 2] on the CPU, or pairs. Returns float32 rounded to the
    dtype of masks.
    """
    batch, channels, height, width = masks.shape
    pairs = clipped(offsets.tolist() if isinstance(offsets, Tensor) else offsets, height, width)
    taps = tuple(value for pair in pairs for value in pair)
    grow_y, grow_x = (max(map(abs, taps[axis::2])) if transpose else 0 for axis in (0, 1))
    offsets = table(taps, torch.int32, masks.device)
    if class_mask is None:
        class_mask = torch.ones(batch, channels, dtype=torch.bool, device=masks.device)
    present = class_mask.to(torch.uint8).contiguous()
    if num_iter == 0:
        return torch.where(class_mask[:, :, None, None], masks, torch.zeros_like(masks))
    channel_block = min(8, triton.next_power_of_2(channels))
    pixels = 4096 if interpreted() else 128
    # The last step of the forward rounds to the dtype of masks itself (the interpreter would truncate to bfloat16).
    current = masks
    for step in range(num_iter):
        last = step == num_iter - 1 and not transpose and not interpreted()
        shape = (batch, channels, height + 2 * grow_y, width + 2 * grow_x)
        out = torch.empty(shape, dtype=masks.dtype if last else torch.float32, device=masks.device)
        grid = (triton.cdiv(shape[2] * shape[3], pixels), triton.cdiv(channels, channel_block), batch)
        _step[grid](
            weights, current, out, offsets, present,
            height, width, channels,
            *weights.stride(), *current.stride(),
            grow_y, grow_x,
            TAPS=len(taps) // 2, TRANSPOSE=transpose, ZERO=border == "zero", PIXELS=pixels, CHANNELS=channel_block,
        )  # fmt: skip
        current = _fold(out, height, width, grow_y, grow_x, border) if transpose else out
    return current.to(masks.dtype)
