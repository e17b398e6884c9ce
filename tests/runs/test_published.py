"""Checkpoints of the public code: known by their names, evaluated and applied as a run's are."""

from __future__ import annotations

import re

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support.broken_files import write_payload
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.errors import CheckpointError
from afa_model.networks.afa import AFA
from afa_model.runs.restore import load_model

SMALL = ["--long_side", "64", "--cam_scales", "[1]", "--dilations", "[1, 2]", "--num_iter", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return AFA("mit_b0", 21).state_dict()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_it_is_recognised_by_its_names(tmp_path, state, prefix):
    path = tmp_path / "wetr_iter_20000.pth"
    torch.save({prefix + name: value for name, value in state.items()}, path)
    restored = load_model(path)
    assert restored.config.model.backbone == "mit_b0" and not restored.model.training
    assert restored.class_names[15] == "person" and restored.trained == "published weights"
    assert all(torch.equal(value, state[name]) for name, value in restored.model.state_dict().items())


@pytest.mark.parametrize(("backbone", "classes", "name"), [("mit_b1", 81, "toothbrush"), ("mit_b2", 4, "class 3")])
def test_backbone_and_classes_are_read_from_the_weights(tmp_path, backbone, classes, name):
    torch.save({"state_dict": AFA(backbone, classes).state_dict()}, tmp_path / "w.pth")
    restored = load_model(tmp_path / "w.pth")
    assert restored.config.model.backbone == backbone and restored.class_names[-1] == name
    assert restored.config.labels.num_iter == (15 if classes == 81 else 10), "as its data set's run has it"


def test_another_network_under_the_same_names_is_refused(tmp_path, state):
    fewer = {name: value for name, value in state.items() if "block3.1" not in name}
    torch.save(fewer, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth has the names of a published AFA.*blocks \(2, 2, 1, 2\)"):
        load_model(tmp_path / "w.pth")


def test_weights_that_are_no_numbers_are_refused(tmp_path, state):
    torch.save({**state, "classifier.weight": state["classifier.weight"] * float("nan")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"checkpoint .*w\.pth holds NaN or infinite weights: classifier\.weight"):
        load_model(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["w.pth", "model.safetensors"])
def test_commands_take_it(tmp_path, state, capsys, kind):
    """The file, or the folder that ``save_pretrained`` writes."""
    make_voc(tmp_path / "voc", count=2)
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    checkpoint = ["--checkpoint", str(tmp_path / kind)]
    if kind == "model.safetensors":
        model = AFA("mit_b0", 21)
        model.load_state_dict(state)
        model.save_pretrained(tmp_path / "hub")
        checkpoint = ["--checkpoint", str(tmp_path / "hub")]
    small = [word if word[:2] != "--" or word == "--device" else f"--labels.{word[2:]}" for word in SMALL[2:]]
    data = ["--data.root", str(tmp_path / "voc"), "--eval.long_side", "64", "--eval.limit", "1", "--eval.scales", "[1]"]
    assert cli.main(["evaluate", *checkpoint, *data, *small]) == 0
    printed = capsys.readouterr().out
    assert f"{kind}, published weights, on val of" in printed and re.search(r"mIoU", printed)
    photo = next((tmp_path / "voc" / "JPEGImages").iterdir())
    out = ["--out", str(tmp_path / "out"), "--panels", "false"]
    assert cli.main(["predict", str(photo), *checkpoint, *out, "--scales", "[1]", *SMALL]) == 0
    assert (tmp_path / "out" / f"{photo.stem}.png").is_file()


@pytest.mark.parametrize("command", ["evaluate", "predict", "train"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, command, suffix, capsys):
    path = write_payload(tmp_path / f"w{suffix}", tmp_path / "mark", format=1, model={}, config={}, class_names=[])
    training = ["--resume", str(path), "--out", str(tmp_path / "run")]
    door = training if command == "train" else ["--checkpoint", str(path)]
    make_voc(tmp_path / "voc", count=1)
    argv = [command, *door, *(["--data.root", str(tmp_path / "voc")] if command != "predict" else [])]
    assert cli.main(argv) == 2
    assert "holds more than data (posix.mkdir), which is not run" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl", ".pt", ".json"])
def test_code_in_a_label_file_does_not_run(tmp_path, suffix, capsys):
    make_voc(tmp_path / "voc", count=1)
    path = write_payload(tmp_path / f"labels{suffix}", tmp_path / "mark")
    argv = ["train", "--data.root", str(tmp_path / "voc"), "--data.label_file", str(path)]
    argv += ["--out", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    assert f"labels{suffix}" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
