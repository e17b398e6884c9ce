"""Multi-scale class activation maps with flips, and the affinity that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_kernels import window_affinity

from ..conventions import resize
from ..networks.backbone import cropped
from .slots import ClassSlots


class MultiScaleCAM(NamedTuple):
    """cam [B, C, H, W] in 0..1, each channel stretched to its own range, C = K - 1, or the slots given;
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


def same_in_eval_mode(module: nn.Module) -> bool:
    """Whether ``module`` computes right now what it would in eval mode: no dropout, no drop path and no batch
    norm at work in it."""
    for part in module.modules():
        if not part.training:
            continue
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            return False
        # nn.Dropout* have p, timm's DropPath has drop_prob
        if getattr(part, "p", 0) or getattr(part, "drop_prob", 0):
            return False
    return True


@torch.no_grad()
def multi_scale_cam(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    radius: int | None = None,
    slots: ClassSlots | None = None,
    last_map: Tensor | None = None,
    as_trained: bool = False,
) -> MultiScaleCAM:
    """CAM of an image and its mirror image at several scales (section 3.1).

    images: [B, 3, H, W] normalised. Each scale's pair is resized to the image (bilinear) and the larger of
    the two kept, negative evidence dropped, the scales summed, and every channel stretched to 0..1 by its own
    minimum and maximum. No gradient, no decoder; the model is in eval mode meanwhile, so that labels do not
    depend on drop-path noise.

    as_trained: leave the model in the mode it is in and run its decoder too, whose batch norm then learns from these
    passes as from any other (as published).

    radius: also give the affinity window of the largest scale (unmirrored), on that scale's grid.

    slots: of these images; only their channels are made -> cam [B, S, H, W].

    last_map: the last map the model made of these very images in a state where :func:`same_in_eval_mode` holds;
    scale 1 then takes it instead of making it again.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    if radius is not None:
        model.require_attention("radius")
    height, width = images.shape[2:]
    total, affinity = None, None
    with nullcontext() if as_trained else evaluating(model):
        for scale in scales:
            x = at_scale(images, scale)
            wants_affinity = radius is not None and scale == max(scales)
            if scale == 1 and last_map is not None and not wants_affinity and not as_trained:
                plain = F.conv2d(last_map.detach(), model.classifier.weight)
                mirrored = model.cam(x.flip(3))
            else:
                both = torch.cat([x, x.flip(3)])
                out = model.cam_and_attention(both, decode=as_trained)
                plain, mirrored = out.cam.chunk(2)
                if wants_affinity:
                    query, key = out.query[: len(x)], out.key[: len(x)]
                    grid = plain.shape[2:]
                    affinity = window_affinity(query, key, *model.affinity_head(), *grid, radius).float()
            if slots is not None:
                plain, mirrored = slots.pick(plain), slots.pick(mirrored)
            plain, mirrored = (cropped(model, each, (x.shape[2], x.shape[3])) for each in (plain, mirrored))
            cam = resize(torch.cat([plain, mirrored.flip(3)]).float(), (height, width))
            cam = torch.maximum(*cam.chunk(2)).relu_()
            total = cam if total is None else total.add_(cam)
    return MultiScaleCAM(stretch(total), affinity)


def at_scale(images: Tensor, scale: float) -> Tensor:
    """Photographs [B, 3, H, W] at a scale, bilinear, with sizes rounded down but to at least a pixel."""
    if scale == 1:
        return images
    return resize(images, [max(int(side * scale), 1) for side in images.shape[2:]])


def stretch(cam: Tensor) -> Tensor:
    """CAMs [B, C, h, w], each channel stretched to 0..1: minus its minimum, over the maximum of that plus 1e-5."""
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
