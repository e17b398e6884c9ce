"""`afa convert`: every layout there and back bit for bit, what is wrong with a file listed, what it writes taken."""

from __future__ import annotations

import json

import pytest
import support.needs_command_line  # noqa: F401
import torch
from safetensors.torch import load_file

from afa_model import cli
from afa_model.config import Config, parse, to_dict
from afa_model.errors import CheckpointError
from afa_model.networks.afa import AFA
from afa_model.networks.layouts import renamed
from afa_model.networks.weights import load_mit_weights
from afa_model.runs import checkpoint
from afa_model.runs.restore import build_model, load_model
from afa_model.runs.sources import grouped, read_source


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return AFA("mit_b0", 21).state_dict()


@pytest.fixture
def here(tmp_path, monkeypatch, state):
    """A folder to work in, with the file public.pth as the public code writes it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "iter": 18000}, "public.pth")
    return tmp_path


def convert(*words: str) -> int:
    return cli.main(["convert", *words])


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)


def test_recorded_weights_go_through_every_kind_of_file_unchanged(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    want = {name: torch.from_numpy(value) for name, value in golden("model_state").items()}
    torch.save(want, "a.pth")
    chain = [
        ("a.pth", "b.safetensors", "--prefix", "module."),
        ("b.safetensors", "c.pt", "--to", "afa"),
        ("c.pt", "d", "--to", "hub"),
        ("d", "e.bin", "--to", "public"),
        ("e.bin", "f.safetensors"),
    ]
    for words in chain:
        assert convert(*words) == 0
        assert f"wrote {len(want)} tensors to {words[1]}, read again: the same bit for bit" in capsys.readouterr().out
    assert set(load_file("b.safetensors")) == {f"module.{name}" for name in want}
    got = load_file("f.safetensors")
    assert set(got) == set(want) and all(got[name].dtype == want[name].dtype for name in want)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_backbone_goes_through_every_layout_unchanged(here, state, capsys):
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    torch.save(encoder | {"head.weight": torch.randn(7, 256), "head.bias": torch.randn(7)}, "mit_b0.pth")
    for words in (
        ("mit_b0.pth", "hf.safetensors", "--to", "huggingface"),
        ("hf.safetensors", "mm.pth", "--to", "mmseg", "--prefix", "backbone."),
        ("mm.pth", "hf2.pth", "--to", "huggingface", "--prefix", "module."),
        ("hf2.pth", "back.pth", "--to", "mit"),
        ("public.pth", "own.pth", "--to", "mit"),
    ):
        assert convert(*words) == 0
        told = capsys.readouterr().out
        assert "read again: the same bit for bit" in told
        assert ("mmseg has no place for it: head.bias, head.weight" in told) == (words[0] == "hf.safetensors")
    assert "left out, for mit has no place for it: decoder.* (16), attn_proj.* (2), classifier.weight" in told
    assert same(torch.load("back.pth"), encoder) and same(torch.load("own.pth"), encoder)
    hugging_face = load_file("hf.safetensors")
    assert torch.equal(hugging_face["segformer.encoder.block.0.0.attention.self.value.weight"],
                       encoder["block1.0.attn.kv.weight"][32:])  # fmt: skip
    assert hugging_face["classifier.weight"].shape == (7, 256)
    mmseg = torch.load("mm.pth")
    packed = torch.cat([encoder["block4.1.attn.q.weight"], encoder["block4.1.attn.kv.weight"]])
    assert torch.equal(mmseg["backbone.layers.3.1.1.attn.attn.in_proj_weight"], packed)
    assert mmseg["backbone.layers.0.1.0.ffn.layers.4.weight"].shape == (32, 128, 1, 1)
    for name in ("hf.safetensors", "mm.pth", "own.pth", "public.pth"):  # what afa train --model.pretrained does
        model = build_model(parse(["--model.backbone", "mit_b0", "--model.pretrained", name]), 5)
        assert same(model.encoder.state_dict(), encoder)


def test_names_of_mmsegmentation():
    public = ["patch_embed1.proj.weight", "patch_embed2.norm.bias", "block1.0.attn.proj.weight",
              "block1.0.attn.sr.bias", "block1.0.attn.norm.bias", "block3.1.norm2.bias",
              "block3.1.mlp.fc1.bias", "block3.1.mlp.dwconv.dwconv.bias", "block3.1.mlp.fc2.bias",
              "norm4.weight"]  # fmt: skip
    theirs = ["layers.0.0.projection.weight", "layers.1.0.norm.bias", "layers.0.1.0.attn.attn.out_proj.weight",
              "layers.0.1.0.attn.sr.bias", "layers.0.1.0.attn.norm.bias", "layers.2.1.1.norm2.bias",
              "layers.2.1.1.ffn.layers.0.bias", "layers.2.1.1.ffn.layers.1.bias", "layers.2.1.1.ffn.layers.4.bias",
              "layers.3.2.weight"]  # fmt: skip
    assert list(renamed(dict.fromkeys(public, torch.ones(6)), "mmseg")) == theirs


def test_what_is_wrong_is_listed_in_groups_and_stops_it(here, state, capsys):
    broken = {name: value for name, value in state.items() if ".block3." not in name}
    broken |= {"decoder.linear_pred.bias": torch.ones(3), "ema.a.weight": torch.ones(1), "ema.b.weight": torch.ones(1)}
    torch.save(broken, "broken.pth")
    assert convert("broken.pth", "out.pth") == 2
    error = capsys.readouterr().err
    assert "broken.pth is nearly mit_b0, 21 classes" in error and "--partial converts what fits" in error
    assert "missing (40): encoder.block3.0.* (20), encoder.block3.1.* (20)\n" in error
    assert "unknown (2): ema.a.weight, ema.b.weight\n" in error
    assert "decoder.linear_pred.bias is [3] in place of [21]" in error
    assert not (here / "out.pth").exists()
    assert convert("broken.pth", "out.pth", "--partial") == 0
    told = capsys.readouterr()
    assert "missing (40)" in told.err and "not converted, unknown (2)" in told.err
    assert set(torch.load("out.pth")) == set(broken) - {"decoder.linear_pred.bias", "ema.a.weight", "ema.b.weight"}
    assert convert("broken.pth", "out.pt", "--to", "afa", "--partial") == 2
    assert "--to afa needs a whole model" in capsys.readouterr().err and not (here / "out.pt").exists()


def test_names_are_grouped_as_finely_as_there_is_room():
    names = [f"decode_head.linear_c{i}.proj.{what}" for i in range(4) for what in ("weight", "bias")]
    assert grouped(names) == ", ".join(f"decode_head.linear_c{i}.proj.* (2)" for i in range(4))
    assert grouped([*names, *(f"x{i}" for i in range(9))]) == "decode_head.* (8), x0, x1, x2, x3, and 5 more"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["public.pth", "out"], "target: expected a file that ends in .pth, .pt, .bin, .safetensors with --to public"),
        (["public.pth", "out.safetensors", "--to", "afa"], "expected a file that ends in .pth, .pt with --to afa"),
        (["public.pth", "out.pth", "--to", "hub"], "target: expected a folder with --to hub, got out.pth"),
        (["public.pth", "public.pth"], "target: public.pth is the source itself"),
        (["missing.pth", "out.pth"], "checkpoint missing.pth: no such file"),
        (["other.pth", "out.pth"], "other.pth holds neither an AFA nor a MiT by names that are known"),
        (["two.pth", "out.pth"], "two.pth holds several networks of this kind"),
        (["mit.pth", "out.pt", "--to", "afa"], "to: afa is for a whole AFA, but mit.pth holds a mit_b0 by the"),
        (["cnn.pt", "out.pth", "--to", "mmseg"], "to: resnet18, 3 classes, a checkpoint of afa train has no MiT"),
        (["public.pth", "out.pth", "--prefix", "module"], "prefix: expected words with a dot behind each, got"),
        (["public.pth", "out.pth", "--pooling", "gap"], "pooling: expected none with --to public, which holds weights"),
        (["public.pth", "o.pt", "--to", "afa", "--classes", "c.txt"], "classes: c.txt names 3 classes, the weights"),
        (["public.pth", "out", "--to", "hub", "--scores", "c.txt"], "scores c.txt is no file that `afa evaluate"),
    ],
)
def test_mistakes(here, state, capsys, words, message):
    mit = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    if words[0] == "two.pth":
        torch.save({f"{who}.{name}": value for who in ("teacher", "student") for name, value in mit.items()}, "two.pth")
    elif words[0] == "mit.pth":
        torch.save(mit, "mit.pth")
    elif words[0] == "other.pth":
        torch.save({"layer1.0.conv1.weight": torch.ones(2)}, "other.pth")
    elif words[0] == "cnn.pt":
        save_own("cnn.pt", Config(), AFA("resnet18", 3), ("background", "a", "b"), backbone="resnet18")
    (here / "c.txt").write_text("background\na\nb\n")
    assert convert(*words) == 2
    assert message in capsys.readouterr().err
    assert not (here / "out.pth").exists()


def save_own(path, config: Config, model: AFA, names: tuple[str, ...], backbone: str, best: float = 12.345) -> None:
    """A checkpoint as `afa train` writes it, with an optimizer's state."""
    config.model.backbone, config.data.root, config.out = backbone, "/home/someone/secret/voc", "/home/someone/runs"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    progress = checkpoint.Progress(400, best)
    checkpoint.write_atomically(path, checkpoint.pack(model, optimizer, progress, [], to_dict(config), names))


