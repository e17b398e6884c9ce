"""Diffusion in plain PyTorch: the formula, for correctness and comparison."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def shifted(images: torch.Tensor, offsets: list[tuple[int, int]], border: str = "replicate") -> torch.Tensor:
    """Neighbours ``images[..., y+dy, x+dx]`` of every pixel, one channel per tap.

    images [B, C, H, W], offsets of T pairs (dy, dx) -> [B, C, T, H, W]. Neighbours outside the image are its
    nearest pixel (``replicate``) or 0 (``zero``).
    """
    height, width = images.shape[-2:]
    # Past one image length an offset reaches the same pixel, which keeps the padding small.
    clipped = [(max(-height, min(height, dy)), max(-width, min(width, dx))) for dy, dx in offsets]
    pad_y = max(abs(dy) for dy, _ in clipped)
    pad_x = max(abs(dx) for _, dx in clipped)
    padding = (pad_x, pad_x, pad_y, pad_y)
    padded = F.pad(images, padding, mode="replicate") if border == "replicate" else F.pad(images, padding)
    taps = [padded[..., pad_y + dy : pad_y + dy + height, pad_x + dx : pad_x + dx + width] for dy, dx in clipped]
    return torch.stack(taps, dim=2)


def diffuse(
    weights: torch.Tensor,
    masks: torch.Tensor,
    offsets: list[tuple[int, int]],
    num_iter: int,
    border: str = "replicate",
    class_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """num_iter times: masks <- sum over taps of weights * neighbour (the diffusion of AFA's Eq. 12 and of the
    random walk, Eq. 8).

    weights [B, T, H, W], masks [B, C, H, W] -> [B, C, H, W] in the dtype of masks; sums in float32 (float64 if
    either is).
    """
    if num_iter == 0:
        return no_steps(masks, weights, class_mask)
    dtype = torch.promote_types(torch.promote_types(weights.dtype, masks.dtype), torch.float32)
    weights, result = weights.to(dtype), masks.to(dtype)
    keep = None if class_mask is None else class_mask[:, :, None, None]
    if keep is not None:
        result = torch.where(keep, result, 0)
    for _ in range(num_iter):
        result = (weights.unsqueeze(1) * shifted(result, offsets, border)).sum(dim=2)
    if keep is not None:
        result = torch.where(keep, result, 0)
    return result.to(masks.dtype)


def no_steps(masks: torch.Tensor, source: torch.Tensor, class_mask: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of the masks, present classes only, in which what the weights come from has a gradient: 0."""
    keep = torch.ones((), dtype=torch.bool, device=masks.device)
    unmoved = torch.where(keep, masks, source[:, :1].to(masks.dtype))
    return unmoved if class_mask is None else torch.where(class_mask[:, :, None, None], unmoved, 0)
