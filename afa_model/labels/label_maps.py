"""Everything a model says about one photograph: classes, CAM, affinity, and the label maps made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import denormalize, resize
from .cams import evaluating, multi_scale_cam
from .kinds import kinds_of
from .pseudo_labels import cam_to_label, random_walk_label, refine_label
from .settings import LabelSettings
from .slots import ClassSlots


@dataclass
class MapSettings:
    """In which sizes a photograph goes through the model, at evaluation and prediction.

    Args:
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; None: as
            they are.
        scales: of the segmentation, each with a flipped copy; the largest logit counts.
    """

    long_side: int | None = 512
    scales: tuple[float, ...] = (1.0, 0.5, 0.75)

    def __post_init__(self) -> None:
        if self.long_side is not None and self.long_side < 32:
            raise ValueError(f"long_side: expected at least 32 pixels, got {self.long_side}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales: expected positive numbers, got {self.scales}")


@dataclass
class LabelMaps:
    """What was found in one photograph of H x W pixels.

    Attributes:
        probabilities: [K-1] in 0..1: the classifier's.
        cls_labels: [K-1] of 0 and 1: the classes taken as present, given or found.
        cam: [K-1, H, W] in 0..1.
        affinity: [(2r+1)^2, h, w] in 0..1 on the grid of the largest CAM scale; None without attention.
        labels: kind -> int64 [H, W] in 0..K-1.
    """

    probabilities: Tensor
    cls_labels: Tensor
    cam: Tensor
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
        kinds: which label maps; None: all that the model offers.

    Labels are made at the photograph's own size from soft maps resized to it (bilinear).
    """
    kinds = kinds_of(model, kinds)
    size = tuple(image.shape[-2:])
    image = image[None].to(next(model.parameters()).device)
    small = _resize_long_side(image, settings.long_side)
    labels: dict[str, Tensor] = {}

    with evaluating(model):
        if "segmentation" in kinds:
            seg_logits, cls_logits = _segment(model, small, settings.scales, size)
            labels["segmentation"] = seg_logits.argmax(1)[0]
        else:
            cls_logits = model(small, decode=False).cls_logits
        probabilities = cls_logits[0].float().sigmoid()
        given = found_classes(probabilities) if cls_labels is None else cls_labels.to(probabilities)
        radius = how.radius if model.has_affinity else None
        cam, affinity = multi_scale_cam(model, small, how.cam_scales, radius)

    cam, slots = resize(cam, size), ClassSlots.of(given[None])
    for kind in kinds:
        if kind not in labels:
            labels[kind] = pseudo_label(kind, denormalize(image.float()), cam, affinity, slots, how)[0]
    return LabelMaps(
        probabilities=probabilities,
        cls_labels=given,
        cam=cam[0],
        affinity=None if affinity is None else affinity[0],
        labels={kind: labels[kind].long() for kind in kinds},
    )


def pseudo_label(
    kind: str, images01: Tensor, cam: Tensor, affinity: Tensor | None, slots: ClassSlots, how: LabelSettings
) -> Tensor:
    """A label map of the CAM [B, K-1, H, W] -> [B, H, W]; one background score, so no pixel is left open."""
    if not slots.present.any():
        return torch.zeros_like(cam[:, 0], dtype=torch.long)
    cam, scores = slots.pick(cam), how.one_score
    if kind == "cam":
        return cam_to_label(cam, slots, scores)
    if kind == "refined_cam":
        return refine_label(images01, cam, slots, how, scores)
    refined = kind == "refined_random_walk"
    return random_walk_label(images01, affinity, cam, slots, how, scores, refined=refined)


def _resize_long_side(image: Tensor, long_side: int | None) -> Tensor:
    height, width = image.shape[-2:]
    if long_side is None or max(height, width) == long_side:
        return image
    factor = long_side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def _segment(
    model: nn.Module, image: Tensor, scales: Sequence[float], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Largest segmentation logit [1, K, *size] over scales and flips; class logits [1, K-1] at the scale
    nearest 1.
    """
    best, cls_logits = None, None
    nearest = min(scales, key=lambda scale: abs(scale - 1))
    height, width = image.shape[-2:]
    for scale in scales:
        scaled = image
        if scale != 1:
            scaled = resize(image, (max(1, int(height * scale)), max(1, int(width * scale))))
        result = model(torch.cat([scaled, scaled.flip(3)]))
        logits = resize(result.seg_logits.float(), size)
        logits = torch.maximum(logits[:1], logits[1:].flip(3))
        best = logits if best is None else torch.maximum(best, logits)
        if scale == nearest:
            cls_logits = result.cls_logits.float().mean(0, keepdim=True)
    return best, cls_logits
