"""Inputs of PAR that its tests share."""

from __future__ import annotations

import torch

from support.common import DEVICE


def on_device(array):
    return torch.tensor(array, device=DEVICE)


def inputs(rng, batch=1, channels=3, height=19, width=23, dtype=torch.float32):
    images = torch.rand(batch, 3, height, width, generator=rng).to(DEVICE, dtype)
    masks = torch.rand(batch, channels, height, width, generator=rng).to(DEVICE, dtype)
    return images, masks


# What crops of photographs have and uniform noise never has: neighbourhoods without any deviation, or with the least.
SCENES = ["flat", "one odd pixel", "blown-out sky", "black padding", "two greys", "single steps", "saturated edges"]


def scene(name: str, rng: torch.Generator, batch: int, height: int, width: int) -> torch.Tensor:
    """[B, 3, H, W] of float32 in 0..1, every value a whole number of 255ths, as a photograph's."""

    def grey(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=rng)

    shape = batch, 3, height, width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    if name == "flat":
        pixels = grey(0, 255, batch, 3, 1, 1).expand(shape)
    elif name == "one odd pixel":
        pixels = torch.where(grey(0, 1, batch, 1, 1, 1) > 0, 255, grey(0, 255, batch, 1, 1, 1)).expand(shape).clone()
        pixels[..., height // 2, width // 2] = grey(0, 255, batch, 3)
    elif name == "blown-out sky":
        horizon = height // 2 + grey(-1, 1, width)
        pixels = torch.where(rows < horizon, 255, grey(0, 255, *shape))
    elif name == "black padding":
        pixels = torch.where((rows < 2 * height // 3) & (columns < 2 * width // 3), grey(0, 255, *shape), 0)
    elif name == "two greys":
        pixels = grey(0, 254, batch, 1, 1, 1) + grey(0, 1, *shape)
    elif name == "single steps":
        pixels = (columns + rows // 4) % 256 + grey(0, 1, batch, 3, 1, 1)
    elif name == "saturated edges":
        pixels = 255 * (((columns // 7 + rows // 5) % 2)[None, None] ^ grey(0, 1, batch, 3, 1, 1))
    else:
        raise ValueError(name)
    return (pixels.clamp(0, 255) / 255).expand(shape).contiguous()
