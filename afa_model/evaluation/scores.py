"""Scores of label maps against masks: mIoU, IoU per class, pixel accuracy; as a table, JSON or CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..conventions import IGNORE
from ..labels.kinds import title
from ..runtime.collectives import sum_over_processes


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says. All values are in 0..1.

    Attributes:
        confusion: int64 [K, K], rows the mask's class, columns the predicted one, in pixels.
        iou: float64 [K], true / (true + missed + wrongly found) per class; NaN for a class that is neither in
            the masks nor predicted.
        miou: mean of ``iou`` over the classes in the masks; one that is only predicted, with an IoU of 0, does not
            count (its pixels are missing from other classes).
        pixel_accuracy: right pixels over all pixels that count.
        mean_accuracy: mean over the classes in the masks of the share of their pixels that were found.
    """

    confusion: Tensor
    iou: Tensor
    miou: float
    pixel_accuracy: float
    mean_accuracy: float

    @classmethod
    def of(cls, confusion: Tensor) -> Scores:
        """Scores of a confusion matrix, integers [K, K]."""
        counts = confusion.detach().cpu().double()
        right, in_masks, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        iou = right / (in_masks + predicted - right)  # 0/0 = NaN: nothing to score
        return cls(
            confusion=confusion.detach().cpu().long(),
            iou=iou,
            miou=float(iou[in_masks > 0].mean()),
            pixel_accuracy=float(right.sum() / counts.sum()),
            mean_accuracy=float((right / in_masks).nanmean()),
        )

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """For JSON: numbers rounded to 1e-6, None where there is nothing to score."""
        return {
            "miou": _number(self.miou),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "mean_accuracy": _number(self.mean_accuracy),
            "iou": {name: _number(value) for name, value in zip(names, self.iou.tolist())},
        }


_PIXELS = 2**20  # counted at a time


