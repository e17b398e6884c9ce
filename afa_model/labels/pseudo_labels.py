"""Pixel labels from class activation maps: plain, refined, propagated by random walk (section 3.4).

Everywhere: cam [B, S, H, W] in 0..1 with a channel for each slot of ``slots`` (:class:`~.slots.ClassSlots`), labels
[B, H, W] int64 with 0 for background, 1 .. K - 1 for the classes, and ``IGNORE`` (255) where it is left open and
outside the photograph.

``scores``: one background score, or two, the low one first. With two, foreground is what the high one leaves,
background what the low one does, and ``IGNORE`` lies between; with one nothing in the photograph is left open.

``img_box`` [B, 4] int64 (y0, y1, x0, x1) is where the photograph lies in the padded crop; None: everywhere.
Keep it on the CPU even if all else is on a GPU: the random-walk label needs its numbers on the host.

The published procedure has asymmetries, kept because its numbers depend on them: the CAM is refined on the
whole padded crop, from half resolution; the random walk inside the photograph's box, from full resolution.
:func:`labels_of_one_diffusion` does without them: the refinement's weights are made once and refine both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import random_walk_with_background

from ..conventions import IGNORE, halve, resize
from ..runtime.phases import phase
from .refinement import refine
from .settings import LabelSettings
from .slots import ClassSlots


class PseudoLabels(NamedTuple):
    """What a step makes of a batch and its image-level labels.

    cam            [B, S, H, W] in 0..1, a channel for each slot
    refined_label  [B, H, W] int64: CAM after the refinement, or None
    affinity       [B, (2r + 1)^2, h, w] of the largest CAM scale, or None
    walked         [B, 1 or 2 scores x (S + 1), h, w] after the random walk, or None
    aff_label      [B, H, W] int64: CAM after random walk and refinement, or None
    aux_cam        as ``cam``, of the auxiliary classifier, or None
    """

    cam: Tensor
    refined_label: Tensor | None = None
    affinity: Tensor | None = None
    walked: Tensor | None = None
    aff_label: Tensor | None = None
    aux_cam: Tensor | None = None


def cam_to_label(cam: Tensor, slots: ClassSlots, scores: Sequence[float], img_box: Tensor | None = None) -> Tensor:
    """The strongest present class of each pixel, or background where none exceeds the score -> [B, H, W]."""
    _check(cam, slots, scores, img_box)
    value, index = (cam * slots.present[:, :, None, None].to(cam)).max(1)
    label = torch.where(value > scores[-1], index + 1, 0)
    if len(scores) == 2:
        label = torch.where((value > scores[0]) & (label == 0), IGNORE, label)
    return _outside_ignored(slots.name(label), img_box)


@torch.no_grad()
def grid_label(
    cam: Tensor, slots: ClassSlots, scores: Sequence[float], grid: Sequence[int], img_box: Tensor | None = None
) -> Tensor:
    """The label of each cell of a coarse ``grid`` (h, w), of the CAM resized to it -> [B, h, w]."""
    _check(cam, slots, scores, img_box)
    label = cam_to_label(resize(cam.float(), grid), slots, scores)
    if img_box is None:
        return label
    inside = inside_boxes(img_box, cam.shape[2:], cam.device)[:, None].float()
    return torch.where(F.interpolate(inside, tuple(grid), mode="nearest")[:, 0] > 0, label, IGNORE)


@torch.no_grad()
def refine_label(
    images01: Tensor,
    cam: Tensor,
    slots: ClassSlots,
    settings: LabelSettings,
    scores: Sequence[float],
    img_box: Tensor | None = None,
) -> Tensor:
    """The CAM's label after refinement -> [B, H, W].

    images01: [B, 3, H, W] in 0..1. At half resolution a constant background score joins the CAMs of the present
    classes, a softmax makes them comparable, the refinement mends them, and the strongest at full resolution wins.
    This for all scores at once (channels of one diffusion).
    """
    _check(cam, slots, scores, img_box)
    refined = soft_label("refined_cam", images01, cam, None, slots, settings, scores)
    with phase("PAR"):
        return _outside_ignored(_decide(refined, cam.shape[2:], slots), img_box)


@torch.no_grad()
def random_walk_label(
    images01: Tensor,
    affinity: Tensor,
    cam: Tensor,
    slots: ClassSlots,
    settings: LabelSettings,
    scores: Sequence[float],
    img_box: Tensor | None = None,
    refined: bool = True,
) -> Tensor:
    """The label after propagating the CAM along the affinity and refining it -> [B, H, W].

    images01: [B, 3, H, W] in 0..1. affinity: [B, (2r + 1)^2, h, w] in 0..1, as the model gives it. The CAM is
    resized to its grid, propagated with every background score, resized back, and refined at half resolution inside
    the photograph's box, whose border is replicated so that padding has no say. ``refined=False`` leaves that out.
    """
    _check(cam, slots, scores, img_box)
    walked = propagate(affinity, cam, slots, settings, scores)
    if refined:
        return refine_propagated(images01, walked, slots, settings, img_box)
    return _outside_ignored(_decide(walked, cam.shape[2:], slots), img_box)


@torch.no_grad()
def propagate(
    affinity: Tensor, cam: Tensor, slots: ClassSlots, settings: LabelSettings, scores: Sequence[float]
) -> Tensor:
    """First half of :func:`random_walk_label`: the random walk, on the affinity's grid.

    -> [B, S + 1, h, w] for each of the scores side by side: background, then the slots; absent classes 0.
    """
    _check(cam, slots, scores)
    with phase("random walk"):
        small = resize(cam.float(), affinity.shape[2:])
        how = settings.radius, settings.walk_power, settings.walk_eps
        walked = random_walk_with_background(affinity.float(), small, slots.present, tuple(scores), *how)
        return walked.transpose(0, 1).flatten(1, 2)


@torch.no_grad()
def refine_propagated(
    images01: Tensor, walked: Tensor, slots: ClassSlots, settings: LabelSettings, img_box: Tensor | None = None
) -> Tensor:
    """Second half of :func:`random_walk_label`: what :func:`propagate` gave, refined -> label [B, H, W]."""
    size = images01.shape[2:]
    boxes = [[0, size[0], 0, size[1]]] * len(walked)
    if img_box is not None:
        boxes = [[y0, min(y1, size[0]), x0, min(x1, size[1])] for y0, y1, x0, x1 in img_box.tolist()]
    alike: dict[tuple[int, int], list[int]] = {}  # images whose boxes have one size are refined together
    for i, (y0, y1, x0, x1) in enumerate(boxes):
        if y1 > y0 and x1 > x0:  # else nothing of the photograph is left in the crop
            alike.setdefault((y1 - y0, x1 - x0), []).append(i)

    def inside(maps: Tensor, members: list[int]) -> Tensor:
        return torch.stack([maps[i, :, slice(*boxes[i][:2]), slice(*boxes[i][2:])] for i in members])

    with phase("PAR"):
        walked = resize(walked, size)
        label = torch.full((len(walked), *size), IGNORE, device=walked.device)
        for box_size, members in alike.items():
            image, own = halve(inside(images01, members).float()), slots.rows(members)
            refined = _refined(image, inside(walked, members), own, settings)
            for i, one in zip(members, _decide(refined, box_size, own)):
                y0, y1, x0, x1 = boxes[i]
                label[i, y0:y1, x0:x1] = one
        return label


@torch.no_grad()
def soft_label(
    kind: str,
    images01: Tensor,
    cam: Tensor,
    affinity: Tensor | None,
    slots: ClassSlots,
    settings: LabelSettings,
    scores: Sequence[float],
) -> Tensor:
    """What decides the label of whole photographs; resized to them, the strongest channel wins.

    kind: cam, refined_cam, random_walk or refined_random_walk.

    -> [B, S + 1, h, w] for each of the scores side by side, of any size: background, then the slots; absent classes 0.
    """
    _check(cam, slots, scores)
    if kind == "cam":
        return _softmax_stacks(cam.float(), slots, scores)
    if kind == "refined_cam":
        with phase("PAR"):
            stacks = _softmax_stacks(halve(cam.float()), slots, scores)
            return _refined(halve(images01.float()), stacks, slots, settings)
    walked = propagate(affinity, cam, slots, settings, scores)
    if kind == "random_walk":
        return walked
    with phase("PAR"):
        return _refined(halve(images01.float()), resize(walked, images01.shape[2:]), slots, settings)


@torch.no_grad()
def labels_of_one_diffusion(
    images01: Tensor,
    walked: Tensor,
    cam: Tensor,
    slots: ClassSlots,
    settings: LabelSettings,
    scores: Sequence[float],
    img_box: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`refine_label` and :func:`refine_propagated` in one diffusion of the whole padded crop.

    walked: from :func:`propagate`, with the same scores. The refinement's weights are made once for the batch, no image
    is treated on its own, and nothing depends on numbers on the host, so a CUDA graph can hold it all. The
    first label is the same as ever; the second is so where the photograph fills the crop, and elsewhere
    differs near the photograph's border, over which padding now has its say, and by half-pixel rounding of
    the box.
    """
    _check(cam, slots, scores, img_box)
    size = cam.shape[2:]
    with phase("PAR"):
        image = halve(images01.float())
        stacks = _softmax_stacks(halve(cam.float()), slots, scores)
        # The two resizes that refine_propagated (and PAR within it) do.
        walked = F.interpolate(resize(walked, size), image.shape[2:], mode="bilinear", align_corners=True)
        refined = _refined(image, torch.cat([stacks, walked], 1), slots, settings)
        labels = [_outside_ignored(_decide(part, size, slots), img_box) for part in refined.chunk(2, 1)]
        return labels[0], labels[1]


