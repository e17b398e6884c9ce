"""A model of a few thousand parameters, a batch for it, and the settings with which a step is fully at work."""

from __future__ import annotations

from typing import Any

import torch

from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.training.step import StepSettings

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}
ALL = StepSettings(0, 1), LabelSettings(radius=2)  # iteration 2 is in the phase where everything is at work


def tiny(drop: float = 0.0, classes: int = 5) -> AFA:
    torch.manual_seed(0)
    arguments = {"embedding": 16, "decoder_dropout": drop, "backbone_args": TINY | {"drop_path_rate": drop}}
    return AFA("mit_b0", classes, **arguments).train()


VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64}


def small_vit(drop: float = 0.0, classes: int = 5, **changes: Any) -> AFA:
    """A Vision Transformer with patches of 16 pixels; ``changes`` are arguments of AFA."""
    torch.manual_seed(0)
    arguments = {"embedding": 16, "decoder_dropout": drop, "backbone_args": VIT | {"drop_path_rate": drop}}
    return AFA("vit_tiny_patch16_224", classes, **arguments | changes).train()


def batch(size: int = 64, seed: int = 0, count: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(count, 3, size, size, generator=generator).clamp(-1.5, 1.5),
        "cls_labels": torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]] * (count // 2)),
        "img_box": torch.tensor([[0, size, 3, size - 5], [7, size, 0, size]] * (count // 2)),
    }
