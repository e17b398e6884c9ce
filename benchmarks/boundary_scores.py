"""How well labels follow the boundaries of objects, where mIoU counts their insides: trimap mIoU and boundary F-score.

Trimap (Kohli, Ladický and Torr, *Robust higher order potentials for enforcing label consistency*, IJCV 2009): IoU over
the pixels of a narrow band around the boundaries alone. Boundary F-score (Csurka, Larlus and Perronnin, *What is a good
evaluation measure for semantic segmentation?*, BMVC 2013): precision and recall of contours, class by class, a
contour's pixel being right where one of the other's is at most so many pixels away.

Distances are counted in rows or columns, whichever are more (a square around each pixel). VOC's masks have a band of
void (255) on the boundaries, whose edges are boundaries here; void pixels themselves take no part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_model.conventions import IGNORE


def near(points: Tensor, pixels: int) -> Tensor:
    """bool [H, W] -> bool [H, W]: what is at most ``pixels`` rows and columns from one of ``points``."""
    size = 2 * pixels + 1
    rows = F.max_pool2d(points[None, None].float(), (size, 1), stride=1, padding=(pixels, 0))
    return F.max_pool2d(rows, (1, size), stride=1, padding=(0, pixels))[0, 0] > 0


def contour(region: Tensor) -> Tensor:
    """bool [H, W] -> bool [H, W]: the pixels of ``region`` above, below or beside one that is not; the image's own edge
    is none of its.
    """
    around = F.pad(region[None, None].float(), (1, 1, 1, 1), mode="replicate")[0, 0] > 0
    inside = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    return region & ~inside


def trimap(mask: Tensor, pixels: int) -> Tensor:
    """mask [H, W] of labels -> bool [H, W]: pixels that are not void within ``pixels`` of another label.

    The band is ``pixels`` wide on each side: the pixels beside another label are at a distance of 1.
    """
    changes = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (0, 1):
        length = mask.shape[axis] - 1
        differ = mask.narrow(axis, 1, length) != mask.narrow(axis, 0, length)
        changes.narrow(axis, 1, length).logical_or_(differ)
        changes.narrow(axis, 0, length).logical_or_(differ)
    return near(changes, pixels - 1) & (mask != IGNORE)


def boundary_f(label: Tensor, mask: Tensor, pixels: int) -> float:
    """Boundary F-score of one image in 0..1: the mean over the classes in the mask, the background left out.

    A contour that was found in void counts where it is right and not where it is wrong, for nobody knows. 0 for a class
    of which nothing was found; NaN for a mask without objects.

    Args:
        label: integers [H, W].
        mask: integers [H, W], 255 for void.
        pixels: how far from the true contour one may be.
    """
    scores = []
    for number in mask.unique().tolist():
        if number in (0, IGNORE):
            continue
        true, found = contour(mask == number), contour(label == number)
        right = found & near(true, pixels)
        counted = right | (found & (mask != IGNORE))
        precision = float(right.sum()) / max(int(counted.sum()), 1)
        recall = float((true & near(found, pixels)).sum()) / max(int(true.sum()), 1)
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores) if scores else float("nan")
