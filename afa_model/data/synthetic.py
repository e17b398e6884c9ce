"""A generated data set in VOC layout, made once in a cache folder: what `afa demo` learns from.

The pictures are those of ``synthetic_paint.py``. A picture depends on the seed and its own number alone, so
the data set is the same everywhere and however many pictures are asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..runtime.progress import progress
from .files import write_label
from .synthetic_paint import OWN_COAT, SPECIES, paint_scene

VERSION = 1  # raised whenever other pictures come out
STAMP = "synthetic.json"  # written last: a folder that holds it is complete
SIZES = ((128, 128), (112, 144), (144, 112))  # height, width
JPEG_QUALITY = 92


@dataclass(frozen=True)
class SyntheticSettings:
    """What is generated.

    Args:
        train: number of pictures to train on.
        val: number of pictures to evaluate on.
        seed: another one gives other pictures.
        own_coat: how often an animal's body has the colours of its kind, 0..1. The lower, the less the body
            says about the class, and the more a CAM keeps to the head.
    """

    train: int = 400
    val: int = 80
    seed: int = 0
    own_coat: float = OWN_COAT

    def __post_init__(self) -> None:
        for name, value, least in (("train", self.train, 1), ("val", self.val, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.seed >= 2**32:  # numpy's oldest generator takes no more
            raise ValueError(f"seed: expected at most {2**32 - 1}, got {self.seed}")
        if not 0 <= self.own_coat <= 1:
            raise ValueError(f"own_coat: expected a share in 0..1, got {self.own_coat}")


def scene(settings: SyntheticSettings, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture ``number`` (uint8 [H, W, 3]) and its mask (uint8 [H, W], 0 is background).

    Training pictures are numbered from 0, those to evaluate on from 1,000,000.
    """
    # RandomState and not Generator: numpy promises that its stream never changes
    rng = np.random.RandomState([VERSION, settings.seed, number])
    height, width = SIZES[rng.randint(len(SIZES))]
    return paint_scene(rng, height, width, settings.own_coat)


def cache_folder() -> Path:
    """Where generated data are kept: ``$XDG_CACHE_HOME/afa``, else ``~/.cache/afa``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "afa"


def synthetic_data(
    settings: SyntheticSettings | None = None, root: str | Path | None = None, show_progress: bool = True
) -> Path:
    """The folder of the data set; it is generated first if it is not there yet.

    Args:
        settings: what is wanted.
        root: where; a folder of the cache named after the settings if not given.
        show_progress: draw a progress bar on a terminal.

    Returns:
        a folder with ``JPEGImages``, ``SegmentationClassAug``, ``ImageSets/Segmentation/{train,val}.txt``,
        ``classes.txt`` and ``cls_labels.json`` (the image-level labels).

    Raises:
        DataError: ``root`` holds something else, or cannot be written.
    """
    settings = settings or SyntheticSettings()
    wanted = {"version": VERSION, **asdict(settings)}
    if root is None:
        root = cache_folder() / "animals-v{version}-s{seed}-{train}+{val}-c{own_coat}".format(**wanted)
    root = Path(root)
    if _complete(root, wanted):
        return root
    if root.is_dir() and any(root.iterdir()):
        raise DataError(f"{root} holds something else: give an empty folder for the generated data, or none")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        # made under another name, so that a killed run leaves nothing that looks complete
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise DataError(f"cannot write generated data to {root}: {error}") from error
    try:
        _write(draft, settings, show_progress)
        (draft / STAMP).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        draft.chmod(0o755)
        try:
            draft.replace(root)
        except OSError:
            if not _complete(root, wanted):  # else another process was faster: its data are the same
                raise
    except OSError as error:
        raise DataError(f"cannot write generated data to {root}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _complete(root: Path, wanted: dict[str, float]) -> bool:
    try:
        return json.loads((root / STAMP).read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        return False


def _write(root: Path, settings: SyntheticSettings, show_progress: bool) -> None:
    images, masks, lists = root / "JPEGImages", root / "SegmentationClassAug", root / "ImageSets/Segmentation"
    for folder in (images, masks, lists):
        folder.mkdir(parents=True)
    splits = {
        "train": [(f"train_{i:04d}", i) for i in range(settings.train)],
        "val": [(f"val_{i:04d}", 1_000_000 + i) for i in range(settings.val)],
    }
    every = [entry for entries in splits.values() for entry in entries]
    labels = {}
    for name, number in progress(every, "painting pictures", len(every), show_progress):
        picture, mask = scene(settings, number)
        # 4:4:4: at this size halved chroma would bleed over the outlines
        Image.fromarray(picture).save(images / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
        write_label(masks / f"{name}.png", mask)
        labels[name] = [SPECIES[index - 1] for index in np.unique(mask) if index > 0]
    for split, entries in splits.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in entries), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(("background", *SPECIES)) + "\n", encoding="utf-8")
    (root / "cls_labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
