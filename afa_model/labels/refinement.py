"""Refinement of soft labels along the photograph's edges, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from afa_kernels import pamr, par


def _none(images01: Tensor, maps: Tensor, dilations: tuple[int, ...], num_iter: int, *, class_mask: Tensor) -> Tensor:
    return maps


# name -> function(images01 [B, 3, H, W], maps [B, C, h, w], dilations, num_iter, class_mask=[B, C]) -> [B, C, ...], of
# the image's size, or of the maps' where it changes nothing.
REFINEMENTS = {"par": par, "pamr": pamr, "none": _none}


def check_refinement(name: str) -> str:
    """
    Raises:
        ValueError: there is no refinement of this name.
    """
    if name not in REFINEMENTS:
        raise ValueError(f"refinement: expected one of {', '.join(REFINEMENTS)}, got {name!r}")
    return name


def reach(name: str, dilations: Sequence[int], num_iter: int) -> int:
    """How far, in pixels, a refinement carries what a pixel holds."""
    return 0 if REFINEMENTS[check_refinement(name)] is _none else num_iter * max(dilations)


def refine(
    name: str, images01: Tensor, maps: Tensor, shown: Tensor, dilations: Sequence[int], num_iter: int
) -> Tensor:
    """Refine stacks of channels, each of background and classes in turn.

    Args:
        name: of :data:`REFINEMENTS`.
        images01: [B, 3, H, W] in 0..1.
        maps: [B, stacks x C, h, w], of any size.
        shown: [B, C] bool; channels of what an image does not show cost nothing and come back as 0.

    Returns:
        [B, stacks x C, ...] of the image's size; without a refinement the maps as they are.
    """
    mask = shown.repeat(1, maps.shape[1] // shown.shape[1])
    return REFINEMENTS[check_refinement(name)](images01, maps, tuple(dilations), num_iter, class_mask=mask)
