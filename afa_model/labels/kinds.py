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
ON_REQUEST = {"segmentation_crf": "segmentation + CRF"}  # seconds for each photograph
CAM_KINDS = ("cam", "refined_cam")  # what a model without attention and decoder gives


def title(kind: str, refinement: str = "par") -> str:
    """What tables call a kind of label map, with the name of the refinement that made it."""
    called = "no refinement" if refinement == "none" else refinement.upper()
    return (KINDS | ON_REQUEST).get(kind, kind).replace("PAR", called)


def check_kinds(asked: Sequence[str]) -> None:
    """
    Raises:
        ValueError: there is no such kind, or none is asked for.
    """
    for kind in asked:
        if kind not in KINDS | ON_REQUEST:
            raise ValueError(f"kinds: unknown kind {kind!r}, expected some of {', '.join(KINDS | ON_REQUEST)}")
    if not asked:
        raise ValueError(f"kinds: expected some of {', '.join(KINDS | ON_REQUEST)}, got none")


def kinds_of(model: nn.Module, asked: Sequence[str] | None = None, crf: bool = False) -> tuple[str, ...]:
    """The kinds of label map a model can give; those asked for, if any were. ``crf``: and the segmentation after a CRF.

    Raises:
        ValueError: an unknown kind, or one that needs attention and a decoder asked of a CNN.
    """
    usual = tuple(KINDS) if model.has_affinity else CAM_KINDS
    offered = (*usual, *ON_REQUEST) if model.has_affinity else usual
    if asked is None:
        asked = usual
    check_kinds(asked)
    if crf:
        asked = (*asked, "segmentation_crf")
    for kind in asked:
        if kind not in offered:
            raise ValueError(f"kinds: {kind!r} needs a backbone with attention; this model gives {', '.join(offered)}")
    return tuple(kind for kind in KINDS | ON_REQUEST if kind in asked)