def _check(cam: Tensor, slots: ClassSlots, scores: Sequence[float], img_box: Tensor | None = None) -> None:
    if cam.ndim != 4 or slots.present.shape != cam.shape[:2]:
        raise ValueError(
            f"cam: expected [B, S, H, W] with a channel for each of the slots {list(slots.present.shape)},"
            f" got {list(cam.shape)}"
        )
    if img_box is not None and img_box.shape != (len(cam), 4):
        raise ValueError(f"img_box: expected [{len(cam)}, 4] (y0, y1, x0, x1), got {list(img_box.shape)}")
    if len(scores) not in (1, 2) or not 0 <= scores[0] <= scores[-1]:
        raise ValueError(f"scores: expected one background score, or two, 0 <= low <= high, got {tuple(scores)}")


def _softmax_stacks(cam: Tensor, slots: ClassSlots, scores: Sequence[float]) -> Tensor:
    """For each score a background channel and the CAMs [B, S, h, w], softmax over those that are present."""
    absent = ~slots.with_background[:, :, None, None]
    stacks = [torch.cat([torch.full_like(cam[:, :1], score), cam], 1) for score in scores]
    return torch.cat([stack.masked_fill(absent, -torch.inf).softmax(1) for stack in stacks], 1)


def _refined(images01: Tensor, stacks: Tensor, slots: ClassSlots, settings: LabelSettings) -> Tensor:
    return refine(images01, stacks, slots.with_background, settings)


