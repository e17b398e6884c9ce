"""Refinement of soft labels along the photograph's edges, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import pamr, par

from .crf import crf, crf_size

if TYPE_CHECKING:
    from .settings import LabelSettings


def _diffused(
    operator: Callable[..., Tensor], weights: Callable[[LabelSettings], Mapping[str, float]] = lambda how: {}
) -> Callable[..., Tensor]:
    """Channels that know nothing of each other, so all stacks are one."""

    def refined(images01: Tensor, maps: Tensor, shown: Tensor, how: LabelSettings) -> Tensor:
        mask = shown.repeat(1, maps.shape[1] // shown.shape[1])
        return operator(images01, maps, tuple(how.dilations), how.num_iter, **weights(how), class_mask=mask)

    return refined


def _weights(how: LabelSettings) -> Mapping[str, float]:
    return dict(zip(("w1", "w2", "w3"), how.par_weights))


def _crf(images01: Tensor, maps: Tensor, shown: Tensor, how: LabelSettings) -> Tensor:
    """The classes that an image shows are all that there are for it: no other has a probability to win back."""
    classes = shown.shape[1]
    small = crf_size(images01.shape[2:], classes)
    refined = maps.new_zeros(len(maps), maps.shape[1], *small)
    for image, stacks, own, out in zip(images01.split(1), maps.unflatten(1, (-1, classes)), shown, refined):
        index = own.nonzero().flatten()
        probs = stacks[:, index]
        if probs.shape[2:] != small:
            # with aligned corners, as the other refinements resize
            probs = F.interpolate(probs, small, mode="bilinear", align_corners=True)
        probs = probs / probs.sum(1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
        out.unflatten(0, (-1, classes))[:, index] = crf(image.expand(len(probs), -1, -1, -1), probs, how.dense_crf)
    return refined


def _none(images01: Tensor, maps: Tensor, shown: Tensor, how: LabelSettings) -> Tensor:
    return maps


# name -> function of what `refine` takes
REFINEMENTS = {"par": _diffused(par, _weights), "pamr": _diffused(pamr), "crf": _crf, "none": _none}


def check_refinement(name: str) -> str:
    """
    Raises:
        ValueError: there is no refinement of this name.
    """
    if name not in REFINEMENTS:
        raise ValueError(f"refinement: expected one of {', '.join(REFINEMENTS)}, got {name!r}")
    return name


def reach(how: LabelSettings) -> int | None:
    """How far, in pixels, a refinement carries what a pixel holds; None: through the whole image, and its classes
    cannot be refined apart.
    """
    name = check_refinement(how.refinement)
    if name == "crf":
        return None
    return 0 if name == "none" else how.num_iter * max(how.dilations)


def refine(images01: Tensor, maps: Tensor, shown: Tensor, how: LabelSettings) -> Tensor:
    """Refine stacks of channels, each of background and classes in turn, by ``how.refinement``.

    Args:
        images01: [B, 3, H, W] in 0..1.
        maps: [B, stacks x C, h, w], of any size; for ``crf`` probabilities, or what they are a share of.
        shown: [B, C] bool; channels of what an image does not show cost nothing and come back as 0.

    Returns:
        [B, stacks x C, ...] of the image's size (of :func:`~.crf.crf_size` for ``crf``, smaller where the image is too
        large); without a refinement the maps as they are.
    """
    return REFINEMENTS[check_refinement(how.refinement)](images01, maps, shown, how)
