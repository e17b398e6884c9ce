"""What the networks say of photographs: classes, CAM, affinity and segmentation logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import require, resize
from ..runtime.notices import notice
from ..runtime.precision import autocast
from ..runtime.processes import laid_out, memory_format
from .cams import Known, at_scale, evaluating, multi_scale_cam
from .settings import LabelSettings
from .slots import ClassSlots

DECODED = {"segmentation", "segmentation_crf"}  # kinds made by the decoder, without a CAM


@dataclass
class MapSettings:
    """In which sizes a photograph goes through the model, at evaluation and prediction.

    Args:
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; 0 or None: as
            they are.
        scales: of the segmentation; the largest logit counts.
        flips: each scale with a mirrored copy, the mean of whose logits counts; both go through the model at once.
        affinity_of: which pass gives the affinity of the random walk: the largest of the CAM's scales, as in
            training, or the plain one, of the photograph at scale 1.
        amp: bf16 runs the networks in bfloat16, auto does on a GPU that computes in it; off is as published. Where two
            classes are nearly as likely, the label may be another.
        channels_last: keep images and convolution weights in channels_last memory format. Results differ by roundings.
    """

    long_side: int | None = 512
    scales: tuple[float, ...] = (1.0, 0.5, 0.75)
    flips: bool = True
    affinity_of: Literal["largest", "plain"] = "largest"
    amp: Literal["auto", "bf16", "off"] = "off"
    channels_last: bool = False

    def __post_init__(self) -> None:
        enough = not self.long_side or self.long_side >= 32
        require(enough, "long_side", "at least 32 pixels, or 0 for as they are", self.long_side)
        sizes = bool(self.scales) and all(0 < scale < math.inf for scale in self.scales)
        require(sizes, "scales", "positive numbers", self.scales)
        require(self.affinity_of in ("largest", "plain"), "affinity_of", "largest or plain", self.affinity_of)
        require(self.amp in ("auto", "bf16", "off"), "amp", "auto, bf16 or off", self.amp)


def found_classes(probabilities: Tensor, threshold: float = 0.5) -> Tensor:
    """Multi-hot [K-1] of the classes above ``threshold``, or of the likeliest one if there is none."""
    found = probabilities > threshold
    if not found.any():
        found = F.one_hot(probabilities.argmax(), len(probabilities)).bool()
    return found.to(probabilities.dtype)


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
    likeliest. Where they are given the classifier is asked only if its pass is to give the affinity.
    """
    return evidence_of_several(model, [image], settings, how, [cls_labels], threshold)[0]


@torch.no_grad()
def evidence_of_several(
    model: nn.Module,
    images: Sequence[Tensor],
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Sequence[Tensor | None],
    threshold: float = 0.5,
) -> list[Evidence]:
    """:func:`evidence` of each of several photographs; those that go through the model in the same size do so at once.
    """
    return [seen for _, seen in look(model, images, settings, how, cls_labels, ("cam",), threshold)]


Looked = tuple[Tensor | None, Evidence]  # segmentation logits [1, K, h4, w4], and the rest


def look(
    model: nn.Module,
    images: Sequence[Tensor],
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Sequence[Tensor | None],
    kinds: Sequence[str],
    threshold: float = 0.5,
    classify: bool = False,
) -> list[Looked]:
    """Photographs [1, 3, H, W] through the networks, for what ``kinds`` are made of; ``classify``: ask the classifier
    also of those whose classes are given.
    """
    smalls = [_resize_long_side(image, settings.long_side) for image in images]
    together: dict[tuple, list[int]] = {}
    for number, (small, labels) in enumerate(zip(smalls, cls_labels)):
        together.setdefault((small.shape, labels is None), []).append(number)

    def at_once(numbers: list[int]) -> list[Looked]:
        small = smalls[numbers[0]] if len(numbers) == 1 else torch.cat([smalls[number] for number in numbers])
        if settings.channels_last:
            small = small.contiguous(memory_format=memory_format(settings.channels_last))
        given = [cls_labels[number] for number in numbers]
        return _look_at_once(model, small, settings, how, given, kinds, threshold, classify)

    found: dict[int, Looked] = {}
    device = next(model.parameters()).device
    with evaluating(model), laid_out(model, settings.channels_last), autocast(settings.amp, device):
        for numbers in together.values():
            found |= zip(numbers, _halved_if_need_be(at_once, numbers))
    return [found[number] for number in range(len(images))]