def test_a_folder_for_the_hub_has_classes_protocol_and_scores_and_no_paths(here, capsys):
    names, config = ("background", "cat", "dog"), parse(["--labels.radius", "3", "--eval.every", "5"])
    save_own("own.pt", config, model := AFA("mit_b0", 3), names, "mit_b0")
    assert convert("own.pt", "folder", "--to", "hub") == 0
    text, card = (here / "folder" / "config.json").read_text(), (here / "folder" / "README.md").read_text()
    assert "someone" not in text + card
    assert json.loads(text)["class_names"] == list(names) and json.loads(text)["iteration"] == 400
    assert "protocol *training*" in card and "| segmentation | 12.35 |" in card and "1 cat, 2 dog" in card
    restored = load_model("folder")
    assert restored.class_names == names and restored.trained == "trained for 400 steps"
    assert restored.config.labels.radius == 3 and not restored.model.training
    assert same(restored.model.state_dict(), model.state_dict())
    scores = {"about": {"settings": {"protocol": "test"}, "split": "lists/val.txt"}, "images": 9}
    scores["scores"] = {"cam": {"miou": 0.25}, "segmentation_crf": {"miou": 0.66}}
    (here / "scores.json").write_text(json.dumps(scores))
    assert convert("folder", "scored", "--to", "hub", "--scores", "scores.json") == 0
    card = (here / "scored" / "README.md").read_text()
    assert "On 9 images of `val.txt`, protocol *test*" in card and "| segmentation crf | 66.00 |" in card


