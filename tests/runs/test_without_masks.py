"""A data set of photographs and image-level labels alone: it is trained on, and the classifier is what is scored."""

from __future__ import annotations

import shutil

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc

from afa_model.config import parse
from afa_model.data.datasets import TrainingSet
from afa_model.data.held_out import held_out, without_masks
from afa_model.data.settings import DataSettings
from afa_model.errors import ConfigError, DataError
from afa_model.runs import loop

LISTS = "ImageSets/Segmentation"


@pytest.fixture
def root(tmp_path):
    """Ten photographs, XML annotations, a list to train on; no list to evaluate on and no mask."""
    folder = tmp_path / "photographs"
    make_voc(folder, count=10, xml=True)
    shutil.rmtree(folder / "SegmentationClassAug")
    (folder / LISTS / "val.txt").unlink()
    return folder


def run(root, out, **changes) -> loop.Summary:
    return loop.train(parse(tiny_args(root, out, eval__every=2, data__label_source="xml", **changes)))


def test_a_share_is_kept_apart_for_the_classifier(root, tmp_path, capsys):
    summary = run(root, tmp_path / "run", data__held_out=0.3)
    printed = capsys.readouterr().out
    assert f"{root} has no masks to score against, as if eval.every were 0" in printed
    assert "every 2 steps the classifier is scored on 3 of the 10 photographs, which are not trained on" in printed
    assert "7 training images" in printed and "evaluation after step 4, classifier F1 " in printed
    assert summary.scores == {} and "mIoU" not in printed
    scored = rows(tmp_path / "run" / "eval.csv")
    assert [row["iteration"] for row in scored] == ["2", "4"]
    assert all(set(row) == {"iteration", "classifier_f1", "classifier_map"} for row in scored)
    best = max(float(row["classifier_map"]) for row in scored)
    latest = max(int(row["iteration"]) for row in scored if float(row["classifier_map"]) == best)
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=False)
    assert state["progress"] == {"iteration": latest, "best": best}


def test_the_same_ones_are_kept_apart_whatever_their_order(root):
    settings = DataSettings(root=str(root), label_source="xml", num_workers=0, held_out=0.3)
    kept, scored, _ = held_out(settings, TrainingSet(settings))
    assert len(kept) == 7 and len(scored) == 3 and not set(kept.names) & set(scored.names)
    assert scored[0]["cls_labels"].sum() > 0 and scored[0]["image"].shape[0] == 3 and "mask" not in scored[0]
    listing = root / LISTS / f"{settings.train_split}.txt"
    listing.write_text("\n".join(reversed(listing.read_text().split())) + "\n")
    again, others, _ = held_out(settings, TrainingSet(settings))
    assert set(others.names) == set(scored.names) and again.names == kept.names[::-1]
    by_name = dict(zip(again.names, again.labels.tolist()))
    assert all(by_name[name] == label for name, label in zip(kept.names, kept.labels.tolist()))


def test_a_list_to_evaluate_on_is_what_is_scored(root, tmp_path, capsys):
    listing = root / LISTS / "train_aug.txt"
    names = listing.read_text().split()
    listing.write_text("\n".join(names[:6]) + "\n")
    (root / LISTS / "val.txt").write_text("\n".join(names[6:]) + "\n")
    run(root, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "the classifier is scored on the 4 photographs of val" in printed and "6 training images" in printed
    (root / "JPEGImages" / f"{names[9]}.jpg").unlink()
    with pytest.raises(DataError, match=names[9]):
        run(root, tmp_path / "again")


def test_nothing_is_kept_apart_that_need_not_be(root, tmp_path, capsys):
    run(root, tmp_path / "run", data__held_out=0)
    printed = capsys.readouterr().out
    assert "10 training images" in printed and "evaluation after" not in printed
    assert not (tmp_path / "run" / "eval.csv").exists()
    loop.train(parse(tiny_args(root, tmp_path / "never", data__label_source="xml")))
    assert "has no masks" not in capsys.readouterr().out


def test_masks_in_another_folder_are_a_mistake(root):
    settings = DataSettings(root=str(root))
    assert without_masks(settings) and not without_masks(DataSettings(root=str(root / "nowhere")))
    (root / "SegmentationClass").mkdir()
    assert not without_masks(settings)
    (root / "SegmentationClass").rmdir()
    (root / "SegmentationClassAug").mkdir()
    assert not without_masks(settings)
    with pytest.raises(ConfigError, match=r"data\.held_out: expected a share"):
        parse(["--data.held_out=1"])


def test_a_resumed_run_scores_on_as_before(root, tmp_path):
    run(root, tmp_path / "run", schedule__max_iters=4, checkpoint__every=1)
    run(root, tmp_path / "run", schedule__max_iters=6, resume="auto")
    assert [row["iteration"] for row in rows(tmp_path / "run" / "eval.csv")] == ["2", "4", "6"]
