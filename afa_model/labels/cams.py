"""Multi-scale class activation maps with flips, and the affinity that goes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_kernels import window_affinity

from ..conventions import resize
from ..networks.backbone import cropped
from .slots import ClassSlots


class MultiScaleCAM(NamedTuple):
    """cam [B, C, H, W] in 0..1, each channel stretched to its own range, C = K - 1, or the slots given;
    affinity [B, (2r + 1)^2, h, w] of the largest scale, or None if no radius was given;
    aux_cam as cam, of the auxiliary classifier, or None if it was not asked for."""

    cam: Tensor
    affinity: Tensor | None
    aux_cam: Tensor | None = None


class Known(NamedTuple):
    """What a pass of a model gave that :func:`multi_scale_cam` would otherwise make again; fields as those of
    :class:`~afa_model.networks.afa.AFAResult`, None where it has no use for them; and ``mirrored_map``, the last map of
    the mirror images, if they went through it too."""

    last_map: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    aux_map: Tensor | None = None
    mirrored_map: Tensor | None = None

    @classmethod
    def of(cls, result: Any, scales: Sequence[float], affinity: bool, aux: bool) -> Known:
        """Of the result of a pass of the images themselves, what CAM and affinity at these scales need."""
        if 1 not in scales:
            return cls()
        query, key = (result.query, result.key) if affinity and max(scales) == 1 else (None, None)
        return cls(result.last_map, query, key, result.aux_map if aux else None)


class _Seen(NamedTuple):
    """Of one pass, as :class:`~afa_model.networks.afa.Attended`."""

    cam: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    aux_cam: Tensor | None = None


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


@torch.no_grad()
def multi_scale_cam(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    radius: int | None = None,
    slots: ClassSlots | None = None,
    known: Known | None = None,
    as_trained: bool = False,
    aux: bool = False,
) -> MultiScaleCAM:
    """CAM of an image and its mirror image at several scales (section 3.1).

    images: [B, 3, H, W] normalised. Each scale's pair is resized to the image (bilinear) and the larger of
    the two kept, negative evidence dropped, the scales summed, and every channel stretched to 0..1 by its own
    minimum and maximum. No gradient, no decoder; the model is in eval mode meanwhile, so that labels do not
    depend on drop-path noise.

    as_trained: leave the model in the mode it is in and run its decoder too, whose batch norm then learns from these
    passes as from any other (as published).

    radius: also give the affinity window of the largest scale (unmirrored), on that scale's grid.

    slots: of these images; only their channels are made -> cam [B, S, H, W].

    known: of a pass of these very images in a state where :func:`same_in_eval_mode` holds; scale 1 then takes maps,
    queries and keys of it instead of making them again.

    aux: also give the CAM of the auxiliary classifier, which the model must have.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    if radius is not None:
        model.require_attention("radius")
    affinity, totals = None, [_Total(images, slots) for _ in range(1 + aux)]
    with nullcontext() if as_trained else evaluating(model):
        for scale in scales:
            x = at_scale(images, scale)
            size = (x.shape[2], x.shape[3])
            seen = known if scale == 1 and not as_trained else None
            plain, mirrored = _pair(model, x, seen, as_trained)
            if radius is not None and scale == max(scales):
                grid = plain.cam.shape[2:]
                affinity = window_affinity(plain.query, plain.key, *model.affinity_head(), *grid, radius).float()
            for total, name in zip(totals, ("cam", "aux_cam")):
                total.add(*(cropped(model, total.pick(getattr(one, name)), size) for one in (plain, mirrored)))
    return MultiScaleCAM(totals[0].cam(), affinity, totals[1].cam() if aux else None)


def _pair(model: nn.Module, x: Tensor, known: Known | None, decode: bool) -> tuple[Any, Any]:
    """What the model says of images [B, 3, h, w] and of their mirror images, whose CAMs are mirrored still."""
    if known is not None and known.last_map is not None:
        aux_cam = None if known.aux_map is None else F.conv2d(known.aux_map, model.aux_classifier.weight)
        cam = F.conv2d(known.last_map, model.classifier.weight)
        plain = _Seen(cam, known.query, known.key, aux_cam)
        if known.mirrored_map is None:
            return plain, model.cam_and_attention(x.flip(3))
        return plain, _Seen(F.conv2d(known.mirrored_map, model.classifier.weight))
    both = model.cam_and_attention(torch.cat([x, x.flip(3)]), decode=decode)
    halves = [(None, None) if maps is None else maps.chunk(2) for maps in both]
    return tuple(_Seen(*(half[i] for half in halves)) for i in (0, 1))


class _Total:
    """The sum of CAMs over scales, at the images' size."""

    def __init__(self, images: Tensor, slots: ClassSlots | None) -> None:
        self.size, self.slots = images.shape[2:], slots
        self.sum: Tensor | None = None

    def pick(self, maps: Tensor) -> Tensor:
        """The channels that are wanted."""
        return maps if self.slots is None else self.slots.pick(maps)

    def add(self, plain: Tensor, mirrored: Tensor) -> None:
        """The larger of a pair, the second of which is mirrored."""
        cam = resize(torch.cat([plain, mirrored.flip(3)]).float(), self.size)
        cam = torch.maximum(*cam.chunk(2)).relu_()
        self.sum = cam if self.sum is None else self.sum.add_(cam)

    def cam(self) -> Tensor:
        return stretch(self.sum)


def at_scale(images: Tensor, scale: float) -> Tensor:
    """Photographs [B, 3, H, W] at a scale, bilinear, with sizes rounded down but to at least a pixel."""
    if scale == 1:
        return images
    return resize(images, [max(int(side * scale), 1) for side in images.shape[2:]])


def stretch(cam: Tensor) -> Tensor:
    """CAMs [B, C, h, w], each channel stretched to 0..1: minus its minimum, over the maximum of that plus 1e-5."""
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
