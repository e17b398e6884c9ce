"""A Vision Transformer in every command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image
from support.tiny_run import rows, tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.commands import demo
from afa_model.config import parse
from afa_model.data.synthetic import SyntheticSettings, synthetic_data
from afa_model.labels.kinds import KINDS
from afa_model.pictures.attention import attention_of
from afa_model.runs import checkpoint
from afa_model.runs.restore import load_model

SHOWN = {"eval__every": 4, "log__pictures_every": 3, "checkpoint__every": 2}
VIT = {"model.backbone": "test_vit", "model.aux_layer": -3, "model.decoder": "largefov"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    make_voc(folder, count=6)
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The folder of a run of four steps, with an evaluation and pictures."""
    out = tmp_path_factory.mktemp("runs") / "vit"
    assert cli.main(["train", *tiny_args(root, out, **VIT, **SHOWN)]) == 0
    return out


def photo(root) -> str:
    return str(root / "JPEGImages" / "2007_000001.jpg")


def test_a_run_logs_the_auxiliary_losses(trained):
    table = rows(trained / "train.csv")
    assert len(table) == 4
    for row in table:
        parts = {name: float(row[name] or 0) for name in row}
        assert parts["aux_loss"] > 0 and 0 < parts["contrast_loss"] < 1
        learned = 0.1 * (parts["seg_loss"] + parts["aff_loss"]) + 0.01 * parts["reg_loss"]
        first = row["iteration"] == "1"  # the classifiers' phase
        want = parts["cls_loss"] + parts["aux_loss"] + 0.2 * parts["contrast_loss"] + (0 if first else learned)
        assert parts["loss"] == pytest.approx(want, rel=1e-5)
    assert len(list((trained / "pictures").glob("*.png"))) == 1


def test_a_mit_has_no_such_columns(root, tmp_path):
    assert cli.main(["train", *tiny_args(root, tmp_path / "mit", schedule__max_iters=1, step__aff_iters=0)]) == 0
    assert not {"aux_loss", "contrast_loss"} & set(rows(tmp_path / "mit" / "train.csv")[0])