class ScoreKeeper:
    """Adds up confusion matrices for several kinds of label map; sums over processes when asked for the
    scores.

    Args:
        kinds: names of the kinds of label map.
        num_classes: K, the background counted.
        device: where the counts are kept.
    """

    def __init__(self, kinds: Sequence[str], num_classes: int, device: str | torch.device = "cpu"):
        self.num_classes = num_classes
        self.matrices = {kind: torch.zeros(num_classes**2, dtype=torch.int64, device=device) for kind in kinds}

    def add(self, kind: str, label: Tensor, mask: Tensor) -> None:
        """Count one image: ``label`` [H, W] in 0..K-1, ``mask`` [H, W] in 0..K-1 and 255 (not counted)."""
        if label.shape != mask.shape:
            raise ValueError(
                f"label: expected the mask's shape {tuple(mask.shape)}, got {tuple(label.shape)}"
            )
        matrix = self.matrices[kind]
        for some, truth in zip(label.flatten().split(_PIXELS), mask.flatten().split(_PIXELS)):
            some, truth = some.to(matrix.device).long(), truth.to(matrix.device).long()
            counted = truth != IGNORE
            for name, values in (("label", some[counted]), ("mask", truth[counted])):
                if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                    found = f"{int(values.min())}..{int(values.max())}"
                    raise ValueError(f"{name}: expected classes 0..{self.num_classes - 1}, got {found}")
            # torchmetrics' matrix compares every pixel with all K^2 entries where algorithms are to be deterministic
            pairs = self.num_classes * truth[counted] + some[counted]
            matrix += torch.bincount(pairs, minlength=len(matrix))

    def scores(self) -> dict[str, Scores]:
        """The scores of all images on all processes (every process of a group must call this)."""
        shape = self.num_classes, self.num_classes
        return {kind: Scores.of(sum_over_processes(matrix).view(shape)) for kind, matrix in self.matrices.items()}


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of every kind of label map that was asked for.

    Attributes:
        scores: kind (``cam``, ``refined_cam``, ``random_walk``, ``refined_random_walk``, ``segmentation``,
            ``segmentation_crf``) -> Scores.
        class_names: K names, background first.
        images: number of images scored, over all processes.
        seconds: how long it took.
        about: what was evaluated (checkpoint, split, settings), for the files.
        image_level: what the classifier is worth on its own (:func:`image_level_scores`), in 0..1.
    """

    scores: Mapping[str, Scores]
    class_names: tuple[str, ...]
    images: int
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    image_level: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Scores:
        return self.scores[kind]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{"images", "seconds", "about", "image_level": {"f1", "map"}, "scores": {kind: {"miou", ...,
        "iou": {class: value}}}}``.
        """
        return {
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "about": self.about,
            "image_level": {name: _number(value) for name, value in self.image_level.items()},
            "scores": {kind: scores.as_dict(self.class_names) for kind, scores in self.scores.items()},
        }

    def write_json(self, path: str | Path) -> Path:
        """Write everything but the confusion matrices."""
        path = _with_folder(path)
        path.write_text(json.dumps(self.as_dict(), indent=2, default=str) + "\n", encoding="utf-8")
        return path

    def write_csv(self, path: str | Path) -> Path:
        """Write one row per class, then the means; one column per kind. An empty field: nothing to score."""
        path = _with_folder(path)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", *self.scores])
            for row, name in enumerate(self.class_names):
                writer.writerow([name, *(_field(scores.iou[row]) for scores in self.scores.values())])
            for name in ("miou", "pixel_accuracy", "mean_accuracy"):
                writer.writerow([name, *(_field(getattr(scores, name)) for scores in self.scores.values())])
        return path

    def table(self, per_class: bool = True) -> Table:
        """A table for the terminal, in percent: IoU of every class that has one, the means below."""
        protocol = self.about.get("settings", {}).get("protocol")
        by = f", protocol {protocol}" if protocol else ""
        table = Table(
            title=f"IoU in percent, {self.images} image{'s' * (self.images != 1)}{by}",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption=_classifier(self.image_level),
            caption_justify="left",
        )
        table.add_column("class", no_wrap=True)
        refinement = self.about.get("labels", {}).get("refinement", "par")
        for kind in self.scores:
            table.add_column(title(kind, refinement), justify="right")
        if per_class:
            for row, name in enumerate(self.class_names):
                values = [float(scores.iou[row]) for scores in self.scores.values()]
                best = max((value for value in values if value > 0), default=None)
                if not all(map(math.isnan, values)):
                    table.add_row(Text(name), *(_percent(value, bold=value == best) for value in values))
            table.add_section()
        for mean, name in (
            ("mIoU", "miou"),
            ("pixel accuracy", "pixel_accuracy"),
            ("mean accuracy", "mean_accuracy"),
        ):
            values = [getattr(scores, name) for scores in self.scores.values()]
            table.add_row(
                mean, *(_percent(value) for value in values), style="bold" if name == "miou" else None
            )
        return table

    def print(self, console: Console | None = None, per_class: bool = True) -> None:
        """Print the table."""
        (console or Console()).print(self.table(per_class))


def image_level_scores(probabilities: Tensor, cls_labels: Tensor) -> dict[str, float]:
    """F1 at a probability of 0.5 and mean average precision, means over the classes that occur; NaN without any, and
    for a classifier that says NaN.

    probabilities, cls_labels: [N, K - 1], in 0..1 and 0 or 1, of N images.
    """
    # Here: a third of the start of every command, and only an evaluation needs it.
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    occurs = cls_labels.bool().any(0)
    if not occurs.any() or probabilities.isnan().any():
        return {"f1": math.nan, "map": math.nan}
    count, truth = int(occurs.sum()), cls_labels[:, occurs].long()
    found = probabilities[:, occurs].double()
    each = {"num_labels": count, "average": None, "validate_args": False}
    return {
        "f1": float(multilabel_f1_score(found, truth, threshold=0.5, **each).double().mean()),
        "map": float(multilabel_average_precision(found, truth, **each).double().mean()),
    }


def _classifier(image_level: Mapping[str, float]) -> str | None:
    if not image_level or math.isnan(image_level["f1"]):
        return None
    return f"classifier: F1 {100 * image_level['f1']:.1f}, mean average precision {100 * image_level['map']:.1f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _field(value: float | Tensor) -> str:
    return "" if math.isnan(float(value)) else f"{float(value):.6f}"


def _percent(value: float, bold: bool = False) -> str:
    text = "-" if math.isnan(value) else f"{100 * value:.1f}"
    return f"[bold]{text}[/bold]" if bold else text


def _with_folder(path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
