"""COCO by command, on a miniature of it in the published layout: prepared, trained by `--config coco`, evaluated."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image

from afa_model import cli
from afa_model.data.classes import COCO_CLASSES
from afa_model.data.datasets import DataSettings, EvaluationSet
from afa_model.data.files import read_label
from afa_model.data.prepare import coco
from afa_model.evaluation.evaluate import EvaluateSettings, evaluate
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.runs import checkpoint

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # the ids that COCO leaves out of 1..90
KINDS = dict(zip(COCO_CLASSES[1:], (key for key in range(1, 91) if key not in GAPS)))
SHOWN = {
    "train": ["dog", "person", "toothbrush", "", "stop sign", "dog"],
    "val": ["", "toothbrush", "person", "tv", "dog"],
}
HEIGHT, WIDTH = 48, 64
SMALL = [
    "--device=cpu", "--model.backbone=mit_b0", "--augment.crop=64", "--data.num_workers=0", "--log.tensorboard=false",
    "--log.pictures_every=0", "--eval.limit=2", "--eval.scales=[1]", "--eval.cam_scales=[1]", "--labels.cam_scales=[1]",
]  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """What the three archives hold, unpacked beside each other: photographs of one object each, or none."""
    root = tmp_path_factory.mktemp("COCO")
    categories = [{"id": key, "name": name, "supercategory": "thing"} for name, key in KINDS.items()]
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split, shown in SHOWN.items():
        (root / f"{split}2014").mkdir()
        images, annotations = [], []
        for number, name in enumerate(shown, 9):
            file = f"COCO_{split}2014_{number:012d}.jpg"
            width = WIDTH + number * (split == "train")
            photo = rng.integers(0, 60, (HEIGHT, width, 3), np.uint8)
            images.append({"id": number, "file_name": file, "height": HEIGHT, "width": width})
            if name:
                photo[10:34, 8:40] += np.array([2 * KINDS[name], 180 - 2 * KINDS[name], 90], np.uint8)
                polygon = [8, 10, 40, 10, 40, 34, 8, 34]
                annotations.append(
                    {"id": 100 + number, "image_id": number, "category_id": KINDS[name], "iscrowd": 0,
                     "segmentation": [polygon], "area": 32 * 24, "bbox": [8, 10, 32, 24]}
                )  # fmt: skip
            Image.fromarray(photo).save(root / f"{split}2014" / file)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def prepared(unpacked) -> Path:
    """`afa prepare coco`, to which this is all of COCO."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "CocoCounts", _Miniature)
        assert cli.main(["prepare", "coco", "--root", str(unpacked), "--offline"]) == 0
    return unpacked


class _Miniature:
    train, val, categories = len(SHOWN["train"]), len(SHOWN["val"]), 80


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """The folder of a run of `--config coco`, of whose 80,000 steps one option leaves eight."""
    out = tmp_path_factory.mktemp("runs") / "coco"
    line = ["train", "--config", "coco", "--data.root", str(prepared), "--out", str(out), "--schedule.scale", "0.0001"]
    assert cli.main([*line, *SMALL]) == 0
    return out


def test_photographs_that_are_unpacked_already_need_no_archive(prepared):
    assert (prepared / "JPEGImages" / "train").resolve() == (prepared / "train2014").resolve()
    mask = read_label(prepared / "SegmentationClass" / "train" / "COCO_train2014_000000000011.png")
    assert mask.shape == (HEIGHT, WIDTH + 11) and set(mask.unique().tolist()) == {0, 80}
    labels = json.loads((prepared / "cls_labels.json").read_text())
    assert labels["COCO_val2014_000000000010"] == ["toothbrush"] and labels["COCO_train2014_000000000012"] == []


def test_a_run_of_81_classes_goes_through_all_phases(trained):
    """Counts of steps all shrink alike; what is due less than once a step is due at every step."""
    state = checkpoint.read(trained / "iter_00000008.pt")
    assert state["model"]["decoder.linear_pred.weight"].shape[0] == 81
    assert state["model"]["classifier.weight"].shape[0] == 80
    assert state["class_names"] == list(COCO_CLASSES)
    with open(trained / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == [str(step) for step in range(1, 9)]
    learns = [bool(row["seg_loss"]) for row in rows]
    assert learns == [False] * 2 + [True] * 6, "the classifier alone in steps 0 and 1: 0.5 is at least 1"
    with open(trained / "eval.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == [str(step) for step in range(1, 9)]


def test_evaluate_scores_81_classes(trained, tmp_path, capsys):
    last, file = trained / "iter_00000008.pt", tmp_path / "scores.json"
    line = ["evaluate", "--checkpoint", str(last), "--device", "cpu", "--json", str(file)]
    assert cli.main([*line, "--eval.long_side=96", "--eval.limit=null"]) == 0
    assert "trained for 8 steps, on val of" in capsys.readouterr().out
    scores = json.loads(file.read_text())
    assert scores["images"] == len(SHOWN["val"]) and scores["about"]["split"] == "val"
    for kind in ("cam", "refined_cam", "random_walk", "refined_random_walk", "segmentation"):
        iou = scores["scores"][kind]["iou"]
        assert tuple(iou) == COCO_CLASSES
        in_masks = {"background", *SHOWN["val"]} - {""}
        assert {name for name, value in iou.items() if value is not None} >= in_masks
        mean = sum(iou[name] for name in in_masks) / len(in_masks)
        assert scores["scores"][kind]["miou"] == pytest.approx(mean, abs=1e-5), "of the classes in the masks"


def test_evaluation_keeps_neither_logits_nor_labels(prepared):
    """Of a photograph that was scored nothing is left but counts, and a probability and a label of each class."""
    data = DataSettings(root=str(prepared), mask_dir="SegmentationClass", num_workers=0)
    model, held = AFA("mit_b0", 81, embedding=16).eval(), []

    def look() -> bool:
        """Before each photograph: bytes of the tensors that evaluation made and holds."""
        gc.collect()
        made = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        held.append(sum({storage.data_ptr(): storage.nbytes() for storage in made}.values()))
        return False

    small = EvaluateSettings(long_side=64, scales=(1.0,), cam_scales=(1.0,), radius=2, progress=False)
    gc.freeze()  # what there is already is not looked at
    try:
        evaluate(model, EvaluationSet(data), small, LabelSettings(num_iter=1), look)
    finally:
        gc.unfreeze()
    assert len(held) == len(SHOWN["val"]) and held[0] >= 5 * 81 * 81 * 8, "the counts of five kinds of label map"
    # From the third look on the label maps of one photograph of one class are there, never those of more.
    assert held[-1] - held[2] < HEIGHT * WIDTH, "not even a byte of each pixel of a photograph"
