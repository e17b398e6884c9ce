"""Everything a model says about one photograph: classes, CAM, affinity, and the label maps made from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import denormalize, halve, require, resize
from ..runtime.processes import autocast
from .cams import at_scale, evaluating, multi_scale_cam
from .crf import CrfSettings, crf, crf_size, shrunk
from .kinds import kinds_of
from .large import is_large, large_label, strongest
from .pseudo_labels import cam_to_label, random_walk_label, refine_label
from .settings import LabelSettings
from .slots import ClassSlots

_DECODED = {"segmentation", "segmentation_crf"}  # made by the decoder, without a CAM


@dataclass
class MapSettings:
    """In which sizes a photograph goes through the model, at evaluation and prediction.

    Args:
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; 0 or None: as
            they are.
        scales: of the segmentation; the largest logit counts.
        flips: each scale with a mirrored copy, the mean of whose logits counts.
        affinity_of: which pass gives the affinity of the random walk: the largest of the CAM's scales, as in
            training, or the plain one, of the photograph at scale 1.
        amp: bf16 runs the networks in bfloat16, auto does on a GPU that computes in it; off is as published. Where two
            classes are nearly as likely, the label may be another.
    """

    long_side: int | None = 512
    scales: tuple[float, ...] = (1.0, 0.5, 0.75)
    flips: bool = True
    affinity_of: Literal["largest", "plain"] = "largest"
    amp: Literal["auto", "bf16", "off"] = "off"

    def __post_init__(self) -> None:
        enough = not self.long_side or self.long_side >= 32
        require(enough, "long_side", "at least 32 pixels, or 0 for as they are", self.long_side)
        sizes = bool(self.scales) and all(0 < scale < math.inf for scale in self.scales)
        require(sizes, "scales", "positive numbers", self.scales)
        require(self.affinity_of in ("largest", "plain"), "affinity_of", "largest or plain", self.affinity_of)
        require(self.amp in ("auto", "bf16", "off"), "amp", "auto, bf16 or off", self.amp)


@dataclass
class LabelMaps:
    """What was found in one photograph of H x W pixels.

    Attributes:
        probabilities: [K-1] in 0..1: the classifier's, of the photograph at scale 1.
        cls_labels: [K-1] of 0 and 1: the classes taken as present, given or found.
        cam: [K-1, h, w] in 0..1, in the size in which the photograph went through the model, 0 for classes that are not
            present; None where none of the kinds asked for is made of it.
        affinity: [(2r+1)^2, h, w] in 0..1 on the grid of the pass that gave it; None without attention or CAM.
        labels: kind -> uint8 [H, W] in 0..K-1.
    """

    probabilities: Tensor
    cls_labels: Tensor
    cam: Tensor | None
    affinity: Tensor | None
    labels: dict[str, Tensor]

    @property
    def present(self) -> list[int]:
        """The classes (1..K-1) taken as present."""
        return (self.cls_labels.nonzero().flatten() + 1).tolist()


def found_classes(probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """Multi-hot [K-1] of the classes above ``threshold``, or of the likeliest one if there is none."""
    found = probabilities > threshold
    if not found.any():
        found = F.one_hot(probabilities.argmax(), len(probabilities)).bool()
    return found.to(probabilities.dtype)


@torch.no_grad()
def label_maps(
    model: nn.Module,
    image: Tensor,
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Tensor | None = None,
    kinds: Sequence[str] | None = None,
) -> LabelMaps:
    """Label maps of one photograph.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA`, in any mode.
        image: float32 [3, H, W], normalised, of any size.
        settings: the sizes it goes through the model in.
        how: labels are made from the CAM; with ``how.bkg_score``, so no pixel is left open.
        cls_labels: [K-1] multi-hot, the classes known to be present; None takes those the classifier finds.
        kinds: which label maps; None: all that the model offers but segmentation_crf; none: only what the classifier
            says.

    Labels are made at the photograph's own size from soft maps resized to it (bilinear), of a large photograph a
    band at a time (large.py): 24 megapixels take less than 2 GB, whatever the number of classes. A dense CRF needs a
    photograph whole, and makes it smaller where that alone would take more than 1.5 GiB (crf.py).
    """
    kinds = kinds_of(model, kinds) if kinds is None or len(kinds) else ()
    size = tuple(image.shape[-2:])
    image = image[None].to(next(model.parameters()).device)
    small = _resize_long_side(image, settings.long_side)
    labels: dict[str, Tensor] = {}
    with evaluating(model), autocast(settings.amp, image.device):
        plain = None
        if not _DECODED.isdisjoint(kinds):
            seg_logits, plain = _segment(model, small, settings)
        if "segmentation" in kinds:
            # at the photograph's size before the decision, as everything that is scored
            labels["segmentation"] = strongest(seg_logits[0], size)
        if "segmentation_crf" in kinds:
            labels["segmentation_crf"] = crf_label(image.float(), seg_logits, how.dense_crf)
        if plain is None:
            plain = model(small, decode=False)
        seen = _evidence(model, small, settings, how, cls_labels, plain, with_cam=not _DECODED.issuperset(kinds))

    if seen.cam is not None:
        label_of = _labeller(image, size, seen.cam, seen.affinity, seen.slots, how)
        labels |= {kind: label_of(kind) for kind in kinds if kind not in labels}
    return LabelMaps(
        probabilities=seen.probabilities,
        cls_labels=seen.cls_labels,
        cam=None if seen.cam is None else seen.slots.spread(seen.cam * seen.slots.present[:, :, None, None])[0],
        affinity=None if seen.affinity is None else seen.affinity[0],
        labels={kind: labels[kind] for kind in kinds},
    )


class Evidence(NamedTuple):
    """What the CAM's label maps of one photograph are made of.

    probabilities  [K-1] in 0..1, the classifier's, of the photograph at scale 1, or None
    cls_labels     [K-1] of 0 and 1, the classes taken as present, given or found
    slots          of these classes
    cam            [1, S, h, w] in 0..1, in the size in which the photograph went through the model, or None
    affinity       [1, (2r+1)^2, h, w] in 0..1 on the grid of the pass that gave it; None without attention or CAM
    """

    probabilities: Tensor | None
    cls_labels: Tensor
    slots: ClassSlots
    cam: Tensor | None
    affinity: Tensor | None


@torch.no_grad()
def evidence(
    model: nn.Module,
    image: Tensor,
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Tensor | None = None,
    threshold: float = 0.5,
) -> Evidence:
    """What the model says of the classes of a photograph, float32 [1, 3, H, W], normalised, on the model's device.

    cls_labels: [K-1] multi-hot; None takes the classes that the classifier gives more than ``threshold``, or the
    likeliest. Where they are given the classifier is asked only if its pass is to give the affinity: that is an eighth
    of the work.
    """
    with evaluating(model), autocast(settings.amp, image.device):
        small = _resize_long_side(image, settings.long_side)
        plain = model(small, decode=False) if cls_labels is None or settings.affinity_of == "plain" else None
        return _evidence(model, small, settings, how, cls_labels, plain, threshold)


def _evidence(
    model: nn.Module,
    small: Tensor,
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Tensor | None,
    plain: Any,
    threshold: float = 0.5,
    with_cam: bool = True,
) -> Evidence:
    """``plain``: what the model said of ``small``; None where neither classes nor affinity are to be had of it."""
    radius = how.radius if model.has_affinity else None
    plain_affinity = radius is not None and settings.affinity_of == "plain"
    probabilities = None if plain is None else plain.cls_logits[0].float().sigmoid()
    given = found_classes(probabilities, threshold) if cls_labels is None else cls_labels.to(small)
    slots = ClassSlots.of(given[None], limit=int((given > 0).sum()))
    cam = affinity = None
    if with_cam:
        by = how.cam_scales, None if plain_affinity else radius, slots
        cam, affinity, _ = multi_scale_cam(model, small, *by)
        cam = cam.float()
        if plain_affinity:
            affinity = model.affinity(plain, radius)[:1].float()
    return Evidence(probabilities, given, slots, cam, affinity)


def _labeller(
    image: Tensor, size: Sequence[int], cam: Tensor, affinity: Tensor | None, slots: ClassSlots, how: LabelSettings
) -> Callable[[str], Tensor]:
    """What makes the CAM's label maps of a photograph, normalised [1, 3, H, W] -> uint8 [H, W] by kind."""
    if is_large(size):
        # nothing of the photograph's size but the labels
        half01 = denormalize(halve(image.float()))
        return lambda kind: large_label(kind, half01, size, cam, affinity, slots, how)
    images01, cam = denormalize(image.float()), resize(cam, size)
    return lambda kind: pseudo_label(kind, images01, cam, affinity, slots, how)[0].to(torch.uint8)


def pseudo_label(
    kind: str, images01: Tensor, cam: Tensor, affinity: Tensor | None, slots: ClassSlots, how: LabelSettings
) -> Tensor:
    """A label map of the CAM [B, S, H, W] -> int64 [B, H, W]; one background score, so no pixel is left open."""
    if not slots.present.any():
        return torch.zeros_like(cam[:, 0], dtype=torch.long)
    if kind == "cam":
        return cam_to_label(cam, slots, how.one_score)
    if kind == "refined_cam":
        return refine_label(images01, cam, slots, how, how.one_score)
    refined = kind == "refined_random_walk"
    return random_walk_label(images01, affinity, cam, slots, how, how.one_walk_score, refined=refined)


def cam_label(image: Tensor, cam: Tensor, cls_labels: Tensor, how: LabelSettings) -> Tensor:
    """The label of a CAM after the refinement that ``how`` names; with ``none`` of the CAM itself, at full size.

    image: [3, H, W], normalised. cam: [K - 1, h, w] in 0..1. cls_labels: [K - 1] of 0 and 1 -> int64 [H, W].
    """
    slots, images01 = ClassSlots.of(cls_labels[None].to(cam)), denormalize(image[None].to(cam))
    cam = slots.pick(resize(cam[None], image.shape[1:]))
    kind = "cam" if how.refinement == "none" else "refined_cam"
    return pseudo_label(kind, images01, cam, None, slots, how)[0]


def crf_label(image: Tensor, logits: Tensor, settings: CrfSettings) -> Tensor:
    """The segmentation after the dense CRF, as published: on the softmax of the logits resized to the photograph.

    image: float32 [1, 3, H, W], normalised. logits: [1, K, h, w] -> uint8 [H, W] in 0..K-1.
    """
    size = image.shape[2:]
    small = crf_size(size, logits.shape[1])
    images01 = denormalize(shrunk(image, small))
    if small == tuple(size):
        # the photograph's own bytes: normalising and back moves them by a rounding, which may decide a simplex
        images01.mul_(255).round_().div_(255)
    return strongest(crf(images01, resize(logits, small).softmax(1), settings, size)[0], size)


def affinity_image(image: Tensor, settings: MapSettings, how: LabelSettings) -> Tensor:
    """A photograph [B, 3, H, W] as it goes through the model in the pass that gives :func:`label_maps`'s affinity."""
    small = _resize_long_side(image, settings.long_side)
    scale = 1 if settings.affinity_of == "plain" else max(how.cam_scales)
    return at_scale(small, scale)


def _resize_long_side(image: Tensor, long_side: int | None) -> Tensor:
    """Sizes rounded down and no antialiasing, as published."""
    height, width = image.shape[-2:]
    if not long_side:
        return image
    ratio = long_side / max(height, width)
    return resize(image, (max(1, int(height * ratio)), max(1, int(width * ratio))))


def _segment(model: nn.Module, image: Tensor, settings: MapSettings) -> tuple[Tensor, Any]:
    """Segmentation logits [1, K, h4, w4] on scale 1's grid (without that scale, on the largest one's), the largest over
    the scales; and what the model said at scale 1 of the photograph and maybe its mirror image, None without.
    """
    grid_of = 1 if 1 in settings.scales else max(settings.scales)
    best = plain = None
    for scale in sorted(settings.scales, key=lambda scale: scale != grid_of):
        scaled = image
        if scale != 1:
            # By factor, not by size: the grid is the factor's also where the size had to be rounded down.
            factor = max(scale, 1.001 / min(image.shape[-2:]))
            scaled = F.interpolate(image, scale_factor=factor, mode="bilinear", align_corners=False)
        result = model(torch.cat([scaled, scaled.flip(3)]) if settings.flips else scaled)
        logits = result.seg_logits.float()
        if settings.flips:
            logits = (logits[:1] + logits[1:].flip(3)) / 2
        best = logits if best is None else torch.maximum(best, resize(logits, best.shape[2:]))
        if scale == 1:
            plain = result
    return best, plain
