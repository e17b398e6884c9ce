"""Pixel labels from class activation maps: plain, refined by PAR, propagated by random walk (section 3.4).

Everywhere: cam [B, K - 1, H, W] in 0..1, cls_labels [B, K - 1] multi-hot, labels [B, H, W] int64 with 0 for
background, 1 .. K - 1 for the classes, and ``IGNORE`` (255) where it is left open and outside the photograph.

``img_box`` [B, 4] int64 (y0, y1, x0, x1) is where the photograph lies in the padded crop; None: everywhere.
Keep it on the CPU even if all else is on a GPU: the random-walk label needs its numbers on the host.

The published procedure has asymmetries, kept because its numbers depend on them: the CAM is refined on the
whole padded crop, from half resolution; the random walk inside the photograph's box, from full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import par, random_walk_with_background

IGNORE = 255
DILATIONS = (1, 2, 4, 8, 12, 24)


def cam_to_label(
    cam: Tensor,
    cls_labels: Tensor,
    img_box: Tensor | None = None,
    bkg_score: float = 0.45,
    ignore_mid: bool = False,
    high: float = 0.55,
    low: float = 0.35,
) -> Tensor:
    """The strongest present class of each pixel, or background where none exceeds ``bkg_score`` -> [B, H, W].

    ``ignore_mid``: two thresholds instead of one; above ``low`` but not above ``high`` is ``IGNORE``.
    """
    _check(cam, cls_labels, img_box, low, high)
    value, index = (cam * cls_labels[:, :, None, None].to(cam)).max(1)
    if ignore_mid:
        label = torch.where(value > high, index + 1, torch.where(value > low, IGNORE, 0))
    else:
        label = torch.where(value > bkg_score, index + 1, 0)
    return _outside_ignored(label, img_box)


@torch.no_grad()
def refine_label(
    images01: Tensor,
    cam: Tensor,
    cls_labels: Tensor,
    img_box: Tensor | None = None,
    high: float = 0.55,
    low: float = 0.35,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
) -> Tensor:
    """The CAM's label after pixel-adaptive refinement -> [B, H, W].

    images01: [B, 3, H, W] in 0..1. At half resolution a constant background score joins the CAMs of the
    present classes, a softmax makes them comparable, PAR refines them, and the strongest at full resolution
    wins. This for both scores at once (channels of one diffusion): foreground where ``high`` leaves it so,
    background where ``low`` does, ``IGNORE`` between. With ``low == high`` nothing in the box is left open.
    """
    _check(cam, cls_labels, img_box, low, high)
    classes = _worth_computing(cls_labels)
    present = F.pad(cls_labels[:, classes].bool(), (1, 0), value=True)
    scores = (low,) if low == high else (low, high)
    small = _halve(cam[:, classes].float())
    stacks = [torch.cat([torch.full_like(small[:, :1], score), small], 1) for score in scores]
    stacks = [stack.masked_fill(~present[:, :, None, None], -torch.inf).softmax(1) for stack in stacks]
    refined = _par(_halve(images01.float()), torch.cat(stacks, 1), dilations, num_iter, present, len(scores))
    return _outside_ignored(_decide(refined, cam.shape[2:], classes, len(scores)), img_box)


@torch.no_grad()
def random_walk_label(
    images01: Tensor,
    affinity: Tensor,
    cam: Tensor,
    cls_labels: Tensor,
    img_box: Tensor | None = None,
    radius: int = 8,
    high: float = 0.55,
    low: float = 0.35,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
    power: float = 2,
    eps: float = 0.1,
    refine: bool = True,
) -> Tensor:
    """The label after propagating the CAM along the affinity and refining it by PAR -> [B, H, W].

    images01: [B, 3, H, W] in 0..1. affinity: [B, (2r + 1)^2, h, w] in 0..1, as the model gives it. The CAM is
    resized to its grid, propagated with both background scores (see :func:`refine_label`), resized back, and
    refined at half resolution inside the photograph's box, whose border is replicated so that padding has no
    say. ``refine=False`` leaves the refinement out.
    """
    _check(cam, cls_labels, img_box, low, high)
    classes = _worth_computing(cls_labels)
    labels = cls_labels[:, classes]
    present = F.pad(labels.bool(), (1, 0), value=True)
    scores = (low,) if low == high else (low, high)
    size = cam.shape[2:]
    small = _resize(cam[:, classes].float(), affinity.shape[2:])
    walked = random_walk_with_background(affinity.float(), small, labels, scores, radius, power, eps)
    walked = walked.transpose(0, 1).flatten(1, 2)  # [B, scores x (background + classes), h, w]
    if not refine:
        return _outside_ignored(_decide(walked, size, classes, len(scores)), img_box)
    walked = _resize(walked, size)
    boxes = [(0, size[0], 0, size[1])] * len(cam) if img_box is None else img_box.tolist()
    label = torch.full((len(cam), *size), IGNORE, device=cam.device)
    for i, (y0, y1, x0, x1) in enumerate(boxes):
        inside = slice(i, i + 1), slice(None), slice(y0, y1), slice(x0, x1)
        part = walked[inside]
        if not part.numel():
            continue  # nothing of the photograph is left in the crop
        image = _halve(images01[inside].float())
        refined = _par(image, part, dilations, num_iter, present[i : i + 1], len(scores))
        label[i, y0:y1, x0:x1] = _decide(refined, part.shape[2:], classes, len(scores))[0]
    return label


def _check(cam: Tensor, cls_labels: Tensor, img_box: Tensor | None, low: float, high: float) -> None:
    if cam.ndim != 4 or cls_labels.shape != cam.shape[:2]:
        raise ValueError(
            f"cls_labels: expected [B, K - 1] beside cam [B, K - 1, H, W], got {list(cls_labels.shape)}"
            f" beside {list(cam.shape)}"
        )
    if img_box is not None and img_box.shape != (len(cam), 4):
        raise ValueError(f"img_box: expected [{len(cam)}, 4] (y0, y1, x0, x1), got {list(img_box.shape)}")
    if not 0 <= low <= high:
        raise ValueError(f"low, high: expected 0 <= low <= high, got {low} and {high}")


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _halve(x: Tensor) -> Tensor:
    return _resize(x, [max(side // 2, 1) for side in x.shape[2:]])


def _worth_computing(cls_labels: Tensor) -> Tensor:
    """Indices of the classes to compute. On the CPU those present in the batch; on a GPU all, because looking
    would make the host wait, and the class mask keeps absent ones free of cost."""
    if cls_labels.device.type != "cpu":
        return torch.arange(cls_labels.shape[1], device=cls_labels.device)
    present = cls_labels.any(0)
    present[0] |= not present.any()  # an image without any class still needs a channel
    return present.nonzero()[:, 0]


def _par(
    images: Tensor, masks: Tensor, dilations: Sequence[int], num_iter: int, present: Tensor, scores: int
) -> Tensor:
    return par(images, masks, tuple(dilations), num_iter, class_mask=present.repeat(1, scores))


def _decide(stacks: Tensor, size: Sequence[int], classes: Tensor, scores: int) -> Tensor:
    """The label at ``size`` from the stacked channels of one or two background scores, low first.

    Absent classes are 0 in ``stacks``, background and present ones positive.
    """
    names = F.pad(classes + 1, (1, 0))
    labels = [names[_resize(stack, size).argmax(1)] for stack in stacks.chunk(scores, 1)]
    low, high = labels[0], labels[-1]
    return torch.where(high > 0, high, torch.where(low > 0, IGNORE, 0))


def _outside_ignored(label: Tensor, img_box: Tensor | None) -> Tensor:
    if img_box is None:
        return label
    y0, y1, x0, x1 = img_box.to(label.device, non_blocking=True)[:, :, None, None].unbind(1)
    rows = torch.arange(label.shape[1], device=label.device)[:, None]
    columns = torch.arange(label.shape[2], device=label.device)
    inside = (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
    return torch.where(inside, label, IGNORE)
