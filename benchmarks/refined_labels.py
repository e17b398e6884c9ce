"""Labels that a refinement makes of CAMs whose image-level labels are known, and their mIoU over background scores.

CAMs stay what they are; the background is a channel of one score everywhere. Which score is best differs from
refinement to refinement, so all are tried, and counts are kept for each photograph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_model.conventions import IGNORE, resize
from afa_model.evaluation.scores import Scores

CLASSES = 21
BACKGROUNDS = tuple(round(0.05 * step, 2) for step in range(1, 13))  # 0.05 to 0.6

Refine = Callable[[Tensor, Tensor], Tensor]
"""image [1, 3, h, w] in 0..1, n kinds of scores for it [n, C, h, w] -> [n, C, h, w]; PAR's weights are made once."""


class Photo(NamedTuple):
    """A photograph with CAMs of what it shows.

    image [1, 3, H, W] in 0..1; mask [H, W] of labels (255 void); classes int64 [S], the labels it shows, without the
    background; cam [1, S, H, W] in 0..1.
    """

    image: Tensor
    mask: Tensor
    classes: Tensor
    cam: Tensor

    def scores(self, *backgrounds: float) -> Tensor:
        """[backgrounds, 1 + S, H, W]: a background of one score everywhere, and the CAMs."""
        ground = torch.tensor(backgrounds)[:, None, None, None].expand(-1, 1, *self.cam.shape[2:])
        return torch.cat([ground, self.cam.expand(len(backgrounds), -1, -1, -1)], dim=1)


def refined_labels(
    image: Tensor, scores: Tensor, classes: Tensor, refine: Refine, scale: float = 0.5, sharpness: float = 1.0
) -> Tensor:
    """The label of each pixel, the highest channel after refinement, for several scores of one image at a time.

    As pseudo-labels are made: resized, softmax over background and present classes, refined, resized back.

    Args:
        image: [1, 3, H, W] in 0..1.
        scores: [n, 1 + S, h, w], the background first.
        classes: int64 [S], the labels of the others.
        scale: of the image that is refined on; half resolution is training's.
        sharpness: what the scores are multiplied with before the softmax; 1 in training.

    Returns:
        int64 [n, H, W].
    """
    size = [max(int(side * scale), 1) for side in image.shape[2:]]
    small = image if scale == 1 else resize(image, size)
    probs = resize(scores, size).mul(sharpness).softmax(dim=1)
    highest = resize(refine(small, probs), image.shape[2:]).max(1).indices  # ten times as fast as argmax
    return F.pad(classes, (1, 0))[highest]


def confusion_of(label: Tensor, mask: Tensor, where: Tensor | None = None) -> Tensor:
    """int64 [21, 21], rows the mask's class; void, and what is not ``where`` (bool [H, W]), left out."""
    counted = mask != IGNORE if where is None else where & (mask != IGNORE)
    pairs = CLASSES * mask[counted].long() + label[counted].long()
    return torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)


def miou(confusion: Tensor) -> float:
    """In per cent, over the classes in the masks."""
    return 100 * Scores.of(confusion).miou


@dataclass(frozen=True)
class Sweep:
    """What labels of one refinement are worth.

    Attributes:
        confusions: int64 [backgrounds, photographs, 21, 21].
        backgrounds: the scores that were tried.
    """

    confusions: Tensor
    backgrounds: tuple[float, ...]

    @property
    def mious(self) -> list[float]:
        """In per cent, for each background score."""
        return [miou(counts.sum(0)) for counts in self.confusions]

    @property
    def best(self) -> int:
        """Which background score has the highest mIoU: known from the masks, as no user knows it."""
        return max(range(len(self.backgrounds)), key=self.mious.__getitem__)

    @property
    def best_confusions(self) -> Tensor:
        """[photographs, 21, 21] at that score."""
        return self.confusions[self.best]

    def per_photograph(self) -> float:
        """mIoU where each photograph has the background score that is best for its own labels: an upper bound."""
        own = torch.tensor([[miou(counts) for counts in row] for row in self.confusions])  # [backgrounds, photographs]
        chosen = own.argmax(0)
        return miou(self.confusions[chosen, torch.arange(len(chosen))].sum(0))


def sweep(
    photos: Sequence[Photo],
    refine: Refine,
    backgrounds: Sequence[float] = BACKGROUNDS,
    *,
    scale: float = 0.5,
    sharpness: float = 1.0,
    watch: Callable[[Iterable], Iterable] = iter,
) -> Sweep:
    """Refine the CAMs of all photographs with every background score.

    watch: goes through the photographs and shows how far it is.
    """
    counts = torch.zeros(len(backgrounds), len(photos), CLASSES, CLASSES, dtype=torch.int64)
    for column, photo in enumerate(watch(photos)):
        labels = refined_labels(photo.image, photo.scores(*backgrounds), photo.classes, refine, scale, sharpness)
        for row, label in enumerate(labels):
            counts[row, column] = confusion_of(label, photo.mask)
    return Sweep(counts, tuple(backgrounds))


def gain_interval(base: Tensor, other: Tensor, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Where 95 of 100 gains in mIoU lie if the photographs are drawn anew, with replacement (paired bootstrap).

    Args:
        base, other: confusions [photographs, 21, 21] of the same photographs.

    Returns:
        (low, high) of mIoU(other) - mIoU(base), in points.
    """
    number = len(base)
    draws = torch.randint(number, (rounds, number), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(rounds, number).scatter_add_(1, draws, torch.ones(rounds, number))
    low, high = (_mious(times, other) - _mious(times, base)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _mious(times: Tensor, confusions: Tensor) -> Tensor:
    """mIoU in per cent of each row of ``times`` [rounds, photographs], how often a photograph counts."""
    counts = (times.double() @ confusions.double().flatten(1)).view(-1, CLASSES, CLASSES)
    right, in_masks = counts.diagonal(dim1=1, dim2=2), counts.sum(2)
    iou = right / (in_masks + counts.sum(1) - right).clamp_min(1)
    shown = in_masks > 0
    return (100 * (iou * shown).sum(1) / shown.sum(1)).float()
