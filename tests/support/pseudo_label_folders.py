"""Pseudo-labels of six photographs, and what a folder of them holds."""

from __future__ import annotations

import json
from pathlib import Path

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.datasets import DataSettings
from afa_model.evaluation.pseudo_labels import PseudoLabelSettings, write_pseudo_labels
from afa_model.labels.settings import LabelSettings
from support.color_model import ColorModel
from support.voc_factory import make_voc

HOW = LabelSettings(cam_scales=(1.0, 0.5), radius=3, dilations=(1, 2), num_iter=2)
NAMES = [f"2007_{i:06d}" for i in range(6)]
SHOWN = {name: [("aeroplane", "cat", "person")[i % 3]] for i, name in enumerate(NAMES)}
for odd in (1, 3, 5):
    SHOWN[NAMES[odd]] = sorted({*SHOWN[NAMES[odd]], ("cat", "person", "aeroplane")[odd % 3]}, key=VOC_CLASSES.index)


def six_photographs(root: Path) -> Path:
    """A data set of six photographs with a label file."""
    make_voc(root, count=6)
    (root / "cls_labels.json").write_text(json.dumps(SHOWN))
    return root


def write(root, out, images=("train_aug",), checkpoint="a", how=HOW, model=None, data=None, **settings):
    data = data or DataSettings(root=str(root))
    about = {"file": "x.pt", "sha256": checkpoint * 64}
    settings = PseudoLabelSettings(**{"long_side": 0, "progress": False, **settings})
    return write_pseudo_labels(model or ColorModel(), list(images), out, VOC_CLASSES, about, settings, how, data)


def manifest(out) -> dict:
    return json.loads((out / "manifest.json").read_text())


def written(folder) -> dict[str, int]:
    files = [path for path in folder.rglob("*.*") if path.parent.name != "finished" and path.parent != folder]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}
