"""Reads the weights of Vision Transformers from the files in circulation.

timm's own; DeiT's (under ``model``); DINO's (``teacher``, ``student``, ``backbone.``); CLIP's, whose visual part is
taken (``visual.``); as ``.pth``, ``.bin`` or ``.safetensors``. Position embeddings of another grid are resampled, heads
left out, and all else has to fit.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn


def load_vit_weights(model: nn.Module, path: str | Path, name: str) -> None:
    raise NotImplementedError
