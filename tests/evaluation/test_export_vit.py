"""`afa export` of Vision Transformers: of any size where the model can, and with a reason where it cannot."""

from __future__ import annotations

import pytest
import support.needs_command_line  # noqa: F401
import torch
from support.tiny_vit import tiny_vit

from afa_model.errors import ConfigError, SavingError
from afa_model.evaluation.export import ExportSettings, export_model
from afa_model.networks.segmenter import Segmenter

NAMES = ("background", "cat", "dog")
ANY = ExportSettings(size=(64, 96), dynamic=True, takes="normalised", gives="logits")


def segmenting(family: str, **arguments):
    """With scores that differ from place to place."""
    model = tiny_vit(family, classes=3, **arguments).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_the_segmenter_gives_what_the_model_does():
    model = segmenting("dinov2, registers")
    for size in ((42, 56), (43, 50)):
        images = torch.randn(2, 3, *size)
        got = Segmenter(model, "normalised", "logits")(images)
        want = torch.nn.functional.interpolate(model(images).seg_logits, size, mode="bilinear")
        assert got.shape == (2, 3, *size) and torch.equal(got, want)


@pytest.mark.parametrize("family", ["vit", "dinov2, registers"])
@torch.no_grad()
def test_torchscript_of_any_size(family, tmp_path):
    model = segmenting(family)
    path, compared = export_model(model, tmp_path / "m.ts", NAMES, ANY)
    assert [item.shape[2:] for item in compared] == [(64, 96), (65, 109), (64, 65)]
    images = torch.randn(1, 3, 70, 112)  # whole patches of 14
    want = Segmenter(model, "normalised", "logits")(images)
    assert torch.allclose(torch.jit.load(str(path))(images), want, atol=1e-4 * float(want.abs().max()))
    model(images)  # is as it was


@pytest.mark.slow
@pytest.mark.parametrize(("family", "decoder"), [("vit", "segformer"), ("eva-02", "largefov"), ("clip", "segformer")])
@torch.no_grad()
def test_torch_export_of_any_size(family, decoder, tmp_path):
    """Whether or not the example was whole patches."""
    model = segmenting(family, decoder=decoder)
    path, compared = export_model(model, tmp_path / "m.pt2", NAMES, ANY)
    assert len(compared) == 3 and all(item.difference < 1e-4 for item in compared)
    program = torch.export.load(str(path)).module()
    for size in ((64, 96), (70, 112), (65, 97), (80, 97)):
        images = torch.randn(1, 3, *size)
        want = Segmenter(model, "normalised", "logits")(images)
        assert torch.allclose(program(images), want, atol=1e-4 * float(want.abs().max())), size
    assert model(torch.randn(1, 3, 40, 40)).query.shape[1] == 4  # is as it was


@pytest.mark.slow
def test_onnx_of_any_size(tmp_path):
    pytest.importorskip("onnxruntime")
    model = segmenting("vit")
    _, compared = export_model(model, tmp_path / "m.onnx", NAMES, ANY)
    assert len(compared) == 3 and all(item.difference < 1e-4 for item in compared)


def test_relative_positions_are_for_one_size(tmp_path):
    model = segmenting("relative, network")
    with pytest.raises(ConfigError, match="dynamic: the relative positions of vit_relpos_small_patch16_224 are made"):
        export_model(model, tmp_path / "m.ts", NAMES, ANY)
    settings = ExportSettings(size=(70, 90), takes="normalised", gives="logits")
    _, (compared,) = export_model(model, tmp_path / "m.ts", NAMES, settings)
    assert compared.difference < 1e-4


@pytest.mark.slow
def test_a_program_that_refuses_a_size_is_not_written(tmp_path):
    """DINOv3's coordinates are divided by the grid's sides as numbers."""
    with pytest.raises(SavingError, match=r"not written: exported it does not run on images \[1, 3, 65, 109\]"):
        export_model(segmenting("dinov3"), tmp_path / "m.pt2", NAMES, ANY)
    assert not list(tmp_path.iterdir())
    _, (compared,) = export_model(segmenting("dinov3"), tmp_path / "m.pt2", NAMES, ExportSettings(size=(64, 80)))
    assert not compared.wrong
