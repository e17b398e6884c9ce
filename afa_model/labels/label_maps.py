"""Label maps of photographs, made at their own size of what the networks say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conventions import denormalize, halve, resize
from .crf import CrfSettings, crf, crf_size, shrunk
from .evidence import Evidence, MapSettings, look
from .kinds import kinds_of
from .large import is_large, large_label, strongest
from .pseudo_labels import cam_to_label, random_walk_label, refine_label
from .settings import LabelSettings
from .slots import ClassSlots


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
    return next(label_maps_of_several(model, [image], settings, how, [cls_labels], kinds))


@torch.no_grad()
def label_maps_of_several(
    model: nn.Module,
    images: Sequence[Tensor],
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Sequence[Tensor | None],
    kinds: Sequence[str] | None = None,
) -> Iterator[LabelMaps]:
    """What :func:`label_maps` gives of each of several photographs, of any sizes, in their order.

    Those that go through the model in the same size do so at once; nothing is padded. All go through it before the
    first one's labels are made, and those are then made one photograph after the other.
    """
    kinds = kinds_of(model, kinds) if kinds is None or len(kinds) else ()
    device = next(model.parameters()).device
    images = [image[None].to(device) for image in images]
    seen = look(model, images, settings, how, cls_labels, kinds, classify=True)
    for image, (seg_logits, one) in zip(images, seen):
        yield _maps_of(image, seg_logits, one, how, kinds)


def _maps_of(
    image: Tensor, seg_logits: Tensor | None, seen: Evidence, how: LabelSettings, kinds: Sequence[str]
) -> LabelMaps:
    """Of a photograph, normalised [1, 3, H, W], what was seen in it, and the label maps made of that."""
    size = tuple(image.shape[-2:])
    labels: dict[str, Tensor] = {}
    if "segmentation" in kinds:
        # at the photograph's size before the decision, as everything that is scored
        labels["segmentation"] = strongest(seg_logits[0], size)
    if "segmentation_crf" in kinds:
        labels["segmentation_crf"] = crf_label(image.float(), seg_logits, how.dense_crf)
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
