"""Names of classes, and the colours that label files and pictures give them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError
from .class_file import read_class_file

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

COCO_CLASSES = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse",
    "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie",
    "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
    "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse",
    "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_KNOWN_CLASSES = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}


def class_names(dataset: object, num_classes: int | None = None) -> tuple[str, ...]:
    """Names of the classes, background first.

    Args:
        dataset: ``"voc"`` (21 names), ``"coco"`` (81), a data set with an attribute ``class_names``, or the
            root folder of one. A folder's ``classes.txt`` (one name a line, the background first or left out;
            see :func:`~afa_model.data.class_file.read_class_file`) decides; a folder without it has VOC's names
            if ``num_classes`` is 21 or None and COCO's if it is 81.
        num_classes: number of classes, the background counted; checked against the names where both are
            known.

    Raises:
        DataError: no names are known for this many classes, or ``classes.txt`` holds another number of them.
    """
    if hasattr(dataset, "class_names"):
        names = tuple(dataset.class_names)
        source = type(dataset).__name__
    elif isinstance(dataset, str) and dataset in _KNOWN_CLASSES:
        names, source = _KNOWN_CLASSES[dataset], dataset
    else:
        path = Path(str(dataset)) / "classes.txt"
        if path.is_file():
            names, source = read_class_file(path), str(path)
        else:
            known = {len(value): value for value in reversed(_KNOWN_CLASSES.values())}  # the first of a length
            names, source = known.get(num_classes or len(VOC_CLASSES), ()), str(dataset)
            if not names:
                known_number = (num_classes or 0) + 1
                hint = f"; the background counts: {known_number}?" if known_number in known else ""
                raise DataError(
                    f"no class names for num_classes={num_classes}{hint}: write them to {path}, one a line"
                )
    if num_classes is not None and len(names) != num_classes:
        hint = f": the background counts, num_classes is {len(names)}" if num_classes == len(names) - 1 else ""
        raise DataError(
            f"num_classes is {num_classes} but {source} names {len(names)} classes (background counted){hint}"
        )
    return names


def other_name(model: Sequence[str], data: Sequence[str]) -> str | None:
    """Where the names of a model's classes and of a data set's differ first, in words; None if they are the same.

    Only numbers stand in weights and masks, so nothing else tells that one means another class than the other.
    """
    for number, (ours, theirs) in enumerate(itertools.zip_longest(model, data)):
        if ours != theirs:
            known, there = ("no class" if name is None else repr(name) for name in (ours, theirs))
            return f"class {number} is {known} to the checkpoint and {there} in the data"
    return None


def voc_palette(size: int = 256) -> np.ndarray:
    """The VOC colour map, uint8 [size, 3]: the bits of an index, spread over the high bits of red, green and
    blue.
    """
    index = np.arange(size)
    palette = np.zeros((size, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
