"""What a training photograph goes through: rescale, flip, crop, photometric distortion, normalisation.

The published run: rescale by 0.5 to 2, horizontal flip, photometric distortion, crop 512, padded with the
mean colour. Every random choice comes from the sample's own seed, so a sample is the same whichever process
makes it and whenever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
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
        distort: vary brightness, contrast, saturation and hue.
    """

    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    distort: bool = True

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
    return F.normalize(F.to_dtype(photo, torch.float32, scale=True), MEAN, STD).as_subclass(Tensor)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random choices on the CPU inside come from ``seed``; the state outside, CUDA's too, is left alone."""
    state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.random.set_rng_state(state)


class RandomRescale(v2.Transform):
    """Resize by a factor drawn uniformly from ``scale``."""

    def __init__(self, scale: tuple[float, float]):
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(()).uniform_(*self.scale))
        return {"size": [max(1, round(side * factor)) for side in v2.functional.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class RandomWindow(v2.Transform):
    """Keep a random window of at most ``crop`` by ``crop`` pixels (a shorter side is kept whole)."""

    def __init__(self, crop: int):
        super().__init__()
        self.crop = crop

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        return {
            "top": int(torch.randint(max(0, height - self.crop) + 1, ())),
            "left": int(torch.randint(max(0, width - self.crop) + 1, ())),
            "height": min(height, self.crop),
            "width": min(width, self.crop),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class RandomPlace(v2.Transform):
    """Pad to ``crop`` by ``crop`` with zeros, the photograph at a random place. After normalisation zero is
    the mean.
    """

    def __init__(self, crop: int):
        super().__init__()
        self.crop = crop

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        top = int(torch.randint(self.crop - height + 1, ()))
        left = int(torch.randint(self.crop - width + 1, ()))
        return {"padding": [left, top, self.crop - width - left, self.crop - height - top]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.pad, inpt, fill=0, **params)


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
        steps: list[v2.Transform] = [
            RandomRescale(settings.scale),
            v2.RandomHorizontalFlip(settings.flip),
            RandomWindow(settings.crop),  # before the distortion: fewer pixels to distort
        ]
        if settings.distort:
            steps.append(PhotometricDistort())
        steps += [
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
            RandomPlace(settings.crop),  # after the normalisation: the padding is exactly 0
        ]
        self.steps = v2.Compose(steps)

    def __call__(self, photo: tv_tensors.Image, seed: int) -> tuple[Tensor, Tensor]:
        """uint8 [3, H, W] -> float32 [3, crop, crop] normalised, and int64 [4] (y0, y1, x0, x1).

        The photograph's own outline travels through the same geometry as a bounding box, so nothing is
        computed twice.
        """
        height, width = photo.shape[-2:]
        outline = tv_tensors.BoundingBoxes(
            torch.tensor([[0, 0, width, height]], dtype=torch.float32),
            format="XYXY",
            canvas_size=(height, width),
        )
        with seeded(seed):
            image, outline = self.steps(tv_tensors.Image(photo), outline)
        x0, y0, x1, y1 = outline.as_subclass(Tensor)[0].round().long().tolist()
        return image.as_subclass(Tensor), torch.tensor([y0, y1, x0, x1])
