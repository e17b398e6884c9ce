"""The kinds of label map, in the order in which they build on each other, and what tables and pictures call them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

KINDS = {
    "cam": "CAM",
    "refined_cam": "CAM + PAR",
    "random_walk": "random walk",
    "refined_random_walk": "random walk + PAR",
    "segmentation": "segmentation",
}
CAM_KINDS = ("cam", "refined_cam")  # what a model without attention and decoder gives


def kinds_of(model: nn.Module, asked: Sequence[str] | None = None) -> tuple[str, ...]:
    """The kinds of label map a model can give; those asked for, if any were.

    Raises:
        ValueError: an unknown kind, or one that needs attention and a decoder asked of a CNN.
    """
    offered = tuple(KINDS) if model.has_affinity else CAM_KINDS
    if asked is None:
        return offered
    for kind in asked:
        if kind not in KINDS:
            raise ValueError(f"kinds: unknown kind {kind!r}, expected some of {', '.join(KINDS)}")
        if kind not in offered:
            raise ValueError(f"kinds: {kind!r} needs a MiT backbone; this model gives {', '.join(offered)}")
    return tuple(kind for kind in KINDS if kind in asked)
