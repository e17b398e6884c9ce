"""Checkpoints and folders of a model with a Vision Transformer: restored as it was, converted where there is a way."""

from __future__ import annotations

import json

import pytest
import support.needs_command_line  # noqa: F401
import torch

from afa_model import cli
from afa_model.config import Config, from_dict, parse, to_dict
from afa_model.errors import ConfigError
from afa_model.networks.afa import AFA
from afa_model.runs import checkpoint
from afa_model.runs.restore import build_model, load_model

NAMES = ("background", "cat", "dog")
SETTINGS = ["--model.backbone", "test_vit", "--model.decoder", "largefov", "--model.aux_layer", "-3",
            "--model.affinity_blocks", "1", "--model.freeze_backbone", "true", "--model.pooling", "gap"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple:
    """A checkpoint as `afa train` writes it, and the model in it."""
    torch.manual_seed(0)
    config = parse(SETTINGS)
    model = build_model(config, 3)
    path = tmp_path_factory.mktemp("run") / "own.pt"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    progress = checkpoint.Progress(400, 12.3)
    checkpoint.write_atomically(path, checkpoint.pack(model, optimizer, progress, [], to_dict(config), NAMES))
    return path, model.eval()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alike(got: AFA, want: AFA) -> bool:
    images = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = list(zip(got(images), want(images), strict=True))
    return all(a == b if isinstance(a, tuple) else torch.equal(a, b) for a, b in pairs)


def test_settings_make_the_model():
    model = build_model(parse(SETTINGS), 3)
    assert model.arguments | {"backbone_args": {}} == {
        "backbone": "test_vit", "num_classes": 3, "stride": [4, 2, 2, 1], "pooling": "gap", "embedding": 512,
        "decoder_dropout": 0.1, "backbone_args": {}, "decoder": "largefov", "aux_layer": -3, "affinity_blocks": 1,
        "freeze_backbone": True,
    }  # fmt: skip
    assert model.aux_classifier is not None and model.freeze_backbone and model.attn_proj.in_channels == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.affinity_blocks", "0"], "model.affinity_blocks: expected at least 1, got 0"),
        (["--model.decoder", "unet"], "model.decoder: expected"),
        (["--model.aux_layer", "last"], "model.aux_layer: expected int or null, got"),
        (["--model.freeze_backbone", "maybe"], "model.freeze_backbone: expected"),
    ],
)
def test_wrong_settings_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.backbone", "swin_tiny_patch4_window7_224"], "model: backbone: swin.* attends within windows"),
        (["--model.backbone", "test_vit", "--model.stride", "[4,2,2,2]"], "model: stride: test_vit has patches of 16"),
        (["--model.backbone", "mit_b0", "--model.aux_layer", "-3"], "model: aux_layer: expected none with mit_b0"),
        (["--model.backbone", "test_vit", "--model.pretrained", "none.pth"], "model: pretrained: no weight file at"),
    ],
)
def test_what_cannot_be_built_is_named(words, message):
    with pytest.raises(ConfigError, match=message):
        build_model(parse(words), 3)


def test_settings_of_before_make_what_they_made():
    settings = to_dict(Config())
    for name in ("decoder", "aux_layer", "affinity_blocks", "freeze_backbone"):
        del settings["model"][name]
    settings["model"]["backbone"] = "mit_b0"
    model = build_model(from_dict(settings), 3)
    assert model.arguments == AFA("mit_b0", 3).arguments and model.aux_classifier is None


def test_a_checkpoint_is_restored(trained):
    path, model = trained
    restored = load_model(path)
    assert alike(restored.model, model) and restored.model.arguments == model.arguments
    assert restored.config.model.decoder == "largefov" and restored.class_names == NAMES


def test_by_way_of_the_hub_and_back(trained, here, capsys):
    path, model = trained
    for words in ([str(path), "folder", "--to", "hub"], ["folder", "again.pt", "--to", "afa"]):
        assert cli.main(["convert", *words]) == 0
        assert "read again: the same bit for bit" in capsys.readouterr().out
        restored = load_model(words[1])
        assert alike(restored.model, model) and restored.model.arguments == model.arguments
        assert restored.config.model.arguments() == parse(SETTINGS).model.arguments()
    assert json.loads((here / "folder" / "config.json").read_text())["aux_layer"] == -3
    card = (here / "folder" / "README.md").read_text()
    assert "AFA, test_vit, 3 classes" in card and "NVIDIA" not in card


def test_a_folder_that_knows_no_run_says_how_its_model_is_made(trained, here):
    trained[1].save_pretrained("folder")
    restored = load_model("folder")
    assert restored.config.model.arguments() == parse(SETTINGS).model.arguments()
    assert isinstance(restored.config.model.stride, tuple) and alike(restored.model, trained[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out.pth"], "to: test_vit, 3 classes, a checkpoint of afa train has no MiT, and the public AFA code has no"),
        (["out.pth", "--to", "mit"], "to: test_vit, 3 classes, a checkpoint of afa train has no MiT"),
        (["out.pt", "--to", "afa", "--stride", "[4,2,2,2]"], "stride: test_vit has its patches for a grid"),
    ],
)
def test_what_is_for_a_mit_alone_is_refused(trained, here, capsys, words, message):
    assert cli.main(["convert", str(trained[0]), *words]) == 2
    assert message in capsys.readouterr().err and not list(here.iterdir())


def test_its_own_checkpoint_gives_the_weights_of_a_backbone(trained, here):
    path, model = trained
    torch.save(torch.load(path, weights_only=True)["model"], "weights.pth")
    again = build_model(parse([*SETTINGS, "--model.pretrained", "weights.pth"]), 3)
    want = model.encoder.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in again.encoder.state_dict().items())
