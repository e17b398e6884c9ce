"""Scores of a model on a data set: CAM, refined CAM, random-walk label and segmentation, image by image."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.datasets import EvaluationSet
from ..labels.kinds import check_kinds, kinds_of
from ..labels.label_maps import MapSettings, label_maps
from ..labels.settings import LabelSettings
from ..runtime.processes import place
from ..runtime.progress import progress
from .scores import EvaluationResult, ScoreKeeper

_OWN = ("cam_scales", "radius", "dilations", "num_iter")  # what evaluation may do otherwise than training


@dataclass
class EvaluateSettings(MapSettings):
    """What is evaluated, and how. How labels are made from the CAM is what training does; what must differ from that
    (another grid) is said here.

    Args:
        cam_scales: of the CAM, each with a flipped copy; they are summed. None: as in training.
        radius: of the affinity's window, in cells of the largest CAM scale's grid. None: as in training.
        dilations: distances of the refinement's neighbours in pixels. None: as in training.
        num_iter: iterations of the refinement. None: as in training.
        kinds: which label maps to score, of cam, refined_cam, random_walk, refined_random_walk and
            segmentation; None: all that the model offers (a CNN gives CAMs only).
        limit: take the first so many images of the list only; None takes all.
        num_workers: processes that load images; 0 does it in this process.
        progress: show a progress bar on a terminal.
    """

    cam_scales: tuple[float, ...] | None = None
    radius: int | None = None
    dilations: tuple[int, ...] | None = None
    num_iter: int | None = None
    kinds: tuple[str, ...] | None = None
    limit: int | None = None
    num_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1 image, got {self.limit}")
        if self.kinds is not None:
            check_kinds(self.kinds)
        if self.num_workers < 0:
            raise ValueError(f"num_workers: expected at least 0, got {self.num_workers}")
        self.labels(LabelSettings())

    def labels(self, training: LabelSettings) -> LabelSettings:
        """How labels are made here: as in training but for what is said otherwise."""
        own = {name: getattr(self, name) for name in _OWN}
        return replace(training, **{name: value for name, value in own.items() if value is not None})

    def as_in_training(self) -> EvaluateSettings:
        """These settings without what they say otherwise than training."""
        return replace(self, **dict.fromkeys(_OWN))


def evaluate(
    model: nn.Module,
    dataset: EvaluationSet,
    settings: EvaluateSettings | None = None,
    labels: LabelSettings | None = None,
) -> EvaluationResult:
    """Score a model against the masks of a data set.

    CAM, refined CAM and random-walk label know the image-level labels of the data set, as in the paper's
    Table 2; the segmentation does not. Test protocol of the paper: longer side 512, scales 1, 0.5, 0.75 with
    flips, the maximum of the logits; labels are compared at the photograph's own size, pixels of mask value
    255 do not count.

    In a process group of torch.distributed every process must call this: each takes its share of the images,
    every image is counted once, and all get the same result.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA` on any device, in any mode (left as it was).
        dataset: photographs with masks.
        settings: what and how.
        labels: how training makes labels from the CAM.

    Returns:
        The scores of each kind of label map.

    Raises:
        ValueError: a kind the model does not give, or a model whose number of classes is not the data set's.
    """
    settings = settings or EvaluateSettings()
    how = settings.labels(labels or LabelSettings())
    if model.num_classes != dataset.num_classes:
        raise ValueError(f"model: {model.num_classes} classes, but the data set has {dataset.num_classes}")
    kinds = kinds_of(model, settings.kinds)
    rank, world_size = place()
    total = len(dataset) if settings.limit is None else min(settings.limit, len(dataset))
    share = range(rank, total, world_size)
    keeper = ScoreKeeper(kinds, dataset.num_classes, next(model.parameters()).device)

    start = time.perf_counter()
    # its own generator: evaluating in the middle of a training run must not change what the run draws next
    loader = DataLoader(
        dataset, batch_size=None, sampler=share, num_workers=settings.num_workers, generator=torch.Generator()
    )
    for sample in progress(loader, "evaluating", len(share), settings.progress):
        maps = label_maps(model, sample["image"], settings, how, sample["cls_labels"], kinds)
        for kind, label in maps.labels.items():
            keeper.add(kind, label, sample["mask"])
    scores = keeper.scores()
    return EvaluationResult(
        scores=scores,
        class_names=dataset.class_names,
        images=total,
        seconds=time.perf_counter() - start,
        about={"split": dataset.split, "settings": asdict(settings), "labels": asdict(how)},
    )
