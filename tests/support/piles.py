"""Piles of photographs for `afa prepare folder`, and what its data sets hold."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from afa_model.data.datasets import DataSettings, TrainingSet
from afa_model.data.transforms import AugmentSettings

RED, BLUE = (200, 40, 30), (30, 60, 210)


def photo(path: Path, color=RED, size=(40, 30), **how) -> Path:
    """A photograph whose left third is white, so that turns show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.paste((255, 255, 255), (0, 0, size[0] // 3, size[1]))
    image.save(path, **how)
    return path


def two_classes(tmp_path: Path) -> Path:
    """Six photographs of each of two classes, in folders of their names; no two are the same."""
    for place, (name, color) in enumerate((("cat", RED), ("dog", BLUE))):
        for number in range(6):
            photo(tmp_path / "pile" / name / f"{name} {number}.jpg", color, (40 + number, 30 + place))
    return tmp_path / "pile"


def labels_in(root: Path) -> dict[str, list[str]]:
    return json.loads((root / "cls_labels.json").read_text())


def names_in(root: Path, split: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()


def opened(root: Path, **changes) -> TrainingSet:
    settings = DataSettings(root=str(root), num_workers=0, **changes)
    return TrainingSet(settings, AugmentSettings(crop=32))
