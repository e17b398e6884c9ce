"""Raw attention of single photographs, to be looked at: training and prediction never form an attention map.

    A_ij = 1/heads sum_h softmax_j(q_h,i . k_h,j / sqrt(d))

the mean over the heads of all blocks that the affinity is made of (the MHSA of the paper's supplement, Figures 3, 5
and 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afa_kernels import dense_to_window, random_walk

from ..conventions import resize
from ..labels.cams import evaluating, stretch
from ..labels.settings import LabelSettings

MOST_CELLS = 16_384  # of the grid: a map of 1 GiB


class TooManyCells(ValueError):
    """A photograph whose attention map would be too large to draw."""


def check_cells(cells: int, of: str = "") -> None:
    """
    of: the photograph's name, for the message.

    Raises:
        TooManyCells: an attention map of so many cells is too large.
    """
    if cells > MOST_CELLS:
        what = f" of {of}" if of else ""
        raise TooManyCells(
            f"long_side: an attention map{what} of {cells} x {cells} cells is too large to draw (at most {MOST_CELLS});"
            " take fewer pixels"
        )


def cells_of(model: nn.Module, size: Sequence[int]) -> int:
    """Cells of the grid of a model with attention for an image of ``size`` (height, width)."""
    return math.prod(-(-side // model.cell) for side in size)


def raw_attention(query: Tensor, key: Tensor) -> Tensor:
    """Mean attention of all heads.

    Args:
        query, key: [heads, N, d], unscaled.

    Returns:
        float32 [N, N]; what each cell attends to, a row for each, which sums to 1.

    Raises:
        TooManyCells: there are too many.
    """
    heads, cells, width = query.shape
    check_cells(cells)
    total = query.new_zeros(cells, cells, dtype=torch.float32)
    for q, k in zip(query.float(), key.float()):  # one at a time: the maps of all would take heads times the memory
        total += torch.softmax(q @ k.T / width**0.5, 1)
    return total / heads


@torch.no_grad()
def attention_of(model: nn.Module, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """:func:`raw_attention` of one image [1, 3, H, W], normalised -> float32 [N, N], and the grid (h, w), N = h w.

    Raises:
        ValueError: a model without attention, or too many cells.
    """
    model.require_attention("attention")
    with evaluating(model):
        seen = model.cam_and_attention(image)
    return raw_attention(seen.query[0], seen.key[0]), tuple(seen.cam.shape[2:])


def attention_window(attention: Tensor, grid: tuple[int, int], radius: int) -> Tensor:
    """Raw attention [N, N] in the place of the learned affinity: symmetric, in windows of ``radius``.

    Even attention is 1, not 1/N, so that what the random walk adds to its sums weighs as little as it does beside the
    learned affinity -> float32 [(2 radius + 1)^2, h, w].
    """
    symmetric = (attention + attention.T) * (len(attention) / 2)
    return dense_to_window(symmetric[None], *grid, radius)[0]


def walked_cam(affinity: Tensor, cam: Tensor, how: LabelSettings) -> Tensor:
    """The CAM after the random walk, M' = T M (eq. 7 and 8), each channel stretched to 0..1.

    Args:
        affinity: [(2 radius + 1)^2, h, w], at least 0.
        cam: [K - 1, H, W] in 0..1; channels that are 0 throughout stay so.
        how: radius, power and eps of the walk.

    Returns:
        float32 [K - 1, h, w].
    """
    small = resize(cam[None].float(), affinity.shape[1:])
    there = (small > 0).any(3).any(2)
    walked = random_walk(affinity[None].float(), small, how.radius, how.walk_power, 1, how.walk_eps, class_mask=there)
    return stretch(walked)[0]
