"""The labels of pseudo_labels.py for a photograph too large to hold a map of every class at its size.

Nothing but the label itself is as large as the photograph. What decides it is resized a band of rows at a time, and
refined a band of rows and a few classes at a time, with the strongest so far kept for each pixel. A refinement carries
a pixel at most ``num_iter`` times its farthest tap, so bands that overlap by that much give what one piece would. All
resizing is bilinear, so columns and rows can be done one after the other. A dense CRF reaches through the whole
photograph and weighs its classes against each other: it is made of all at once, at a size whose memory can be had.

The labels are those of pseudo_labels.py but where two classes are equal to within a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import random_walk_with_background

from ..conventions import resize
from ..runtime.phases import phase
from .crf import crf_size
from .refinement import reach, refine
from .settings import LabelSettings
from .slots import ClassSlots

PIXELS = 4_000_000  # of a photograph from which on it is large
BAND_VALUES = 2**22  # resized at a time, 16 MB: the caches still help
REFINED_BYTES = 2**30  # that a refinement may take at a time
REFINED_CLASSES = 6  # at a time: each turn makes the refinement's weights anew


def is_large(size: Sequence[int]) -> bool:
    """Whether a photograph of H x W pixels is to be labelled band by band."""
    return size[0] * size[1] > PIXELS


def strongest(
    maps: Tensor, size: Sequence[int], least: float | None = None, share: Tensor | None = None
) -> Tensor:
    """Which of the channels is strongest when they are resized to ``size``.

    maps: float [C, h, w], C up to 255 -> uint8 [H, W] in 0..C-1. With ``least``: 0 where none exceeds it, else the
    channel's number counted from 1. ``share`` [H, W] is filled with the strongest one's share of all channels' sum;
    with ``least`` that is a channel before them, and the share is of the softmax.
    """
    label = torch.empty(tuple(size), dtype=torch.uint8, device=maps.device)
    for rows, values in _bands(maps, size[1], _Lines.of(maps.shape[1], size[0])):
        value, index = values.max(0)
        label[rows] = (index if least is None else torch.where(value > least, index + 1, 0)).to(torch.uint8)
        if share is not None and least is None:
            share[rows] = value / values.sum(0).clamp_min(torch.finfo(values.dtype).tiny)
        elif share is not None:
            share[rows] = value.clamp(min=least).exp() / (values.exp().sum(0) + math.exp(least))
    return label


@torch.no_grad()
def large_label(
    kind: str,
    half_images01: Tensor,
    size: Sequence[int],
    cam: Tensor,
    affinity: Tensor | None,
    slots: ClassSlots,
    how: LabelSettings,
    share: Tensor | None = None,
) -> Tensor:
    """One of the CAM's label maps of one photograph -> uint8 [H, W] in 0..K-1.

    Args:
        kind: cam, refined_cam, random_walk or refined_random_walk.
        half_images01: [1, 3, H // 2, W // 2] in 0..1: the photograph at half its size.
        size: H, W of the photograph.
        cam: [1, S, h, w] in 0..1, of any size, a channel for each slot.
        affinity: [1, (2r + 1)^2, h', w'], for the random walk.
        share: [H, W], filled with the winning channel's share of what decided the pixel.
    """
    shown, half = slots.with_background[0], half_images01.shape[2:]
    if kind == "cam":
        label = strongest(cam[0] * slots.present[0, :, None, None], size, *how.one_score, share)
    elif kind == "refined_cam":
        # softmax over the background's score and the classes shown, whose sum is the same for every turn of classes
        background = math.exp(*how.one_score)
        total = torch.full(tuple(half), background, device=cam.device)
        for index in slots.present[0].nonzero().flatten().tolist():
            total += _twice(cam[0, index], size, half).exp_()

        def softmax(channel: int, rows: slice) -> Tensor:
            if channel == 0:
                return background / total[rows]
            return _twice(cam[0, channel - 1], size, half, rows=rows).exp_().div_(total[rows])

        label = _refined(half_images01, size, softmax, shown, how, share)
    else:
        walked = large_walk(size, cam, affinity, slots, how)[0]
        if kind == "random_walk" or how.refinement == "none":
            label = strongest(walked, size, share=share)
        else:

            def resized(channel: int, rows: slice) -> Tensor:
                return _twice(walked[channel], size, half, aligned=True, rows=rows)

            label = _refined(half_images01, size, resized, shown, how, share)
    names = F.pad((slots.classes[0] + 1).to(torch.uint8), (1, 0))
    for rows in range(0, size[0], 1024):
        label[rows : rows + 1024] = names[label[rows : rows + 1024].int()]
    return label


def large_walk(size: Sequence[int], cam: Tensor, affinity: Tensor, slots: ClassSlots, how: LabelSettings) -> Tensor:
    """The random walk of a large photograph with the background score of evaluation -> [1, S + 1, h', w']."""
    with phase("random walk"):
        small = torch.stack([_twice(channel.float(), size, affinity.shape[2:]) for channel in cam[0]])[None]
        by = how.radius, how.walk_power, how.walk_eps
        return random_walk_with_background(affinity.float(), small, slots.present, *how.one_walk_score, *by)


class _Lines(NamedTuple):
    """For each line of a resized map the two of the other that it lies between, and the second one's share."""

    lower: Tensor
    upper: Tensor
    share: Tensor

    @classmethod
    def of(cls, lines: int, resized: int, aligned: bool = False) -> _Lines:
        """As ``F.interpolate``'s bilinear mode; aligned: with ``align_corners=True``. On the CPU."""
        place = torch.arange(resized, dtype=torch.float32)
        if aligned:
            place *= (lines - 1) / (resized - 1) if resized > 1 else 0.0
        else:
            place = ((place + 0.5) * (lines / resized) - 0.5).clamp_(min=0)
        lower = place.long().clamp_(max=lines - 1)
        return cls(lower, (lower + 1).clamp_(max=lines - 1), place - lower)

    def part(self, rows: slice, first: int = 0) -> _Lines:
        """Some of the resized lines, of a map whose line 0 is line ``first``."""
        return _Lines(self.lower[rows] - first, self.upper[rows] - first, self.share[rows])

    def rows_of(self, maps: Tensor) -> Tensor:
        """float [..., lines, W] -> [..., resized, W]."""
        lower, upper, share = (values.to(maps.device, non_blocking=True) for values in self)
        return torch.lerp(maps.index_select(-2, lower), maps.index_select(-2, upper), share[:, None])


def _columns(maps: Tensor, width: int, aligned: bool = False) -> Tensor:
    """float [C, h, w] -> [C, h, width]."""
    return F.interpolate(maps[None], (maps.shape[1], width), mode="bilinear", align_corners=aligned)[0]


def _bands(maps: Tensor, width: int, lines: _Lines) -> Iterator[tuple[slice, Tensor]]:
    """Bands of rows of maps [C, h, w] resized to lines x width, and which rows each is: [C, rows, width]."""
    step = max(1, BAND_VALUES // (len(maps) * width))
    for start in range(0, len(lines.lower), step):
        rows = slice(start, min(start + step, len(lines.lower)))
        first, last = int(lines.lower[rows.start]), int(lines.upper[rows.stop - 1])
        columns = _columns(maps[:, first : last + 1], width)
        yield rows, lines.part(rows, first).rows_of(columns)


def _twice(
    one: Tensor, between: Sequence[int], size: Sequence[int], aligned: bool = False, rows: slice = slice(None)
) -> Tensor:
    """A map [h, w], resized to ``between`` and from there (aligned: with corners aligned) to ``size``; some rows."""
    columns = _columns(_columns(one.float()[None], between[1]), size[1], aligned)[0]
    then = _Lines.of(between[0], size[0], aligned).part(rows)
    first, last = int(then.lower[0]), int(then.upper[-1])
    middle = _Lines.of(len(one), between[0]).part(slice(first, last + 1)).rows_of(columns)
    return then.part(slice(None), first).rows_of(middle)


def _refined(
    half_images01: Tensor,
    size: Sequence[int],
    channel_of: Callable[[int, slice], Tensor],
    shown: Tensor,
    how: LabelSettings,
    share: Tensor | None = None,
) -> Tensor:
    """The strongest channel after refinement at half size -> uint8 [H, W].

    channel_of: gives some rows of a channel at half size. shown: [C] bool; the others cannot win.
    """
    height, width = half_images01.shape[2:]
    channels = shown.nonzero().flatten().tolist()
    margin = reach(how)
    if margin is None:
        return _refined_whole(half_images01, size, channel_of, channels, how, share)
    turns = [channels[i : i + REFINED_CLASSES] for i in range(0, len(channels), REFINED_CLASSES)]
    lines = _Lines.of(height, size[0])
    label = torch.empty(tuple(size), dtype=torch.uint8, device=half_images01.device)
    for start, stop in _pieces(height, width, margin, 8 * len(how.dilations) + 4 * len(turns[0])):
        # the piece's last row blends with the next one's first
        inner, outer = min(stop + 1, height), slice(max(start - margin, 0), min(stop + 1 + margin, height))
        begin, end = (int(torch.searchsorted(lines.lower, row)) for row in (start, stop))
        best = torch.full((end - begin, size[1]), -torch.inf, device=label.device)
        total = torch.zeros_like(best) if share is not None else None
        for turn in turns:
            maps = torch.stack([channel_of(channel, outer) for channel in turn])[None]
            everything = torch.ones(1, len(turn), dtype=torch.bool, device=maps.device)
            maps = refine(half_images01[:, :, outer], maps, everything, how)
            maps = maps[0, :, start - outer.start : inner - outer.start]
            numbers = torch.tensor(turn, dtype=torch.uint8, device=maps.device)
            for rows, values in _bands(maps, size[1], lines.part(slice(begin, end), start)):
                value, index = values.max(0)
                wins = value > best[rows]
                best[rows] = torch.where(wins, value, best[rows])
                target = label[begin + rows.start : begin + rows.stop]
                target.copy_(torch.where(wins, numbers[index], target))
                if total is not None:
                    total[rows] += values.sum(0)
        if share is not None:
            share[begin:end] = best.div_(total.clamp_min_(torch.finfo(total.dtype).tiny))
    return label


def _refined_whole(
    half_images01: Tensor,
    size: Sequence[int],
    channel_of: Callable[[int, slice], Tensor],
    channels: Sequence[int],
    how: LabelSettings,
    share: Tensor | None,
) -> Tensor:
    """As :func:`_refined`, all ``channels`` at once."""
    small = crf_size(half_images01.shape[2:], len(channels))
    maps = torch.cat([resize(channel_of(channel, slice(None))[None, None], small) for channel in channels], 1)
    everything = torch.ones(1, len(channels), dtype=torch.bool, device=maps.device)
    label = strongest(refine(half_images01, maps, everything, how)[0], size, share=share)
    numbers = torch.tensor(channels, dtype=torch.uint8, device=maps.device)
    for rows in range(0, size[0], 1024):
        label[rows : rows + 1024] = numbers[label[rows : rows + 1024].int()]
    return label


def _pieces(height: int, width: int, margin: int, values: int) -> list[tuple[int, int]]:
    """Rows [start, stop) of an image that is refined piece by piece; as few as memory allows, for they overlap.

    values: float32 numbers for each pixel of a piece.
    """
    rows = max(1, REFINED_BYTES // (4 * values * width))
    count = 1
    while -(-height // count) + min(count - 1, 2) * margin > rows and count * max(margin, 1) < height:
        count += 1
    step = -(-height // count)
    return [(start, min(start + step, height)) for start in range(0, height, step)]
