"""One mask after PAMR, PAR and the dense CRF, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..conventions import require
from ..errors import DataError
from ..evaluation.refine import RefineSettings, probabilities_of, refined_scores
from ..labels.crf import CrfSettings
from ..labels.large import strongest
from .clock import timed

METHODS: Mapping[str, str] = {"pamr": "PAMR", "par": "PAR", "crf": "dense CRF"}


@dataclass(frozen=True)
class Refined:
    """A mask after one refinement.

    Attributes:
        label: uint8 [H, W].
        changed: share of its pixels, 0..1, whose class is another than the mask's, or that had none.
        seconds: that it took.
    """

    label: np.ndarray
    changed: float
    seconds: float


def settings_of(
    dilations: tuple[int, ...], num_iter: int, gt_prob: float, crf: CrfSettings | None = None
) -> RefineSettings:
    """What the page's sliders say, for all three: ``num_iter`` counts each one's iterations.

    Raises:
        ValueError: naming what makes no sense.
    """
    require(num_iter >= 0, "num_iter", "at least 0", num_iter)
    crf = replace(crf or CrfSettings(), num_iter=num_iter)
    return RefineSettings(dilations=dilations, num_iter=num_iter, dense_crf=crf, gt_prob=gt_prob)


@torch.no_grad()
def refined(
    pixels: np.ndarray, label: Tensor, settings: RefineSettings, device: torch.device | str = "cpu"
) -> dict[str, Refined]:
    """The mask after each of METHODS, as `afa refine` refines label files.

    Args:
        pixels: uint8 [H, W, 3].
        label: int64 [H, W], 255 where it is unknown.
        settings: their ``method`` does not count.

    Raises:
        DataError: the label says nothing, or one class alone, which nothing could change.
    """
    numbers, maps = probabilities_of(label, settings.gt_prob)
    if len(numbers) < 2:
        raise DataError(
            "no mask yet: paint over an object, or drop a mask"
            if numbers in ((), (0,))
            else "nothing but one class: paint some background too, or let unpainted pixels be background"
        )
    size = tuple(label.shape)
    images01 = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device).float() / 255
    classes, maps = torch.tensor(numbers, dtype=torch.uint8), maps.to(device)
    done = {}
    for method in METHODS:
        by = replace(settings, method=method)
        scores, seconds = timed(lambda by=by: refined_scores(images01, maps, len(numbers), by), device)
        after = classes[strongest(scores[0], size).cpu().int()]
        changed = float((after != label).float().mean())
        done[method] = Refined(after.numpy(), changed, seconds)
    return done
