"""`afa export`: what is written gives PyTorch's labels at its size and at others, or nothing is written."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import support.needs_command_line  # noqa: F401
import torch
from PIL import Image

from afa_model import cli
from afa_model.data.transforms import normalize
from afa_model.errors import ConfigError, SavingError
from afa_model.evaluation import export
from afa_model.evaluation.export import ExportSettings, export_model
from afa_model.evaluation.predict import PredictSettings, predict
from afa_model.networks.afa import AFA
from afa_model.networks.segmenter import Segmenter

SMALL = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
NAMES = ("background", "cat", "dog")


@pytest.fixture(scope="module")
def model() -> AFA:
    torch.manual_seed(2)
    model = AFA("mit_b0", 3, embedding=16, backbone_args=SMALL)
    with torch.no_grad():  # classes that differ from place to place
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.class_names = NAMES
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return folder


def test_the_segmenter_labels_as_one_pass_of_predict_does(model, tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.png")
    settings = PredictSettings(long_side=0, scales=(1.0,), flips=False, panels=False, labels="cat")
    predict(model, [tmp_path / "photo.png"], tmp_path / "out", NAMES, settings)
    want = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "photo.png"))).long()
    assert len(want.unique()) > 1
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    inputs = {"pixels": pixels.float(), "bytes": pixels, "normalised": normalize(pixels)}
    with torch.no_grad():
        for takes, images in inputs.items():
            labels, logits = Segmenter(model, takes)(images), Segmenter(model, takes, "logits")(images)
            assert torch.equal(labels[0], want) and logits.shape == (1, 3, 50, 70)
            assert torch.equal(logits.argmax(1), labels)


def test_torchscript_of_any_size_by_the_command(folder, model, tmp_path, capsys):
    line = ["export", "--checkpoint", str(folder), "--out", str(tmp_path / "m.ts"), "--size", "64", "96", "--dynamic"]
    assert cli.main(line) == 0
    told = capsys.readouterr().out
    assert "2 x 3 x 64 x 96 beside PyTorch: the same labels" in told and "1 x 3 x 65 x 109" in told
    extra = {"afa": ""}
    script = torch.jit.load(str(tmp_path / "m.ts"), _extra_files=extra)
    assert json.loads(extra["afa"])["class_names"] == list(NAMES)
    assert "mkldnn" not in str(script.inlined_graph), "runs on this processor only"
    images = 255 * torch.rand(2, 3, 101, 77)
    with torch.no_grad():
        assert torch.equal(script(images), Segmenter(model)(images))


def test_logits_of_torch_export(model, tmp_path):
    path, compared = export_model(model, tmp_path / "m.pt2", NAMES, ExportSettings(size=(64, 64), gives="logits"))
    assert [item.shape for item in compared] == [(1, 3, 64, 64)] and compared[0].difference < 1e-5
    images = 255 * torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        got, want = torch.export.load(str(path)).module()(images), Segmenter(model, gives="logits")(images)
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [(4, 2, 2, 1), (4, 2, 2, 2)])
def test_onnx_of_any_size(stride, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = AFA("mit_b0", 3, stride, embedding=16, backbone_args=SMALL)
    settings = ExportSettings(size=(64, 96), dynamic=True, takes="bytes", gives="logits")
    path, compared = export_model(model, tmp_path / "m.onnx", NAMES, settings)
    assert len(compared) == 3 and all(item.difference < 1e-4 for item in compared)
    session = onnxruntime.InferenceSession(str(path))
    assert json.loads(session.get_modelmeta().custom_metadata_map["afa"])["class_names"] == list(NAMES)
    images = torch.randint(0, 255, (1, 3, 97, 131), dtype=torch.uint8)
    want = Segmenter(model, "bytes", "logits")(images)
    (got,) = session.run(["logits"], {"images": images.numpy()})
    assert np.abs(got - want.detach().numpy()).max() < 1e-4 * float(want.abs().max())


@pytest.mark.parametrize(("gives", "difference"), [("logits", 2e-3), ("labels", 0.5)])
def test_what_differs_from_pytorch_is_not_written(model, tmp_path, monkeypatch, gives, difference):
    """A reader that gives other numbers: of the logits a little more than is let pass."""

    def read(path):
        script = torch.jit.load(str(path))
        if gives == "logits":
            return lambda images: (want := script(images)) + 2e-3 * want.abs().max()
        return lambda images: (script(images) + (torch.rand(images[:, 0].shape) < 0.5)) % 3

    monkeypatch.setitem(export._READERS, "torchscript", read)
    (tmp_path / "m.ts").write_text("the one before")
    with pytest.raises(SavingError, match=r"m\.ts was not written: on images \[1, 3, 64, 64\].* differs from PyTorch"):
        export_model(model, tmp_path / "m.ts", NAMES, ExportSettings(size=(64, 64), gives=gives))
    assert (tmp_path / "m.ts").read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


def test_ties_may_fall_otherwise():
    model = AFA("mit_b0", 3, embedding=16, backbone_args=SMALL).eval()
    with torch.no_grad():
        model.decoder.linear_pred.weight.zero_()
        model.decoder.linear_pred.bias.copy_(torch.tensor([1.0, 1.0, 0.0]))
    plain, images = Segmenter(model, gives="logits"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        tie = export._compared(plain, lambda images: plain(images).argmax(1) * 0 + 1, images, "labels")
        wrong = export._compared(plain, lambda images: plain(images).argmax(1) * 0 + 2, images, "labels")
    assert (tie.wrong, wrong.wrong, wrong.difference) == (False, True, 1.0)


def test_mistakes(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"format: expected onnx, torchscript or exported: the ending of m\.bin"):
        export_model(model, tmp_path / "m.bin", NAMES)
    with pytest.raises(ConfigError, match=r"out: PyTorch reads exported programs from files that end in \.pt2"):
        export_model(model, tmp_path / "m.bin", NAMES, ExportSettings("exported"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"format: onnx needs onnx\w*, which cannot.*: pip install onnx onnx"):
        export_model(model, tmp_path / "m.onnx", NAMES)
    with pytest.raises(ValueError, match="resnet18 has no decoder"):
        export_model(AFA("resnet18", 3), tmp_path / "m.ts", NAMES)
    with pytest.raises(ValueError, match=r"size: expected height and width of at least 64, got \(32, 64\)"):
        ExportSettings(size=(32, 64))
    assert list(tmp_path.iterdir()) == []
