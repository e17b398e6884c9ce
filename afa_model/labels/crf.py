"""The dense CRF (Krähenbühl and Koltun, 2011) on soft labels: its settings, and the size in which it works."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from afa_kernels import dense_crf

from ..conventions import require
from ..runtime.notices import notice

MOST_BYTES = 3 * 2**29
"""That the CRF of one photograph should take. With 21 classes 1.5 megapixels go through whole, with 81 0.6."""

# Of the lattices; of the distributions, with channels padded to 16. Photographs of VOC take half of it on the CPU, one
# whose every pixel has grain of five grey levels, and so lattice points of its own, up to twice as much.
_PIXEL_BYTES, _VALUE_BYTES = 250, 24


@dataclass
class CrfSettings:
    """The dense CRF; the defaults are the published ones for VOC. Standard deviations of place are in pixels of what is
    refined: the photograph for a segmentation, half of it for the labels of a CAM.

    Args:
        num_iter: iterations of mean field.
        pos_w: weight of the kernel of place alone.
        pos_xy_std: its standard deviation in pixels.
        bi_w: weight of the kernel of place and colour.
        bi_xy_std: its standard deviation of place in pixels.
        bi_rgb_std: its standard deviation of colour in grey levels, of 0..255.
    """

    num_iter: int = 10
    pos_w: float = 3.0
    pos_xy_std: float = 3.0
    bi_w: float = 4.0
    bi_xy_std: float = 64.0
    bi_rgb_std: float = 5.0

    def __post_init__(self) -> None:
        require(0 <= self.num_iter < math.inf, "num_iter", "at least 0", self.num_iter)
        for name in ("pos_w", "bi_w"):
            require(0 <= getattr(self, name) < math.inf, name, "at least 0", getattr(self, name))
        for name in ("pos_xy_std", "bi_xy_std", "bi_rgb_std"):
            require(0 < getattr(self, name) < math.inf, name, "a positive number", getattr(self, name))


def crf_size(size: Sequence[int], classes: int) -> tuple[int, int]:
    """The size in which a photograph of H x W pixels goes through the CRF: its own, or one whose memory can be had."""
    height, width = size
    needed = height * width * (_PIXEL_BYTES + _VALUE_BYTES * (-(-classes // 16) * 16))
    if needed <= MOST_BYTES:
        return height, width
    scale = math.sqrt(MOST_BYTES / needed)
    return max(1, int(height * scale)), max(1, int(width * scale))


def shrunk(images: Tensor, size: Sequence[int]) -> Tensor:
    """float [B, 3, H, W] -> [B, 3, *size], bilinear with antialiasing; themselves if that is their size."""
    same = tuple(images.shape[2:]) == tuple(size)
    return images if same else F.interpolate(images, tuple(size), mode="bilinear", antialias=True)


def crf(images01: Tensor, probs: Tensor, settings: CrfSettings, size: Sequence[int] | None = None) -> Tensor:
    """Class probabilities after the CRF.

    Where these are smaller than the photograph, whose memory would be too much, the standard deviations of place are
    made smaller with it; a line says so once.

    Args:
        images01: float [B, 3, H, W] in 0..1.
        probs: float [B, C, h, w], h and w :func:`crf_size`'s.
        size: of the photograph in whose pixels the settings are, if ``images01`` is smaller already.

    Returns:
        [B, C, h, w], summing to 1.
    """
    size, small = tuple(size or images01.shape[2:]), tuple(probs.shape[2:])
    scale = 1.0
    if small != size:
        scale = math.sqrt(small[0] * small[1] / (size[0] * size[1]))
        notice(
            "dense CRF of a large photograph",
            f"the dense CRF of {size[1]}x{size[0]} pixels and {probs.shape[1]} classes would take more than"
            f" {MOST_BYTES / 2**30:g} GiB; it is made at {small[1]}x{small[0]}",
        )
    return dense_crf(
        255 * shrunk(images01, small),
        probs,
        settings.num_iter,
        settings.pos_w,
        settings.pos_xy_std * scale,
        settings.bi_w,
        settings.bi_xy_std * scale,
        settings.bi_rgb_std,
    )
