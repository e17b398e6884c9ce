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
    """cam [B, C, H, W] in 0..1, each channel stretched to its own range, C = K - 1 or the classes asked for;
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


def class_slots(cls_labels: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The classes of each image, side by side: work per class need not be done for all K - 1 of them.

    cls_labels: [B, K - 1] multi-hot -> classes [B, S] int64, the indices of the classes each image shows in
    ascending order, then some that it does not show; present [B, S] bool, which is which. At least one slot.

    S is the largest number of classes in one image. That number is read on the CPU; on a GPU the host would
    have to wait for it, so S is ``limit`` (a number that no image exceeds), or without one K - 1.
    """
    present = cls_labels > 0
    count = cls_labels.shape[1]
    if cls_labels.device.type == "cpu":
        slots = max(int(present.sum(1).amax()), 1)
    else:
        slots = min(max(limit or count, 1), count)
    if slots == count:
        return torch.arange(count, device=present.device).expand_as(present), present
    classes = present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    return classes, present.gather(1, classes)


def pick(maps: Tensor, classes: Tensor) -> Tensor:
    """Channels ``classes`` [B, S] of ``maps`` [B, C, H, W] -> [B, S, H, W]."""
    if classes.shape[1] == maps.shape[1]:
        return maps  # class_slots took all of them
    return maps.gather(1, classes[:, :, None, None].expand(-1, -1, *maps.shape[2:]))


@torch.no_grad()
def multi_scale_cam(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    radius: int | None = None,
    classes: Tensor | None = None,
    last_map: Tensor | None = None,
) -> MultiScaleCAM:
    """CAM of an image and its mirror image at several scales (section 3.1).

    images: [B, 3, H, W] normalised. Each scale's pair is resized to the image (bilinear) and the larger of
    the two kept, negative evidence dropped, the scales summed, and every channel stretched to 0..1 by its own
    minimum and maximum. No gradient, no decoder; the model is in eval mode meanwhile, so that labels do not
    depend on drop-path noise.

    radius: also give the affinity window of the largest scale (unmirrored), on that scale's grid.

    classes: [B, S] from :func:`class_slots`; only these channels are made -> cam [B, S, H, W].

    last_map: the last map the model made of these very images in a state where :func:`same_in_eval_mode` holds;
    scale 1 then takes it instead of making it again.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    if radius is not None:
        model.require_attention("radius")
    height, width = images.shape[2:]
    total, affinity = None, None
    with evaluating(model):
        for scale in scales:
            x = images
            if scale != 1:
                size = (max(int(height * scale), 1), max(int(width * scale), 1))
                x = F.interpolate(images, size, mode="bilinear", align_corners=False)
            wants_affinity = radius is not None and scale == max(scales)
            if scale == 1 and last_map is not None and not wants_affinity:
                plain = F.conv2d(last_map.detach(), model.classifier.weight)
                mirrored = model.cam(x.flip(3))
            else:
                out = model.cam_and_attention(torch.cat([x, x.flip(3)]))
                plain, mirrored = out.cam.chunk(2)
                if wants_affinity:
                    query, key = out.query[: len(x)], out.key[: len(x)]
                    grid = plain.shape[2:]
                    affinity = window_affinity(query, key, *model.affinity_head(), *grid, radius).float()
            if classes is not None:
                plain, mirrored = pick(plain, classes), pick(mirrored, classes)
            cam = F.interpolate(
                torch.cat([plain, mirrored.flip(3)]).float(), (height, width), mode="bilinear", align_corners=False
            )
            cam = torch.maximum(*cam.chunk(2)).relu_()
            total = cam if total is None else total.add_(cam)
    return MultiScaleCAM(_stretch(total), affinity)


def _stretch(cam: Tensor) -> Tensor:
    """Each channel minus its minimum, over the maximum of that plus 1e-5."""
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
