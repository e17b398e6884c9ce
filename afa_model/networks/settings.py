"""What a network is made by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from ..conventions import require

STRIDE = (4, 2, 2, 1)  # as published


@dataclass
class ModelSettings:
    """The network.

    Args:
        backbone: mit_b0 ... mit_b5; a Vision Transformer of timm's such as vit_base_patch16_224.augreg_in21k_ft_in1k
            (ViT, DeiT, DINO, EVA-02, CLIP, ...); or a timm CNN such as resnet50 (gives CAMs only: the paper's
            baseline).
        pretrained: file with ImageNet weights of the backbone (mit_b1.pth, or in Hugging Face's layout of
            nvidia/mit-b1; a Vision Transformer's as timm, DeiT, DINO or CLIP write them); false trains from scratch,
            true lets timm fetch them.
        stride: of the four patch embeddings. Their product is the grid of CAM and affinity: 16 pixels. A Vision
            Transformer's grid is its patches', whatever they are.
        pooling: what turns class maps into class scores: global maximum (gmp) or average (gap).
        decoder: segformer (the MLP over four maps) or largefov (two dilated 3x3 convolutions of the last map, as
            DeepLab-LargeFOV and ToCo have it).
        affinity_blocks: how many of the last blocks give the queries and keys of the affinity (all if there are fewer).
        aux_layer: block of a Vision Transformer whose tokens a second classifier sees, and whose CAM can supervise;
            negative counts from the end (ToCo: -3); null for none.
        freeze_backbone: leave the backbone as it is: no gradient, no drop path; only classifier, decoder and affinity
            head learn.
    """

    backbone: str = "mit_b1"
    pretrained: bool | str = False
    stride: tuple[int, int, int, int] = STRIDE
    pooling: Literal["gmp", "gap"] = "gmp"
    decoder: Literal["segformer", "largefov"] = "segformer"
    affinity_blocks: int = 2
    aux_layer: int | None = None
    freeze_backbone: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pretrained, str):
            self.pretrained = os.path.expanduser(self.pretrained)
        require(all(stride >= 1 for stride in self.stride), "stride", "four numbers of at least 1", self.stride)
        require(self.affinity_blocks >= 1, "affinity_blocks", "at least 1", self.affinity_blocks)

    def arguments(self) -> dict[str, Any]:
        """For :class:`~afa_model.networks.afa.AFA`, all but ``num_classes`` and ``pretrained``."""
        return {name: getattr(self, name) for name in vars(self) if name != "pretrained"}
