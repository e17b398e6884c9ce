"""What a model sees in one photograph, step by step, each with the time it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..data.image_labels import multi_hot
from ..data.transforms import normalize
from ..labels.evidence import Evidence, MapSettings, evidence, found_classes
from ..labels.label_maps import label_maps
from ..labels.photograph_labels import photograph_label
from ..labels.settings import LabelSettings
from ..labels.slots import ClassSlots
from ..pictures.overlays import affinity_of_point, cell_of
from ..pictures.panels import peak_of
from .clock import timed
from .photographs import Photograph

# Of a model with attention; of a CNN the first two.
LABELS: Mapping[str, str] = {
    "cam": "CAM label",
    "refined_cam": "CAM label, refined",
    "random_walk": "random walk",
    "refined_random_walk": "random walk, refined",
}


@dataclass(frozen=True)
class Look:
    """What a model says of a photograph, whatever classes it is asked for.

    Attributes:
        photograph: that it saw.
        image: float32 [1, 3, H, W], normalised, on the model's device.
        probabilities: [K-1] in 0..1, the classifier's.
        cam: [1, K-1, h, w] in 0..1, of all classes.
        affinity: [1, (2r+1)^2, h, w] in 0..1, or None.
        prediction: uint8 [H, W], or None of a model without a decoder.
        seconds: of the steps classifier, CAM (with the affinity) and prediction.
    """

    photograph: Photograph
    image: Tensor
    probabilities: Tensor
    cam: Tensor
    affinity: Tensor | None
    prediction: np.ndarray | None
    seconds: Mapping[str, float]

    @property
    def found(self) -> list[int]:
        """The classes (1..K-1) that the classifier finds: those above 0.5, or the likeliest."""
        return (found_classes(self.probabilities).nonzero().flatten() + 1).tolist()


@dataclass(frozen=True)
class Labels:
    """Labels of a photograph for some classes.

    Attributes:
        maps: kind, of LABELS -> uint8 [H, W], 255 where it is left open.
        seconds: of each.
    """

    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def look(model: nn.Module, photograph: Photograph, settings: MapSettings, how: LabelSettings) -> Look:
    """Everything about a photograph that needs the model.

    settings, how: as for :func:`~afa_model.labels.label_maps.label_maps`.
    """
    device = next(model.parameters()).device
    normal = normalize(torch.from_numpy(photograph.pixels).permute(2, 0, 1).contiguous())
    image = normal[None].to(device)
    said, classifier = timed(lambda: label_maps(model, normal, settings, how, kinds=()), device)
    every = torch.ones_like(said.probabilities)
    seen, cam = timed(lambda: evidence(model, image, settings, how, every), device)
    seconds, prediction = {"classifier": classifier, "CAM": cam}, None
    if model.has_affinity:
        kinds = ["segmentation"]
        maps, seconds["prediction"] = timed(lambda: label_maps(model, normal, settings, how, every, kinds), device)
        prediction = maps.labels["segmentation"].cpu().numpy()
    return Look(photograph, image, said.probabilities.cpu(), seen.cam, seen.affinity, prediction, seconds)


def iterations_of(how: LabelSettings) -> int:
    """Those of the run's own refinement: the dense CRF has a setting of its own."""
    return how.dense_crf.num_iter if how.refinement == "crf" else how.num_iter


def settings_of(
    how: LabelSettings,
    refinement: str,
    dilations: Sequence[int],
    num_iter: int,
    low_score: float,
    high_score: float,
) -> LabelSettings:
    """A run's settings with what the page's sliders say; ``num_iter`` counts the iterations of the refinement, of the
    CRF too. Of two background scores the lower one is the low one.

    Raises:
        ValueError: naming what makes no sense.
    """
    low, high = sorted((low_score, high_score))
    return replace(
        how,
        refinement=refinement,
        dilations=tuple(dilations),
        num_iter=num_iter,
        dense_crf=replace(how.dense_crf, num_iter=num_iter),
        low_score=low,
        high_score=high,
    )


@torch.no_grad()
def labels_of(seen: Look, classes: Sequence[int], how: LabelSettings) -> Labels:
    """The pseudo-labels that training would make of a photograph that shows these classes (1..K-1).

    The random walk of the refined label is counted to that again: each time is what the label takes from the CAM on.
    """
    given = multi_hot(list(classes), seen.cam.shape[1] + 1).to(seen.cam.device)
    slots = ClassSlots.of(given[None], limit=len(classes))
    known = Evidence(None, given, slots, slots.pick(seen.cam), seen.affinity)
    maps, seconds = {}, {}
    for kind in LABELS if seen.affinity is not None else list(LABELS)[:2]:
        made, seconds[kind] = timed(lambda kind=kind: photograph_label(kind, seen.image, known, how), seen.image.device)
        maps[kind] = made.label.cpu().numpy()
    return Labels(maps, seconds)


def heat_of(seen: Look, classes: Sequence[int]) -> Tensor:
    """The largest CAM value over these classes, float32 [h, w] in 0..1."""
    cam = seen.cam[0].float().cpu()
    return cam[[index - 1 for index in classes]].amax(0) if classes else torch.zeros_like(cam[0])


def peak(seen: Look, classes: Sequence[int]) -> tuple[int, int]:
    """The pixel (y, x) of the photograph where the CAM of these classes is largest."""
    return peak_of(seen.cam[0].cpu(), list(classes), seen.photograph.size)


def affinity_at(seen: Look, point: tuple[int, int]) -> tuple[Tensor, float] | None:
    """What the cell of the grid that holds the pixel (y, x) says of its window, float32 [h, w], NaN outside, and the
    seconds that took; None of a model without attention.

    A point outside the photograph counts as the nearest one in it.
    """
    if seen.affinity is None:
        return None
    inside = tuple(min(max(place, 0), side - 1) for place, side in zip(point, seen.photograph.size))
    grid = seen.affinity.shape[2], seen.affinity.shape[3]
    cell = cell_of(inside, seen.photograph.size, grid)
    return timed(lambda: affinity_of_point(seen.affinity[0], cell), seen.image.device)
