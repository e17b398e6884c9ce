"""The part of an AFA that is deployed: photographs in, a label map or its scores out, at the photographs' own size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..conventions import MEAN, STD, resize
from .afa import AFA
from .backbone import cropped, pyramid

Takes = Literal["pixels", "bytes", "normalised"]
Gives = Literal["labels", "logits"]


class Segmenter(nn.Module):
    """Encoder and decoder of a model in one pass, as `afa predict --long_side 0 --scales [1] --flips false` runs them.

    Args:
        model: with a decoder; its tensors are shared.
        takes: ``pixels`` (float32 RGB in 0..255, normalised here), ``bytes`` (uint8, likewise) or ``normalised``
            (float32, by ImageNet's mean and deviation).
        gives: ``labels`` (int64 [B, H, W], the likeliest class) or ``logits`` (float32 [B, K, H, W]), background first.

    Raises:
        ValueError: the model is a CNN and has no decoder.
    """

    def __init__(self, model: AFA, takes: Takes = "pixels", gives: Gives = "labels") -> None:
        super().__init__()
        if model.decoder is None:
            raise ValueError(f"checkpoint: {model.backbone} has no decoder and gives CAMs only, no segmentation")
        self.encoder, self.decoder = model.encoder, model.decoder
        self.takes, self.gives = takes, gives
        for name, value in (("mean", MEAN), ("deviation", STD)):
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W]."""
        x = images if self.takes == "normalised" else (images.float() - self.mean) / self.deviation
        size = (images.shape[2], images.shape[3])
        logits = resize(cropped(self.encoder, self.decoder(pyramid(self.encoder, x).maps), size), size)
        return logits.argmax(1) if self.gives == "labels" else logits
