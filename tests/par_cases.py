"""Inputs of PAR that its tests share."""

from __future__ import annotations

import torch
from conftest import DEVICE


def on_device(array):
    return torch.tensor(array, device=DEVICE)


def inputs(rng, batch=1, channels=3, height=19, width=23, dtype=torch.float32):
    images = torch.rand(batch, 3, height, width, generator=rng).to(DEVICE, dtype)
    masks = torch.rand(batch, channels, height, width, generator=rng).to(DEVICE, dtype)
    return images, masks
