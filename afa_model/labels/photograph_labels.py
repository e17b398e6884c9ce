"""Pseudo-labels of one photograph at its own size, for training something else on: as a training step makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..conventions import IGNORE, denormalize, halve, resize
from ..runtime.phases import phase
from .evidence import Evidence
from .large import is_large, large_label, large_walk
from .pseudo_labels import cam_to_label, propagate, soft_label
from .settings import LabelSettings
from .slots import ClassSlots


@dataclass(frozen=True)
class PhotographLabel:
    """A label and how sure it is.

    Attributes:
        label: uint8 [H, W] in 0..K-1, 255 where it is left open.
        confidence: float16 [H, W] in 0..1, or None: of the maps that decided the pixel (softmax of CAM and background
            score, walked and refined as the kind says) the winner's share of their sum; 0 where the label is left open.
    """

    label: Tensor
    confidence: Tensor | None


@torch.no_grad()
def photograph_label(
    kind: str, image: Tensor, seen: Evidence, how: LabelSettings, unknown: bool = True, confidence: bool = False
) -> PhotographLabel:
    """One of the CAM's label maps.

    Args:
        kind: cam, refined_cam, random_walk or refined_random_walk.
        image: [1, 3, H, W], normalised.
        seen: what the model says of it.
        how: labels are made.
        unknown: with the two background scores of training, 255 where they disagree; else with the one of evaluation.
        confidence: also how sure it is.
    """
    size = tuple(image.shape[2:])
    if not seen.slots.present.any():
        label = torch.zeros(size, dtype=torch.uint8, device=image.device)
        return PhotographLabel(label, torch.ones(size, dtype=torch.float16) if confidence else None)
    of_walk = kind in ("random_walk", "refined_random_walk")
    scores = how.scores if unknown else how.one_walk_score if of_walk else how.one_score
    make = _large if is_large(size) else _small
    labels, shares = make(kind, image, seen, how, scores, confidence)
    low, high = labels[0], labels[-1]
    label = torch.where(high > 0, high, torch.where(low > 0, IGNORE, 0).to(torch.uint8))
    share = None
    if confidence:
        # what the low score calls background decided that; of the rest the high one decided what is foreground
        share = torch.where(high > 0, shares[-1], torch.where(low > 0, 0, shares[0]))
    return PhotographLabel(label, share)


@torch.no_grad()
def photograph_walk(size: Sequence[int], seen: Evidence, how: LabelSettings) -> Tensor:
    """The CAM after the random walk with the one background score of evaluation, on the affinity's grid.

    size: H, W of the photograph -> [1 + classes shown, h, w]: the background first; resized to the photograph its
    strongest channel is the random-walk label that evaluation scores.
    """
    make = large_walk if is_large(size) else _small_walk
    return make(size, seen.cam, seen.affinity, seen.slots, how)[0, seen.slots.with_background[0]]


def _small_walk(
    size: Sequence[int], cam: Tensor, affinity: Tensor, slots: ClassSlots, how: LabelSettings
) -> Tensor:
    return propagate(affinity, resize(cam, size), slots, how, how.one_walk_score)


Parts = tuple[list[Tensor], list[Tensor]]  # for each background score label uint8 [H, W], and share float16 [H, W]


def _small(
    kind: str, image: Tensor, seen: Evidence, how: LabelSettings, scores: Sequence[float], confidence: bool
) -> Parts:
    size, slots = image.shape[2:], seen.slots
    cam = resize(seen.cam, size)
    labels, shares = [], []
    if kind == "cam":
        labels = [cam_to_label(cam, slots, [score])[0].to(torch.uint8) for score in scores]
        if not confidence:
            return labels, shares
    stacks = soft_label(kind, denormalize(image.float()), cam, seen.affinity, slots, how, scores)
    with phase("PAR"):
        for stack in stacks.split(slots.present.shape[1] + 1, 1):
            maps = resize(stack, size)
            value, index = maps.max(1)
            if kind != "cam":
                labels.append(slots.name(index)[0].to(torch.uint8))
            if confidence:
                shares.append((value / maps.sum(1).clamp_min(torch.finfo(maps.dtype).tiny))[0].half())
    return labels, shares


def _large(
    kind: str, image: Tensor, seen: Evidence, how: LabelSettings, scores: Sequence[float], confidence: bool
) -> Parts:
    size = image.shape[2:]
    half01 = denormalize(halve(image.float()))
    labels, shares = [], []
    for score in scores:
        share = torch.empty(tuple(size), dtype=torch.float16, device=image.device) if confidence else None
        by = replace(how, bkg_score=score, walk_score=score)
        labels.append(large_label(kind, half01, size, seen.cam, seen.affinity, seen.slots, by, share))
        shares += [] if share is None else [share]
    return labels, shares
