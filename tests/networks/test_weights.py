"""Weight files: layouts that are read, things that are none, and that no code in them runs."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from support.broken_files import SOMETHING_ELSE, write_payload, write_something_else

from afa_model.networks.afa import AFA
from afa_model.networks.mit import MixTransformer
from afa_model.networks.weights import load_mit_weights
from afa_model.runtime.tensor_files import nothing_runs

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


def mit(**changes) -> MixTransformer:
    return MixTransformer(num_classes=0, **TINY | changes)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return mit().state_dict()


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone.", "backbone.", "module.encoder.", "_orig_mod."])
@pytest.mark.parametrize("place", [(), ("state_dict",), ("model_state_dict",), ("net",), ("model", "state_dict")])
def test_layouts_of_a_weight_file(tmp_path, weights, prefix, place):
    """Behind any wrapper's name, beside a decoder, within other things."""
    content = prefixed(prefix, weights) | {"decode_head.weight": torch.ones(2)} if prefix else dict(weights)
    for key in reversed(place):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    model = mit()
    load_mit_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_cnn_behind_a_prefix(tmp_path):
    torch.manual_seed(1)
    state = AFA("resnet18", 5).encoder.state_dict()
    torch.save({"state_dict": prefixed("module.backbone.", state)}, tmp_path / "w.pth")
    loaded = AFA("resnet18", 5, pretrained=tmp_path / "w.pth").encoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_of_two_networks_none_is_taken(tmp_path, weights):
    torch.save(prefixed("teacher.", weights) | prefixed("student.", weights), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth .*several networks.*teacher\., student\."):
        load_mit_weights(mit(), tmp_path / "w.pth")


@pytest.mark.parametrize("kind", SOMETHING_ELSE)
def test_what_holds_no_weights_is_named_with_the_reason(tmp_path, kind):
    path = tmp_path / "mit_b1.pth"
    write_something_else(path, kind)
    with pytest.raises(ValueError, match=r"(?s)^pretrained: .*mit_b1\.pth.*" + SOMETHING_ELSE[kind]) as caught:
        load_mit_weights(mit(), path)
    assert "weights_only" not in str(caught.value)  # torch's advice is to run what is in the file
    with pytest.raises(ValueError, match=r"(?s)^pretrained: .*mit_b1\.pth.*" + SOMETHING_ELSE[kind]):
        AFA("resnet18", 5, pretrained=path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_ones_own_is_told_without_the_advice_to_run_it(tmp_path, protocol):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": [1, print]}, protocol=protocol))
    with pytest.raises(ValueError, match=r"w\.pth .*(more than data|which torch\.save does not)") as caught:
        AFA("resnet18", 5, pretrained=tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("backbone", ["mit_b0", "resnet18"])
def test_code_in_a_weight_file_does_not_run(tmp_path, suffix, backbone):
    path = write_payload(tmp_path / f"w{suffix}", tmp_path / "mark", state_dict={})
    with pytest.raises(ValueError, match=r"pretrained: .*w\."):
        AFA(backbone, 5, pretrained=path)
    assert not (tmp_path / "mark").exists()


def test_a_library_that_asks_for_more_gets_data_only(tmp_path):
    """timm 1.0.9 reads what it downloads with ``weights_only=False``."""
    path = write_payload(tmp_path / "w.pth", tmp_path / "mark")
    with nothing_runs(), pytest.raises(Exception, match="mkdir"):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "mark").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").is_dir(), "a payload that would run"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("backbone", ["mit_b0", "resnet18", "test_vit"])
def test_weights_of_a_run_that_diverged_are_refused(tmp_path, backbone, value):
    arguments = {"backbone_args": TINY} if backbone == "mit_b0" else {}
    encoder = AFA(backbone, 3, **arguments).encoder
    state = getattr(encoder, "model", encoder).state_dict()
    name = next(name for name, tensor in reversed(state.items()) if tensor.ndim > 1)
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"pretrained: .*w\.pth holds NaN or infinite weights: {re.escape(name)}$"):
        AFA(backbone, 3, pretrained=tmp_path / "w.pth", **arguments)


@pytest.mark.parametrize("name", ["features_only", "num_classes", "checkpoint_path"])
@pytest.mark.parametrize("backbone", ["mit_b0", "resnet18", "test_vit"])
def test_arguments_that_are_not_the_users_are_named(backbone, name):
    with pytest.raises(ValueError, match=rf"backbone_args: {name}: decided by what a backbone is here"):
        AFA(backbone, 3, backbone_args={name: 1})
