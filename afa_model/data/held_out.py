"""Photographs that only the classifier is scored on: of a data set without masks, whose labels are of whole images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .datasets import TrainingSet, VOCData
from .lists import list_file
from .settings import DataSettings
from .transforms import normalize


class ImageLevelSet(VOCData):
    """Whole photographs with their image-level labels.

    ``dataset[index]`` is a dict as that of an EvaluationSet, without a mask.
    """

    def __init__(self, settings: DataSettings, split: str | None = None):
        super().__init__(settings, split or settings.val_split, for_training=True)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = normalize(self.read_photo(index))
        return {"image": image, "cls_labels": self.labels[index], "name": self.names[index]}


def without_masks(settings: DataSettings) -> bool:
    """Whether a data set has none at all. One that has them in another folder is a mistake in the settings."""
    root = Path(settings.root)
    return root.is_dir() and not (root / settings.mask_dir).is_dir() and not any(root.glob("SegmentationClass*"))


def held_out(settings: DataSettings, training: TrainingSet) -> tuple[TrainingSet, ImageLevelSet | None, str]:
    """What is trained on, what the classifier is scored on, and in words what that is.

    The validation list's photographs where there is a list; else ``settings.held_out`` of the training photographs,
    which are not trained on then: always the same ones, whatever order they are listed in.

    Raises:
        DataError: with a line for every file of the validation list that is missing or broken.
    """
    try:
        list_file(Path(settings.root), settings.val_split, settings.list_dir)
    except DataError:
        count = min(round(settings.held_out * len(training)), len(training) - 1)
        if count < 1:
            return training, None, ""
        order = sorted(range(len(training)), key=lambda i: hashlib.sha256(training.names[i].encode()).digest())
        kept, apart = sorted(order[count:]), sorted(order[:count])
        scored = part(training, apart)
        scored.__class__ = ImageLevelSet
        said = f"{count} of the {len(training)} photographs, which are not trained on (data.held_out)"
        return part(training, kept), scored, said
    scored = ImageLevelSet(settings)
    return training, scored, f"the {len(scored)} photographs of {settings.val_split}"


def part(data: VOCData, indices: Sequence[int]) -> Any:
    """The same data set with these images only."""
    result = copy.copy(data)
    result.names = [data.names[i] for i in indices]
    result.labels = data.labels[list(indices)]
    result._masks = [data._masks[i] for i in indices]
    result._photos = [data._photos[i] for i in indices]
    return result
