"""Scores of a model on a data set: CAM, refined CAM, random-walk label and segmentation, image by image."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
from torch import nn

from ..conventions import require
from ..data.datasets import EvaluationSet
from ..data.held_out import ImageLevelSet
from ..data.order import death_told, evaluation_loader
from ..labels.evidence import MapSettings
from ..labels.kinds import check_kinds, kinds_of
from ..labels.label_maps import label_maps_of_several
from ..labels.settings import LabelSettings
from ..runtime.collectives import gather_from_all
from ..runtime.processes import laid_out, place
from ..runtime.progress import progress, several
from .protocols import PROTOCOLS
from .scores import EvaluationResult, ScoreKeeper, image_level_scores

_OWN = ("cam_scales", "radius", "dilations", "num_iter", "walk_score")  # what evaluation may do otherwise than training


@dataclass
class EvaluateSettings:
    """What is evaluated, and how. How labels are made from the CAM is what training does; what must differ from that
    (another grid) is said here.

    Args:
        protocol: training (the photograph at its own size, one pass) or test (longer side 512, three scales with
            flips). None: training while training, test in `afa evaluate`.
        long_side: photographs are resized (bilinear) so that the longer side has this many pixels; 0: as they are.
            None, here and below: as the protocol has it.
        scales: of the segmentation; the largest logit counts.
        flips: each scale with a mirrored copy, the mean of whose logits counts.
        affinity_of: which pass gives the affinity of the random walk: largest (of the CAM's scales) or plain.
        walk_score: background score of the random-walk label.
        cam_scales: of the CAM, each with a flipped copy; they are summed. None: as in training.
        radius: of the affinity's window, in cells of the largest CAM scale's grid. None: as in training.
        dilations: distances of the refinement's neighbours in pixels. None: as in training.
        num_iter: iterations of the refinement. None: as in training.
        kinds: which label maps to score, of cam, refined_cam, random_walk, refined_random_walk and
            segmentation, and segmentation_crf; None: all that the model offers (a CNN gives CAMs only) but the last.
        amp: bf16 or auto (on a GPU that computes in it): the networks in bfloat16. off, as published, otherwise.
        channels_last: keep images and convolution weights in channels_last memory format.
        batch: photographs taken together. Those of them that go through the networks in the same size do so at once,
            which a GPU does faster; scores are those of 1, as published, but for roundings.
        crf: also score the segmentation after the dense CRF of labels.dense_crf. It takes seconds for each photograph.
        limit: take the first so many images of the list only; None takes all.
        num_workers: processes that load images; 0 does it in this process.
        progress: show a progress bar on a terminal.
    """

    protocol: Literal["training", "test"] | None = None
    long_side: int | None = None
    scales: tuple[float, ...] | None = None
    flips: bool | None = None
    affinity_of: Literal["largest", "plain"] | None = None
    walk_score: float | None = None
    cam_scales: tuple[float, ...] | None = None
    radius: int | None = None
    dilations: tuple[int, ...] | None = None
    num_iter: int | None = None
    kinds: tuple[str, ...] | None = None
    amp: Literal["auto", "bf16", "off"] = "off"
    channels_last: bool = False
    batch: int = 1
    crf: bool = False
    limit: int | None = None
    num_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, got {self.protocol!r}")
        self.maps()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1 image, got {self.limit}")
        require(self.batch >= 1, "batch", "at least 1 photograph", self.batch)
        if self.kinds is not None:
            check_kinds(self.kinds)
        if self.num_workers < 0:
            raise ValueError(f"num_workers: expected at least 0, got {self.num_workers}")
        self.labels(LabelSettings())

    def by(self, protocol: str) -> EvaluateSettings:
        """These settings with that protocol, unless they name one."""
        return self if self.protocol is not None else replace(self, protocol=protocol)

    def without_rows(self) -> EvaluateSettings:
        """These settings with nothing said of what a protocol decides."""
        return replace(self, **dict.fromkeys(PROTOCOLS["test"]))

    def said(self, training: LabelSettings) -> LabelSettings:
        """As in training but for what is said otherwise here; what the protocol decides is left open."""
        own = {name: getattr(self, name) for name in _OWN}
        return replace(training, **{name: value for name, value in own.items() if value is not None})

    def maps(self) -> MapSettings:
        """In which sizes a photograph goes through the model."""
        usual = PROTOCOLS[self.protocol or "test"]
        own = {item.name: getattr(self, item.name) for item in fields(MapSettings)}
        chosen = {name: usual[name] if value is None else value for name, value in own.items()}
        return MapSettings(**chosen | {"scales": tuple(chosen["scales"])})

    def labels(self, training: LabelSettings) -> LabelSettings:
        """How labels are made here: as in training but for what is said otherwise, here or by the protocol."""
        how = self.said(training)
        usual = PROTOCOLS[self.protocol or "test"]["walk_score"]
        return replace(how, walk_score=usual) if how.walk_score is None else how

    def as_in_training(self) -> EvaluateSettings:
        """These settings without what they say otherwise than training."""
        return replace(self, **dict.fromkeys(_OWN))


def evaluate(
    model: nn.Module,
    dataset: EvaluationSet | ImageLevelSet,
    settings: EvaluateSettings | None = None,
    labels: LabelSettings | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> EvaluationResult | None:
    """Score a model against the masks of a data set.

    CAM, refined CAM and random-walk label know the image-level labels of the data set, as in the paper's
    Table 2; the segmentation does not. Without a protocol in the settings it is the test protocol: longer side 512,
    scales 1, 0.5, 0.75 with flips. Labels are compared at the photograph's own size, pixels of mask value 255 do
    not count.

    In a process group of torch.distributed every process must call this: each takes its share of the images,
    every image is counted once, and all get the same result.

    Args:
        model: an :class:`~afa_model.networks.afa.AFA` on any device, in any mode (left as it was).
        dataset: photographs with masks; without any (`data.held_out`) only the classifier is scored.
        settings: what and how.
        labels: how training makes labels from the CAM.
        stop: asked before each image, or batch of them, whether to give up.

    Returns:
        The scores of each kind of label map; None if some process gave up.

    Raises:
        ValueError: a kind the model does not give, or a model whose number of classes is not the data set's.
    """
    settings = (settings or EvaluateSettings()).by("test")
    how, sizes = settings.labels(labels or LabelSettings()), settings.maps()
    if model.num_classes != dataset.num_classes:
        raise ValueError(f"model: {model.num_classes} classes, but the data set has {dataset.num_classes}")
    kinds = kinds_of(model, settings.kinds, settings.crf) if dataset.has_masks else ()
    rank, world_size = place()
    total = len(dataset) if settings.limit is None else min(settings.limit, len(dataset))
    share = range(rank, total, world_size)
    keeper = ScoreKeeper(kinds, dataset.num_classes, next(model.parameters()).device)

    start = time.perf_counter()
    # its own generator: evaluating in the middle of a training run must not change what the run draws next
    samples = iter(evaluation_loader(dataset, share, settings.num_workers))
    found: list[tuple[list[float], list[float]]] = []
    stopped = False
    with death_told(), laid_out(model, sizes.channels_last):
        for batch in several(progress(samples, "evaluating", len(share), settings.progress), settings.batch):
            stopped = stop()
            if stopped:
                break
            images, cls_labels = ([sample[key] for sample in batch] for key in ("image", "cls_labels"))
            seen = label_maps_of_several(model, images, sizes, how, cls_labels, kinds)
            for sample, maps in zip(batch, seen):
                for kind, label in maps.labels.items():
                    keeper.add(kind, label, sample["mask"])
                found.append((maps.probabilities.tolist(), sample["cls_labels"].tolist()))
    if any(gather_from_all(stopped)):
        return None
    scores = keeper.scores()
    images = [image for share in gather_from_all(found) for image in share]
    probabilities, cls_labels = (torch.tensor(column) for column in zip(*images))
    return EvaluationResult(
        scores=scores,
        class_names=dataset.class_names,
        images=total,
        image_level=image_level_scores(probabilities, cls_labels),
        seconds=time.perf_counter() - start,
        about={"split": dataset.split, "settings": asdict(settings) | asdict(sizes), "labels": asdict(how)},
    )
