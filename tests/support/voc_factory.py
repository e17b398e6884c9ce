"""Small data sets in VOC layout for tests: coloured shapes on noise, with masks, labels and annotations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.files import write_label

# one plain colour per class, far apart, so that a test model can recognise them
COLORS = {0: (40, 40, 40), 1: (220, 30, 30), 8: (30, 200, 40), 15: (40, 60, 230)}


def make_voc(
    root: Path,
    count: int = 6,
    size: tuple[int, int] = (48, 64),
    *,
    splits: tuple[str, ...] = ("train_aug", "val"),
    xml: bool = False,
    suffix: str = "jpg",
) -> list[str]:
    """Write ``count`` photographs (height, width = ``size``, the width grows by one each) and return their
    names.

    Image ``i`` shows one or two of the classes 1, 8, 15 as squares; a line of ignored pixels runs around
    each.
    """
    rng = np.random.default_rng(7)
    names = [f"2007_{i:06d}" for i in range(count)]
    for i, name in enumerate(names):
        height, width = size[0], size[1] + i
        mask = np.zeros((height, width), np.uint8)
        classes = [(1, 8, 15)[i % 3]] + ([(8, 15, 1)[i % 3]] if i % 2 else [])
        for place, index in enumerate(classes):
            top, left = height // 4, 4 + place * width // 2
            bottom, right = 3 * height // 4, left + width // 3
            mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
            mask[top:bottom, left:right] = index
        photo = np.zeros((height, width, 3))
        for index, color in COLORS.items():
            photo[(mask == index) | ((mask == 255) & (index == 0))] = color
        photo = np.clip(photo + rng.normal(0, 6, photo.shape), 0, 255).astype(np.uint8)
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(root / "JPEGImages" / f"{name}.{suffix}", quality=95)
        write_label(root / "SegmentationClassAug" / f"{name}.png", mask)
        if xml:
            write_xml(root, name, [VOC_CLASSES[index] for index in classes])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return names


def write_xml(root: Path, name: str, objects: list[str]) -> None:
    """An annotation whose objects have parts with names of their own, as some of VOC's do."""
    body = "".join(
        f"<object><name>{item}</name><part><name>head</name></part><difficult>1</difficult></object>"
        for item in objects
    )
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{name}.jpg</filename>{body}</annotation>")
