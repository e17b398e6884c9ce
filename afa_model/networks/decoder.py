"""Decoders by name: four maps of a backbone, finest first, in; class scores out.

``segformer``: SegFormer's all-MLP decoder, evaluated without ever upsampling its inputs to the concatenated width.
Source: Xie et al., SegFormer (NeurIPS 2021), section 3.2; AFA uses an embedding of 256 with every backbone.

``largefov``: two dilated convolutions of the last map. Source: Chen et al., DeepLab (ICLR 2015), section 5, LargeFOV;
with 512 channels and a dilation of 5 in ToCo (Ru et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import resize
from .onednn import pointwise


class Projection(nn.Module):
    """Holds one map's linear layer under the public checkpoints' name; the decoder applies it."""

    def __init__(self, dim: int, embedding: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, embedding)


class ConvNorm(nn.Module):
    """Holds the fusing 1x1 convolution (no bias) and its batch norm."""

    def __init__(self, dim: int, embedding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, embedding, 1, bias=False)
        # As published. Batch norm hides the size of these weights, but a step of AdamW is relative to it.
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm2d(embedding)


class SegFormerHead(nn.Module):
    """Four maps, finest first -> class scores at the finest map's size.

    As published each map is projected to ``embedding`` channels, upsampled, concatenated and fused by a 1x1
    convolution. Projection, upsampling and fusion are all linear and interpolation weights sum to one, so
    here each map goes through the product of its two matrices at its own size, and what is upsampled
    (bilinear) is added up: the same numbers at a fraction of the work.
    """

    EMBEDDING = 256

    def __init__(
        self, in_dims: Sequence[int], num_classes: int, embedding: int = EMBEDDING, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if len(in_dims) != 4:
            raise ValueError(f"in_dims: expected the widths of four maps, got {tuple(in_dims)}")
        c1, c2, c3, c4 = in_dims
        self.embedding = embedding
        self.linear_c4 = Projection(c4, embedding)
        self.linear_c3 = Projection(c3, embedding)
        self.linear_c2 = Projection(c2, embedding)
        self.linear_c1 = Projection(c1, embedding)
        self.linear_fuse = ConvNorm(4 * embedding, embedding)
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(embedding, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: four [B, dim_i, h_i, w_i], finest first -> logits [B, num_classes, h_1, w_1]."""
        size = maps[0].shape[2:]
        # The fused input's channels are ordered coarsest first.
        branches = zip(
            reversed(maps),
            (self.linear_c4.proj, self.linear_c3.proj, self.linear_c2.proj, self.linear_c1.proj),
            self.linear_fuse.conv.weight.flatten(1).split(self.embedding, 1),
        )
        parts: list[Tensor] = []
        for x, linear, fuse in branches:
            part = pointwise(x, fuse @ linear.weight, fuse @ linear.bias)
            if parts and parts[-1].shape[2:] == part.shape[2:]:  # as the two coarsest have it in AFA
                parts[-1] = parts[-1] + part
            else:
                parts.append(part)
        parts = [part if part.shape[2:] == size else resize(part, size) for part in parts]
        x = self.dropout(F.relu(self.linear_fuse.bn(sum(parts[1:], parts[0]))))
        return pointwise(x, self.linear_pred.weight.flatten(1), self.linear_pred.bias)


class LargeFOVHead(nn.Module):
    """The last map -> class scores at its size: two 3x3 convolutions of ``embedding`` channels that reach ``dilation``
    cells far, each with ReLU, and a 1x1 convolution.
    """

    EMBEDDING = 512

    def __init__(
        self,
        in_dims: Sequence[int],
        num_classes: int,
        embedding: int = EMBEDDING,
        dropout: float = 0.1,
        dilation: int = 5,
    ) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(in_dims[-1], embedding, 3, padding=dilation, dilation=dilation)
        self.conv7 = nn.Conv2d(embedding, embedding, 3, padding=dilation, dilation=dilation)
        self.conv8 = nn.Conv2d(embedding, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        for conv in (self.conv6, self.conv7):  # no norm follows: the scores keep their size through the two ReLUs
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: of which the last, [B, dim, h, w], is taken -> logits [B, num_classes, h, w]."""
        x = F.relu(self.conv7(F.relu(self.conv6(maps[-1]))))
        return self.conv8(self.dropout(x))


DECODERS = {"segformer": SegFormerHead, "largefov": LargeFOVHead}