def _decide(stacks: Tensor, size: Sequence[int], slots: ClassSlots) -> Tensor:
    """The label at ``size`` from the stacked channels of one or two background scores, low first.

    Absent classes are 0 in ``stacks``, background and present ones positive.
    """
    channels = slots.present.shape[1] + 1
    # max rather than argmax, which is ten times slower on the CPU
    labels = [resize(stack, size).max(1).indices for stack in stacks.split(channels, 1)]
    low, high = labels[0], labels[-1]
    return slots.name(torch.where(high > 0, high, torch.where(low > 0, IGNORE, 0)))


def inside_boxes(img_box: Tensor, size: Sequence[int], device: torch.device) -> Tensor:
    """Which pixels of the crops are the photographs'. img_box: [B, 4] (y0, y1, x0, x1) -> bool [B, H, W]."""
    y0, y1, x0, x1 = img_box.to(device, non_blocking=True)[:, :, None, None].unbind(1)
    rows = torch.arange(size[0], device=device)[:, None]
    columns = torch.arange(size[1], device=device)
    return (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)


def _outside_ignored(label: Tensor, img_box: Tensor | None) -> Tensor:
    if img_box is None:
        return label
    return torch.where(inside_boxes(img_box, label.shape[1:], label.device), label, IGNORE)
