"""Everything a model says about one photograph: classes, CAM, affinity, and the label maps made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cams import evaluating, multi_scale_cam
from .pseudo_labels import cam_to_label, random_walk_label, refine_label
from .transforms import denormalize

# kinds of label map in the order in which they build on each other, and what tables and pictures call them
KINDS = {
    "cam": "CAM",
    "refined_cam": "CAM + PAR",
    "random_walk": "random walk",
    "refined_random_walk": "random walk + PAR",
    "segmentation": "segmentation",
}
_CAM_KINDS = ("cam", "refined_cam")


@dataclass
class LabelSettings:
    """How label maps are made from a photograph, at evaluation and prediction.

    Args:
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; None: as
            they are.
        scales: of the segmentation, each with a flipped copy; the largest logit counts.
        cam_scales: of the CAM, each with a flipped copy; they are summed.
        bkg_score: CAM value in 0..1 below which a pixel is background.
        radius: of the affinity's window, in cells of the model's grid.
        par_dilations: distances of PAR's neighbours in pixels.
        par_iterations: of PAR.
    """

    long_side: int | None = 512
    scales: tuple[float, ...] = (1.0, 0.5, 0.75)
    cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    bkg_score: float = 0.45
    radius: int = 8
    par_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    par_iterations: int = 10


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


def kinds_of(model: nn.Module, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The kinds of label map a model can give; those asked for, if any were.

    Raises:
        ValueError: an unknown kind, or one that needs attention and a decoder asked of a CNN.
    """
    offered = _CAM_KINDS if model.cam_only else tuple(KINDS)
    if asked is None:
        return offered
    for kind in asked:
        if kind not in KINDS:
            raise ValueError(f"kinds: unknown kind {kind!r}, expected some of {', '.join(KINDS)}")
        if kind not in offered:
            raise ValueError(f"kinds: {kind!r} needs a MiT backbone; this model gives {', '.join(offered)}")
    return tuple(kind for kind in KINDS if kind in asked)


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
    settings: LabelSettings,
    cls_labels: Tensor | None = None,
    kinds: Sequence[str] | None = None,
) -> LabelMaps:
    """Label maps of one photograph.

    Args:
        model: an :class:`~afa_model.model.AFA`, in any mode.
        image: float32 [3, H, W], normalised, of any size.
        settings: how.
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
        radius = None if model.cam_only else settings.radius
        cam, affinity = multi_scale_cam(model, small, settings.cam_scales, radius)

    cam = F.interpolate(cam, size, mode="bilinear", align_corners=False)
    for kind in kinds:
        if kind not in labels:
            label = _pseudo_label(kind, image, cam, affinity, given[None], settings)
            labels[kind] = label[0]
    return LabelMaps(
        probabilities=probabilities,
        cls_labels=given,
        cam=cam[0],
        affinity=None if affinity is None else affinity[0],
        labels={kind: labels[kind].long() for kind in kinds},
    )


def _pseudo_label(
    kind: str, image: Tensor, cam: Tensor, affinity: Tensor | None, present: Tensor, settings: LabelSettings
) -> Tensor:
    """One of the label maps made from the CAM, [1, H, W]; one background score, so no pixel is left open."""
    score = settings.bkg_score
    if not present.any():
        return torch.zeros_like(cam[:, 0], dtype=torch.long)
    if kind == "cam":
        return cam_to_label(cam, present, bkg_score=score)
    par = {"dilations": settings.par_dilations, "num_iter": settings.par_iterations}
    photo = denormalize(image.float())
    if kind == "refined_cam":
        return refine_label(photo, cam, present, high=score, low=score, **par)
    refine = kind == "refined_random_walk"
    return random_walk_label(
        photo, affinity, cam, present, None, settings.radius, score, score, refine=refine, **par
    )


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
            scaled_size = (max(1, int(height * scale)), max(1, int(width * scale)))
            scaled = F.interpolate(image, scaled_size, mode="bilinear", align_corners=False)
        result = model(torch.cat([scaled, scaled.flip(3)]))
        logits = F.interpolate(result.seg_logits.float(), size, mode="bilinear", align_corners=False)
        logits = torch.maximum(logits[:1], logits[1:].flip(3))
        best = logits if best is None else torch.maximum(best, logits)
        if scale == nearest:
            cls_logits = result.cls_logits.float().mean(0, keepdim=True)
    return best, cls_logits
