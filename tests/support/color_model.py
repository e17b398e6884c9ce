"""A stand-in for a trained model: it recognises the colours of the test photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_model.conventions import denormalize
from afa_model.networks.afa import AFAResult, Attended
from support.voc_factory import COLORS


class ColorModel(nn.Module):
    """The interface of ``AFA`` on a grid of 4 pixels: CAM, classes, segmentation and affinity follow from
    colours.
    """

    has_affinity, backbone, num_classes = True, "colors", 21

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)  # noise in training mode: whoever evaluates must switch it off
        self.head = nn.Parameter(torch.tensor([8.0]))
        self.bias = nn.Parameter(torch.tensor([-4.0]))

    def _shares(self, images: Tensor, cell: int = 4) -> Tensor:
        """Share of each class in each cell, [B, 21, h, w]."""
        distances = torch.full((len(images), 21, *images.shape[2:]), 9.0)
        for index, color in COLORS.items():
            target = torch.tensor(color).view(3, 1, 1) / 255
            distances[:, index] = (denormalize(images) - target).square().sum(1)
        nearest = F.one_hot(distances.argmin(1), 21).permute(0, 3, 1, 2).float()
        return self.dropout(F.avg_pool2d(nearest, cell, ceil_mode=True))

    def forward(self, images: Tensor, decode: bool = True) -> AFAResult:
        shares = self._shares(images)
        cls_logits = 40 * (shares[:, 1:].mean((2, 3)) - 0.02)
        seg_logits = self._shares(images, 1) if decode else None
        query = self._query(shares)
        return AFAResult(cls_logits, seg_logits, query, query, tuple(shares.shape[2:]))

    def cam_and_attention(self, images: Tensor, decode: bool = False) -> Attended:
        shares = self._shares(images)
        query = self._query(shares)
        return Attended(shares[:, 1:], query, query)

    def _query(self, shares: Tensor) -> Tensor:
        return shares.flatten(2).transpose(1, 2)[:, None]

    def affinity_head(self) -> tuple[Tensor, Tensor]:
        return self.head, self.bias

    def require_attention(self, what: str) -> None:
        pass