def test_classes_stride_and_pooling_of_public_weights_can_be_said(here, capsys):
    (here / "names.txt").write_text("\n".join(["background", *(f"thing {i}" for i in range(20))]))
    said = ["--classes", "names.txt", "--stride", "[4,2,2,2]", "--pooling", "gap"]
    for words in (["x.pt", "--to", "afa"], ["folder", "--to", "hub"]):
        assert convert("public.pth", *words, *said) == 0
        restored = load_model(words[0])
        assert restored.class_names[1] == "thing 0" and restored.iteration == 18000
        assert restored.model.stride == (4, 2, 2, 2) and restored.model.pooling == "gap"
        assert restored.config.model.stride == (4, 2, 2, 2) and restored.config.model.pooling == "gap"


def test_half_precision_stays_half(here, state, capsys):
    torch.save({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, "h.pth")
    for target in (["a.pt", "--to", "afa"], ["folder", "--to", "hub"], ["b.safetensors"]):
        assert convert("h.pth", *target) == 0
        assert read_source(target[0]).state["classifier.weight"].dtype == torch.float16
    assert load_model("a.pt").model.classifier.weight.dtype == torch.float32


def test_a_converted_checkpoint_is_not_gone_on_with(here, capsys):
    assert convert("public.pth", "own.pt", "--to", "afa") == 0
    model = AFA("mit_b0", 21)
    with pytest.raises(CheckpointError, match=r"`afa convert` wrote it.*not gone on with"):
        checkpoint.unpack(checkpoint.read("own.pt"), model, torch.optim.SGD(model.parameters(), 0.1))


def test_mmsegmentation_with_a_decoder_is_read_as_pretrained_weights(here, state):
    mit = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    theirs = {f"backbone.{name}": value for name, value in renamed(mit, "mmseg").items()}
    torch.save({"meta": {}, "state_dict": theirs | {"decode_head.conv_seg.weight": torch.ones(2)}}, "segformer.pth")
    model = AFA("mit_b0", 5)
    load_mit_weights(model.encoder, "segformer.pth")
    assert same(model.encoder.state_dict(), mit)
    assert read_source("segformer.pth").others == ["decode_head.conv_seg.weight"]
