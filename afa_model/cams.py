"""Multi-scale class activation maps with flips, and the affinity that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_kernels import window_affinity


class MultiScaleCAM(NamedTuple):
    """cam [B, K - 1, H, W] in 0..1, each channel stretched to its own range;
    affinity [B, (2r + 1)^2, h, w] of the largest scale, or None if no radius was given."""

    cam: Tensor
    affinity: Tensor | None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside (no drop-path noise, no batch-norm update), as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def multi_scale_cam(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    radius: int | None = None,
) -> MultiScaleCAM:
    """CAM of an image and its mirror image at several scales (section 3.1).

    images: [B, 3, H, W] normalised. Each scale's pair is resized to the image (bilinear) and the larger of
    the two kept, negative evidence dropped, the scales summed, and every channel stretched to 0..1 by its own
    minimum and maximum. No gradient, no decoder; the model is in eval mode meanwhile, so that labels do not
    depend on drop-path noise.

    radius: also give the affinity window of the largest scale (unmirrored), on that scale's grid.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    if radius is not None:
        model.require_attention("radius")
    batch, _, height, width = images.shape
    total, affinity = None, None
    with evaluating(model):
        for scale in scales:
            x = images
            if scale != 1:
                size = (max(int(height * scale), 1), max(int(width * scale), 1))
                x = F.interpolate(images, size, mode="bilinear", align_corners=False)
            out = model.cam_and_attention(torch.cat([x, x.flip(3)]))
            cam = F.interpolate(out.cam.float(), (height, width), mode="bilinear", align_corners=False)
            cam = torch.maximum(cam[:batch], cam[batch:].flip(3)).relu_()
            total = cam if total is None else total.add_(cam)
            if radius is not None and scale == max(scales):
                grid = out.cam.shape[2:]
                query, key = out.query[:batch], out.key[:batch]
                affinity = window_affinity(query, key, *model.affinity_head(), *grid, radius).float()
    return MultiScaleCAM(_stretch(total), affinity)


def _stretch(cam: Tensor) -> Tensor:
    """Each channel minus its minimum, over the maximum of that plus 1e-5."""
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