def _halved_if_need_be(at_once: Callable[[list[int]], list[Looked]], numbers: list[int]) -> list[Looked]:
    """What ``at_once`` gives of photographs, half of them at a time where the memory does not suffice for all."""
    try:
        return at_once(numbers)
    except torch.OutOfMemoryError:
        if len(numbers) == 1:
            raise
    # here, and not above: the error holds on to what was computed until then
    notice("batch", f"memory does not suffice for {len(numbers)} photographs at once, so they go in halves (batch)")
    half = len(numbers) // 2
    return _halved_if_need_be(at_once, numbers[:half]) + _halved_if_need_be(at_once, numbers[half:])


def _look_at_once(
    model: nn.Module,
    small: Tensor,
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Sequence[Tensor | None],
    kinds: Sequence[str],
    threshold: float,
    classify: bool,
) -> list[Looked]:
    """As :func:`look`, of photographs [B, 3, h, w] as they go through the networks at scale 1."""
    seg_logits = plain = None
    if not DECODED.isdisjoint(kinds):
        seg_logits, plain = _segment(model, small, settings)
    if plain is None and (classify or any(labels is None for labels in cls_labels) or settings.affinity_of == "plain"):
        plain = model(small, decode=False)
    with_cam = not DECODED.issuperset(kinds)
    logits = [None] * len(small) if seg_logits is None else seg_logits.split(1)
    return list(zip(logits, _evidence(model, small, settings, how, cls_labels, plain, threshold, with_cam)))


def _evidence(
    model: nn.Module,
    small: Tensor,
    settings: MapSettings,
    how: LabelSettings,
    cls_labels: Sequence[Tensor | None],
    plain: Any,
    threshold: float,
    with_cam: bool,
) -> Iterator[Evidence]:
    """Of each of photographs [B, 3, h, w]. ``plain``: what the model said of them and maybe their mirror images; None
    where neither classes nor affinity are to be had of it.
    """
    count, radius = len(small), how.radius if model.has_affinity else None
    plain_affinity = radius is not None and settings.affinity_of == "plain"
    said = [None] * count if plain is None else list(plain.cls_logits[:count].float().sigmoid())
    given = [
        found_classes(probabilities, threshold) if labels is None else labels.to(small)
        for probabilities, labels in zip(said, cls_labels)
    ]
    present = torch.stack(given)
    slots = ClassSlots.of(present, limit=int((present > 0).sum(1).max()))
    cam = affinity = None
    if with_cam:
        by = how.cam_scales, None if plain_affinity else radius
        cam, affinity, _ = multi_scale_cam(model, small, *by, slots, _known(plain, count, *by))
        cam = cam.float()
        if plain_affinity:
            affinity = model.affinity(plain, radius)[:count].float()
    for i in range(count):
        own, own_cam = slots.alone(i, cam)
        yield Evidence(said[i], given[i], own, own_cam, None if affinity is None else affinity[i : i + 1])


def _known(plain: Any, count: int, scales: Sequence[float], radius: int | None) -> Known | None:
    """What CAM and affinity need not make again of ``count`` photographs that went through the model before, maybe with
    their mirror images after them.
    """
    if plain is None:
        return None
    both = Known.of(plain, scales, radius is not None, aux=False)
    known = Known(*(None if maps is None else maps[:count] for maps in both))
    if both.last_map is None or len(both.last_map) == count:
        return known
    return known._replace(mirrored_map=both.last_map[count:])


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
    """Segmentation logits [B, K, h4, w4] of photographs [B, 3, h, w] on scale 1's grid (without that scale, on the
    largest one's), the largest over the scales; and what the model said at scale 1 of the photographs and maybe, after
    them, of their mirror images, None without.
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
            plain_logits, mirrored = logits.chunk(2)
            logits = (plain_logits + mirrored.flip(3)) / 2
        best = logits if best is None else torch.maximum(best, resize(logits, best.shape[2:]))
        if scale == 1:
            plain = result
    return best, plain
