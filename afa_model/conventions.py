"""What all rooms agree on: the value of ignored pixels, what photographs are normalised by, how maps are resized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTWARE = "afa"  # who made a PNG, as its text says
IGNORE = 255  # label of pixels that take no part in any score or loss

# of ImageNet, on pixels in 0..1: what the backbones' weights were trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def denormalize(image: Tensor) -> Tensor:
    """A normalised photograph, float [..., 3, H, W] -> its pixels in 0..1.

    By numbers, colour by colour: a tensor of them would be copied to the device, which no CUDA graph can hold.
    """
    colours = [plane * deviation + mean for plane, mean, deviation in zip(image.unbind(-3), MEAN, STD)]
    return torch.stack(colours, -3).clamp_(0, 1)


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """For the checks that settings make of themselves.

    Raises:
        ValueError: ``NAME: expected WHAT, got VALUE``.
    """
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@contextmanager
def under(name: str) -> Iterator[None]:
    """For settings that hold others: what is wrong with those is named ``NAME.KEY``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """float [B, C, H, W] -> [B, C, *size], bilinear with ``align_corners=False``, no antialiasing."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def halve(maps: Tensor) -> Tensor:
    """To half the height and width, at least 1."""
    return resize(maps, [max(side // 2, 1) for side in maps.shape[2:]])
