"""AFA as the Hugging Face Hub keeps it: saved, loaded in another process, pushed, and what is none told."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from afa_model.errors import CheckpointError
from afa_model.networks.afa import AFA

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


@pytest.fixture(scope="module")
def model() -> AFA:
    torch.manual_seed(5)
    model = AFA("mit_b0", 3, (4, 2, 2, 2), "gap", embedding=16, decoder_dropout=0.2, backbone_args=SMALL)
    model.class_names = ("background", "cat", "dog")
    model.about = {"iteration": 7, "scores": {"protocol": "test", "images": 4, "miou": {"segmentation": 51.5}}}
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(folder)
    return folder


def test_another_process_gets_the_same_outputs_bit_for_bit(model, folder, tmp_path):
    torch.manual_seed(1)
    images = torch.randn(1, 3, 50, 70)
    torch.save(images, tmp_path / "images.pt")
    program = f"""
import torch
from afa_model import AFA
model = AFA.from_pretrained({str(folder)!r})
assert not model.training
with torch.no_grad():
    result = model(torch.load({str(tmp_path / "images.pt")!r}))
torch.save([result.seg_logits, result.cls_logits, result.query], {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with torch.no_grad():
        want = model(images)
    for got, expected in zip(torch.load(tmp_path / "out.pt"), (want.seg_logits, want.cls_logits, want.query)):
        assert torch.equal(got, expected)


def test_what_the_folder_says_is_kept_and_saved_again(model, folder, tmp_path):
    again = AFA.from_pretrained(folder)
    assert again.class_names == model.class_names and again.about == model.about
    assert again.stride == (4, 2, 2, 2) and again.pooling == "gap" and again.decoder.dropout.p == 0.2
    again.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_config_says_how_to_build_it_without_weights_of_ones_own_machine(tmp_path):
    torch.save({"state_dict": AFA("mit_b0", 4).encoder.state_dict()}, tmp_path / "mit_b0.pth")
    AFA("mit_b0", 4, pretrained=str(tmp_path / "mit_b0.pth")).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["backbone"] == "mit_b0" and config["num_classes"] == 4 and config["stride"] == [4, 2, 2, 1]
    assert "pretrained" not in config and config["class_names"] is None


def test_the_card(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: afa\npipeline_tag: image-segmentation\n")
    assert "0 background, 1 cat, 2 dog" in card and "| segmentation | 51.50 |" in card
    assert "On 4 images of `val`, protocol *test*" in card


def test_push_to_hub_uploads_the_same_files(model, folder, monkeypatch):
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            pushed[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    model.push_to_hub("someone/afa")
    assert pushed == {"someone/afa": {path.name: path.read_bytes() for path in folder.iterdir()}}


def test_what_is_none_says_what_is_missing(folder, tmp_path):
    for path, message in (
        (tmp_path, "holds no config.json and no model.safetensors, as save_pretrained writes"),
        (tmp_path / "nowhere", "nowhere not found: expected a folder that save_pretrained wrote, or ORG/NAME"),
        (folder / "config.json", "config.json is a file, not a folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            AFA.from_pretrained(path)
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"`afa convert RUN FOLDER --to hub`"):
        AFA.from_pretrained(tmp_path)


def test_a_folder_of_another_model_is_refused(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_classes": 4}, r"model.safetensors does not hold the weights of the model in config.json.*size mismatch"),
        ({"backbone": "mit_b9"}, r"config.json does not describe an AFA: backbone: expected mit_b0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            AFA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "segformer"}))
    with pytest.raises(CheckpointError, match="lacks backbone and num_classes"):
        AFA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        AFA.from_pretrained(tmp_path)


def test_the_hub_is_asked_for_names_of_its_kind_and_its_answer_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"some/model: there is no folder of this name, and the Hub did not give"):
        AFA.from_pretrained("some/model")


def test_class_names_of_another_number_are_refused(tmp_path):
    model = AFA("mit_b0", 3, backbone_args=SMALL)
    model.class_names = ("background", "cat")
    with pytest.raises(ValueError, match="class_names: expected 3 names, got 2"):
        model.save_pretrained(tmp_path)


def test_weights_are_plain_safetensors(model, folder):
    got = load_file(folder / "model.safetensors")
    assert all(torch.equal(got[name], value) for name, value in model.state_dict().items())


def test_the_packages_themselves_do_not_load_it():
    program = "import sys, afa_model, afa_kernels; print([m for m in ('huggingface_hub', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
