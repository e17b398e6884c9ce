"""What a training photograph goes through: rescale, flip, padding, crop, normalisation.

The published run: rescaled by 0.5 to 2, flipped or not, padded with black to 512 x 512 where it is smaller, cropped to
that where it is larger. Every random choice comes from the sample's own seed, so a sample is the same whichever
process makes it and whenever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..conventions import MEAN, STD


@dataclass
class AugmentSettings:
    """How training photographs are varied.

    Args:
        crop: side of the square crop in pixels (512 in the published run).
        scale: smallest and largest factor by which the photograph is resized before cropping.
        flip: probability of a horizontal flip, 0..1.
        distort: also vary brightness, contrast, saturation and hue (not in the published run).
    """

    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    distort: bool = False

    def __post_init__(self) -> None:
        low, high = self.scale
        if self.crop < 16:
            raise ValueError(
                f"crop: expected at least 16 pixels (one cell of the model's grid), got {self.crop}"
            )
        if not 0 < low <= high:
            raise ValueError(f"scale: expected 0 < smallest <= largest, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: expected a probability in 0..1, got {self.flip}")


def normalize(photo: Tensor) -> Tensor:
    """uint8 0..255 [..., 3, H, W] -> float32, minus ImageNet's mean, over its standard deviation."""
    return F.normalize(F.to_dtype(photo, torch.float32, scale=True), MEAN, STD)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random choices on the CPU inside come from ``seed``; the state outside, CUDA's too, is left alone."""
    state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.random.set_rng_state(state)


class Choices(NamedTuple):
    """What is chosen at random for one photograph.

    ratio  factor by which it is resized
    flip   whether it is mirrored
    pad    (y, x) of the photograph in the padded one, which is as large as the crop where the photograph is smaller
    start  (y, x) of the crop in the padded one
    """

    ratio: float
    flip: bool
    pad: tuple[int, int]
    start: tuple[int, int]


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's photometric distortion without its swap of colour channels, which no photograph ever
    shows.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class TrainingTransform:
    """A photograph and a seed -> the crop a model is trained on, and where the photograph lies in it."""

    def __init__(self, settings: AugmentSettings):
        self.settings = settings
        self.distort = PhotometricDistort()

    def __call__(self, photo: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] -> float32 [3, crop, crop] normalised, and int64 [4] (y0, y1, x0, x1)."""
        with seeded(seed):
            return self.apply(photo, self.choose(*photo.shape[-2:]))

    def choose(self, height: int, width: int) -> Choices:
        """Draw from torch's generator: every ratio, place and window is as likely as any other."""
        settings = self.settings
        ratio = float(torch.empty((), dtype=torch.float64).uniform_(*settings.scale))
        flip = bool(torch.rand(()) < settings.flip)
        spare = [settings.crop - side for side in _resized(height, width, ratio)]
        pad = tuple(int(torch.randint(max(0, room) + 1, ())) for room in spare)
        start = tuple(int(torch.randint(max(0, -room) + 1, ())) for room in spare)
        return Choices(ratio, flip, pad, start)

    def apply(self, photo: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
        """What those choices make of a photograph; returns as the call does. Only a distortion draws from here on."""
        crop = self.settings.crop
        # Antialiased, on bytes: the pixels of Pillow's bilinear resize.
        size = _resized(*photo.shape[-2:], choices.ratio)
        if size == [1, 1]:  # which torch cannot on bytes
            image = F.resize(photo.float(), size, antialias=True).round().to(photo.dtype)
        else:
            image = F.resize(photo, size, antialias=True)
        if choices.flip:
            image = image.flip(-1)
        (y0, y1, top), (x0, x1, left) = (
            (at, min(at + side, crop), start) for at, side, start in zip(choices.pad, image.shape[-2:], choices.start)
        )
        image = image[..., top : top + y1 - y0, left : left + x1 - x0]
        if self.settings.distort:
            image = self.distort(image)
        # Black before the normalisation: to the network and to the refinement padding is a black surface.
        padded = image.new_zeros(*image.shape[:-2], crop, crop)
        padded[..., y0:y1, x0:x1] = image
        return normalize(padded), torch.tensor([y0, y1, x0, x1])


def _resized(height: int, width: int, ratio: float) -> list[int]:
    """Rounded down, as published, but no side to nothing."""
    return [max(1, int(ratio * height)), max(1, int(ratio * width))]