def test_it_resumes_to_the_same_weights(trained, root, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "iter_00000002.pt").write_bytes((trained / "iter_00000002.pt").read_bytes())
    assert cli.main(["train", *tiny_args(root, tmp_path / "half", resume="auto", **VIT, **SHOWN)]) == 0
    ends = [checkpoint.read(folder / "iter_00000004.pt")["model"] for folder in (trained, tmp_path / "half")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_evaluate_scores_every_kind(trained, tmp_path):
    assert cli.main(["evaluate", "--checkpoint", str(trained), "--json", str(tmp_path / "s.json"), "--crf"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert list(scores) == [*KINDS, "segmentation_crf"]
    assert all(0 <= entry["miou"] <= 1 for entry in scores.values())


def test_predict_labels_and_draws_a_photograph(trained, root, tmp_path):
    line = ["predict", photo(root), "--checkpoint", str(trained), "--out", str(tmp_path), "--affinity-at", "10,10"]
    assert cli.main(line) == 0
    drawn = {path.name for path in tmp_path.rglob("*.png")}
    assert len(drawn) >= 2
    with Image.open(photo(root)) as picture:
        labels = [path for path in tmp_path.rglob("*.png") if Image.open(path).size == picture.size]
    assert labels and all(set(np.unique(np.asarray(Image.open(path)))) <= set(range(21)) for path in labels)


def test_heads_of_both_blocks_are_drawn(trained, tmp_path, monkeypatch):
    seen = []
    real = __import__("afa_model.evaluation.predict", fromlist=["x"]).head_weights_figure
    monkeypatch.setattr("afa_model.evaluation.predict.head_weights_figure", lambda *a: seen.append(a) or real(*a))
    assert cli.main(["predict", "--checkpoint", str(trained), "--head-weights", str(tmp_path / "weights.png")]) == 0
    (weights, _, blocks, _), = seen
    assert (len(weights), blocks) == (4, 2), "two blocks of two heads"
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_raw_attention_is_drawn(trained, root, tmp_path):
    assert cli.main(["figures", "3", "--checkpoint", str(trained), "--out", str(tmp_path), photo(root)]) == 0
    assert (tmp_path / "figure_3.png").stat().st_size > 1000
    attention, grid = attention_of(load_model(trained).model, torch.randn(1, 3, 40, 70))
    assert grid == (3, 5) and attention.shape == (15, 15)
    torch.testing.assert_close(attention.sum(1), torch.ones(15))


def test_pseudo_labels_are_written(trained, tmp_path):
    line = ["pseudo-labels", "--checkpoint", str(trained), "--images", "train_aug", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    assert len(list(tmp_path.rglob("*.png"))) >= 6


# --- frozen ---


def test_a_run_whose_backbone_is_frozen_starts_from_anothers_weights(trained, root, tmp_path, capsys):
    weights = trained / "best.pt"
    out = tmp_path / "frozen"
    frozen = {"model__pretrained": weights, "model__freeze_backbone": True}
    assert cli.main(["train", *tiny_args(root, out, **VIT, **frozen)]) == 0
    said = capsys.readouterr().out
    assert "step.contrast_weight has no effect" in said and "at random" not in said
    before, after = load_model(weights).model, load_model(out).model
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(after.encoder.state_dict()[name], value), name
    assert not torch.equal(before.classifier.weight, after.classifier.weight)
    state = checkpoint.read(out / "iter_00000004.pt")
    learned = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert learned == sum(not name.startswith("encoder") for name, _ in after.named_parameters())
    assert all(row["contrast_loss"] == "" and float(row["aux_loss"]) > 0 for row in rows(out / "train.csv"))


def test_a_frozen_backbone_without_weights_is_told(root, tmp_path, capsys):
    frozen = {"model__backbone": "test_vit", "model__freeze_backbone": True, "schedule__max_iters": 1}
    assert cli.main(["train", *tiny_args(root, tmp_path, **frozen, step__aff_iters=0)]) == 0
    said = capsys.readouterr().out
    assert "it stays as it was drawn, at random" in said and "contrast" not in said


# --- the demo ---


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ([], "demo"),
        (["--model.backbone", "mit_b1"], "demo"),
        (["--model.backbone=test_vit"], "demo_vit"),
        (["--seed", "1", "--model.backbone", "vit_tiny_patch16_224"], "demo_vit"),
        (["--model.backbone", "resnet18"], "demo"),
        (["--model.backbone", "vit_of_nobody"], "demo"),
    ],
)
def test_the_demo_starts_from_the_settings_of_its_backbone(line, name):
    assert demo.settings_for(line) == name


def test_the_demos_cells_cover_the_same_part_of_a_picture():
    mit, vit = parse(["--config", "demo"]), parse(["--config", "demo_vit"])
    grids = [config.augment.crop // cell for config, cell in ((mit, math.prod(mit.model.stride)), (vit, 16))]
    shares = [config.augment.scale[0] * 128 / config.augment.crop for config in (mit, vit)]
    assert grids == [16, 16] and shares[0] == pytest.approx(shares[1])
    assert (mit.labels.radius, mit.eval.radius) == (vit.labels.radius, vit.eval.radius)
    assert mit.schedule == vit.schedule and mit.step == vit.step


def test_a_demo_with_a_frozen_vision_transformer(tmp_path, capsys):
    tiny = SyntheticSettings(train=8, val=4)
    root = synthetic_data(tiny, tmp_path / "data", show_progress=False)
    line = ["--config", "demo_vit", "--out", str(tmp_path / "run"), "--data.root", str(root)]
    line += ["--model.backbone", "test_vit", "--model.freeze_backbone", "true", "--augment.crop", "64"]
    line += ["--schedule.scale", "0.01", "--loader.batch_size", "2", "--log.pictures_every", "0"]
    result = demo.demo(parse(line, "afa demo"), tiny)
    assert list(result.scores) == list(demo.ROWS) and result.pictures[0].name == "overview.png"


def test_doctor_runs_beside_it(capsys):
    assert cli.main(["doctor"]) == 0
    assert "timm" in capsys.readouterr().out
