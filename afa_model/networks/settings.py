"""What a network is made by."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ..conventions import require


@dataclass
class ModelSettings:
    """The network.

    Args:
        backbone: mit_b0 ... mit_b5, or a timm CNN such as resnet50 (gives CAMs only: the paper's baseline).
        pretrained: file with ImageNet weights of the backbone (mit_b1.pth, or in Hugging Face's layout of
            nvidia/mit-b1); false trains from scratch, true lets timm fetch them.
        stride: of the four patch embeddings. Their product is the grid of CAM and affinity: 16 pixels.
        pooling: what turns class maps into class scores: global maximum (gmp) or average (gap).
    """

    backbone: str = "mit_b1"
    pretrained: bool | str = False
    stride: tuple[int, int, int, int] = (4, 2, 2, 1)
    pooling: Literal["gmp", "gap"] = "gmp"

    def __post_init__(self) -> None:
        if isinstance(self.pretrained, str):
            self.pretrained = os.path.expanduser(self.pretrained)
        require(all(stride >= 1 for stride in self.stride), "stride", "four numbers of at least 1", self.stride)
