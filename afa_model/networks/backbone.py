"""What AFA asks of a backbone: known by what it can do, not by its name.

A backbone with attention is a module with ``embed_dims``, ``affinity_heads``, ``affinity_blocks`` and
``forward_pyramid``, as `mit.py` and `vit.py` have them; one that pads images has ``cropped`` too. A timm model without
them gives its last feature map: it classifies and gives CAMs. `create.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Pyramid(NamedTuple):
    """What one pass of a backbone gives.

    maps   tensors [B, dim_i, h_i, w_i], finest first; four of a backbone with attention, one of a CNN
    query  [B, heads, N, d] of the last ``affinity_blocks`` blocks side by side, unscaled; N = h w of the last map. None
           where there is no attention
    key    the same shape
    aux    [B, dim, h, w] the tokens of an intermediate block, where asked for; else None
    """

    maps: list[Tensor]
    query: Tensor | None
    key: Tensor | None
    aux: Tensor | None = None


@dataclass(frozen=True)
class Abilities:
    """What a backbone can do.

    Attributes:
        widths: channels of the maps that it gives, finest first.
        affinity_heads: attention heads whose scores make an affinity, of all blocks that take part; None: no affinity.
        affinity_blocks: how many blocks those heads are of.
    """

    widths: tuple[int, ...]
    affinity_heads: int | None
    affinity_blocks: int

    @classmethod
    def of(cls, backbone: nn.Module) -> Abilities:
        if hasattr(backbone, "forward_pyramid"):
            return cls(tuple(backbone.embed_dims), backbone.affinity_heads, backbone.affinity_blocks)
        return cls(tuple(backbone.feature_info.channels()), None, 0)


def pyramid(backbone: nn.Module, images: Tensor) -> Pyramid:
    """One pass of a backbone."""
    if hasattr(backbone, "forward_pyramid"):
        return Pyramid(*backbone.forward_pyramid(images))
    return Pyramid([backbone(images)[-1]], None, None)


def cropped(model: nn.Module, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] that a backbone, or a network with one, gave of images of ``size`` (height, width), without
    what lies over padding: resized to the images they are where they belong. Where nothing is padded they stay as they
    are.
    """
    return model.cropped(maps, size) if hasattr(model, "cropped") else maps
