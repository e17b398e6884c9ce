"""Pixel labels from class activation maps: plain, refined by PAR, propagated by random walk (section 3.4).

Everywhere: cam [B, K - 1, H, W] in 0..1, cls_labels [B, K - 1] multi-hot, labels [B, H, W] int64 with 0 for
background, 1 .. K - 1 for the classes, and ``IGNORE`` (255) where it is left open and outside the photograph.

``img_box`` [B, 4] int64 (y0, y1, x0, x1) is where the photograph lies in the padded crop; None: everywhere.
Keep it on the CPU even if all else is on a GPU: the random-walk label needs its numbers on the host.

The published procedure has asymmetries, kept because its numbers depend on them: the CAM is refined on the
whole padded crop, from half resolution; the random walk inside the photograph's box, from full resolution.
:func:`labels_of_one_diffusion` does without them: PAR's weights are made once and refine both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import par, random_walk_with_background
from afa_model.cams import class_slots, pick
from afa_model.phases import phase

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
    classes, present = class_slots(cls_labels)
    with phase("PAR"):
        stacks = _softmax_stacks(_halve(pick(cam, classes).float()), present, low, high)
        refined = _par(_halve(images01.float()), stacks, present, dilations, num_iter)
        return _outside_ignored(_decide(refined, cam.shape[2:], classes), img_box)


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
    walked = propagate(affinity, cam, cls_labels, radius, high, low, power, eps)
    if refine:
        return refine_propagated(images01, walked, cls_labels, img_box, dilations, num_iter)
    _check(cam, cls_labels, img_box, low, high)
    return _outside_ignored(_decide(walked, cam.shape[2:], class_slots(cls_labels)[0]), img_box)


@torch.no_grad()
def propagate(
    affinity: Tensor,
    cam: Tensor,
    cls_labels: Tensor,
    radius: int = 8,
    high: float = 0.55,
    low: float = 0.35,
    power: float = 2,
    eps: float = 0.1,
) -> Tensor:
    """First half of :func:`random_walk_label`: the random walk, on the affinity's grid.

    -> [B, S + 1, h, w] for each of the two scores side by side, low first (one if they are the same):
    background, then the classes of :func:`~afa_model.cams.class_slots`; absent ones 0.
    """
    _check(cam, cls_labels, None, low, high)
    with phase("random walk"):
        classes, present = class_slots(cls_labels)
        small = _resize(pick(cam, classes).float(), affinity.shape[2:])
        scores = _scores(low, high)
        walked = random_walk_with_background(affinity.float(), small, present, scores, radius, power, eps)
        return walked.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def refine_propagated(
    images01: Tensor,
    walked: Tensor,
    cls_labels: Tensor,
    img_box: Tensor | None = None,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
) -> Tensor:
    """Second half of :func:`random_walk_label`: what :func:`propagate` gave, refined -> label [B, H, W]."""
    classes, present = class_slots(cls_labels)
    size = images01.shape[2:]
    boxes = [[0, size[0], 0, size[1]]] * len(walked)
    if img_box is not None:
        boxes = [[y0, min(y1, size[0]), x0, min(x1, size[1])] for y0, y1, x0, x1 in img_box.tolist()]
    alike: dict[tuple[int, int], list[int]] = {}  # images whose boxes have one size go through PAR together
    for i, (y0, y1, x0, x1) in enumerate(boxes):
        if y1 > y0 and x1 > x0:  # else nothing of the photograph is left in the crop
            alike.setdefault((y1 - y0, x1 - x0), []).append(i)

    def inside(maps: Tensor, members: list[int]) -> Tensor:
        return torch.stack([maps[i, :, slice(*boxes[i][:2]), slice(*boxes[i][2:])] for i in members])

    with phase("PAR"):
        walked = _resize(walked, size)
        label = torch.full((len(walked), *size), IGNORE, device=walked.device)
        for box_size, members in alike.items():
            image = _halve(inside(images01, members).float())
            shown = torch.stack([present[i] for i in members])
            refined = _par(image, inside(walked, members), shown, dilations, num_iter)
            decided = _decide(refined, box_size, torch.stack([classes[i] for i in members]))
            for i, one in zip(members, decided):
                y0, y1, x0, x1 = boxes[i]
                label[i, y0:y1, x0:x1] = one
        return label


@torch.no_grad()
def labels_of_one_diffusion(
    images01: Tensor,
    walked: Tensor,
    cam: Tensor,
    cls_labels: Tensor,
    img_box: Tensor | None = None,
    high: float = 0.55,
    low: float = 0.35,
    dilations: Sequence[int] = DILATIONS,
    num_iter: int = 10,
) -> tuple[Tensor, Tensor]:
    """:func:`refine_label` and :func:`refine_propagated` in one diffusion of the whole padded crop.

    walked: from :func:`propagate`, with the same scores. PAR's weights are made once for the batch, no image
    is treated on its own, and nothing depends on numbers on the host, so a CUDA graph can hold it all. The
    first label is the same as ever; the second is so where the photograph fills the crop, and elsewhere
    differs near the photograph's border, over which padding now has its say, and by half-pixel rounding of
    the box.
    """
    _check(cam, cls_labels, img_box, low, high)
    classes, present = class_slots(cls_labels)
    size = cam.shape[2:]
    with phase("PAR"):
        image = _halve(images01.float())
        stacks = _softmax_stacks(_halve(pick(cam, classes).float()), present, low, high)
        # The two resizes that refine_propagated (and PAR within it) do.
        walked = F.interpolate(_resize(walked, size), image.shape[2:], mode="bilinear", align_corners=True)
        refined = _par(image, torch.cat([stacks, walked], 1), present, dilations, num_iter)
        labels = [_outside_ignored(_decide(part, size, classes), img_box) for part in refined.chunk(2, 1)]
        return labels[0], labels[1]


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


def _scores(low: float, high: float) -> tuple[float, ...]:
    return (low,) if low == high else (low, high)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def _halve(x: Tensor) -> Tensor:
    return _resize(x, [max(side // 2, 1) for side in x.shape[2:]])


def _softmax_stacks(cam: Tensor, present: Tensor, low: float, high: float) -> Tensor:
    """For each score a background channel and the CAMs [B, S, h, w], softmax over those that are present."""
    absent = ~_with_background(present)[:, :, None, None]
    stacks = [torch.cat([torch.full_like(cam[:, :1], score), cam], 1) for score in _scores(low, high)]
    return torch.cat([stack.masked_fill(absent, -torch.inf).softmax(1) for stack in stacks], 1)


def _with_background(present: Tensor) -> Tensor:
    return F.pad(present, (1, 0), value=True)


def _par(
    images: Tensor, stacks: Tensor, present: Tensor, dilations: Sequence[int], num_iter: int
) -> Tensor:
    """PAR of stacks of channels that belong to background and classes in turn."""
    mask = _with_background(present)
    return par(images, stacks, tuple(dilations), num_iter, class_mask=mask.repeat(1, stacks.shape[1] // mask.shape[1]))


def _decide(stacks: Tensor, size: Sequence[int], classes: Tensor) -> Tensor:
    """The label at ``size`` from the stacked channels of one or two background scores, low first.

    Absent classes are 0 in ``stacks``, background and present ones positive.
    """
    names = F.pad(classes + 1, (1, 0))  # [B, S + 1]: what each channel stands for
    labels = []
    for stack in stacks.split(names.shape[1], 1):
        slot = _resize(stack, size).max(1).indices  # argmax, which is ten times slower on the CPU
        labels.append(names.gather(1, slot.flatten(1)).view_as(slot))
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
