"""Files of class scores (CAMs, soft labels) as the field's repositories write them; none runs code.

- ``.npy``, ``.npz`` with one array ``[C, h, w]``: a channel for each class;
- ``.npy`` with a dictionary ``{class: [h, w]}`` of the classes shown (AffinityNet), or ``.npz`` with the classes'
  numbers as names of its arrays;
- either with ``keys [n]`` and ``high_res [n, h, w]``, or ``cam`` in its place (IRN); :func:`write_cams`;
- ``.npz`` with ``classes [n]`` and ``scores [n, h, w]``, class 0 the background: :func:`write_scores`.

But in the last, whether number 0 is the background or the first class after it is for the reader to say.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, naming
from .label_file import ArrayUnpickler, dictionary_in

SCORE_SUFFIXES = (".npy", ".npz")
MOST_CLASSES = 254  # 255 is what a label leaves open


@dataclass(frozen=True)
class ClassScores:
    """What a file of scores holds.

    Attributes:
        numbers: of each channel, as the file counts them, ascending.
        maps: float32 [C, h, w].
        with_background: whether 0 is the background; None where the file does not say.
    """

    numbers: tuple[int, ...]
    maps: Tensor
    with_background: bool | None


def read_scores(path: str | Path) -> ClassScores:
    """
    Raises:
        DataError: ``scores PATH: REASON``: it is not there, broken, or holds something else than scores in 0..1.
    """
    path = Path(path)
    with naming(path, "scores"):
        content = _npz(path) if path.suffix.lower() == ".npz" else _npy(path)
        try:
            numbers, maps, with_background = _layout(content)
            return ClassScores(*_ordered(numbers, maps), with_background)
        except ValueError as error:
            raise DataError(f"scores {path}: {error}") from None


def write_scores(path: str | Path, numbers: Sequence[int], maps: Tensor) -> None:
    """``.npz`` of ``classes`` [C] uint8, the background 0, and ``scores`` float16 [C, H, W]."""
    with open(path, "wb") as file:
        np.savez_compressed(file, classes=np.array(numbers, np.uint8), scores=maps.to(torch.float16).cpu().numpy())


def write_cams(path: str | Path, numbers: Sequence[int], maps: Tensor) -> None:
    """``.npz`` of ``keys`` [C] uint8, 0 the first class after the background, and ``high_res`` float16 [C, H, W]."""
    with open(path, "wb") as file:
        np.savez_compressed(file, keys=np.array(numbers, np.uint8), high_res=maps.to(torch.float16).cpu().numpy())


class _TensorUnpickler(ArrayUnpickler):
    """Dictionaries that were saved with tensors in them, too."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return super().find_class(module, name)


def _npy(path: Path) -> Any:
    with path.open("rb") as file:
        content = dictionary_in(file, _TensorUnpickler)
        if content is not None:
            return content
        file.seek(0, os.SEEK_SET)
        return np.load(file, allow_pickle=False)


def _npz(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    if len(arrays) == 1 and not next(iter(arrays)).isdigit():
        return next(iter(arrays.values()))
    return arrays


def _layout(content: Any) -> tuple[list[int], Any, bool | None]:
    """Numbers, maps, and whether 0 is the background."""
    if isinstance(content, Mapping):
        for numbers, maps, with_background in (
            ("classes", "scores", True), ("keys", "high_res", None), ("keys", "cam", None),
        ):  # fmt: skip
            if numbers in content and maps in content:
                return _numbers(np.asarray(content[numbers])), content[maps], with_background
        if not content:
            raise ValueError("a dictionary without a class")
        return _numbers(list(content)), [np.asarray(value) for value in content.values()], None
    maps = np.asarray(content)
    if maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    return list(range(len(maps))) if maps.ndim else [], maps, None


def _numbers(keys: Any) -> list[int]:
    try:
        return [int(key) for key in keys]
    except (TypeError, ValueError):
        shown = ", ".join(map(str, list(keys)[:4]))
        raise ValueError(f"expected class numbers, or keys and high_res, or classes and scores, got {shown}") from None


def _ordered(numbers: list[int], maps: Any) -> tuple[tuple[int, ...], Tensor]:
    if isinstance(maps, list):
        shapes = {array.shape for array in maps}
        if len(shapes) > 1:
            raise ValueError(f"maps of different sizes: {', '.join(map(str, sorted(shapes)[:3]))}")
    maps = np.asarray(maps)
    if not numbers and maps.ndim == 3 and maps.shape[0] == 0 and 0 not in maps.shape[1:]:
        return (), torch.zeros(maps.shape)  # of a photograph that shows no class
    if maps.ndim != 3 or not maps.size or maps.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers [C, h, w], or a map [h, w] for each class, got {maps.dtype} {maps.shape}")
    if len(numbers) != len(maps):
        raise ValueError(f"{len(numbers)} classes but {len(maps)} maps")
    if len(set(numbers)) != len(numbers) or not 0 <= min(numbers) <= max(numbers) < MOST_CLASSES:
        raise ValueError(f"expected classes 0..{MOST_CLASSES - 1}, each once, got {', '.join(map(str, numbers[:8]))}")
    order = np.argsort(numbers)
    maps = torch.from_numpy(np.ascontiguousarray(maps[order], np.float32))
    low, high = float(maps.min()), float(maps.max())  # a NaN comes through
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"expected scores in 0..1, got {low:g}..{high:g}")
    return tuple(numbers[i] for i in order), maps.clamp_(0, 1)
