"""The dense energy loss in a training step: what it is taken of, when, and with which weight."""

from __future__ import annotations

import pytest
import torch
from support.common import relative_error
from support.tiny_step import ALL, batch, tiny
from torch.nn import functional as F

from afa_kernels import bilateral_filter
from afa_model.config import parse
from afa_model.conventions import denormalize
from afa_model.errors import ConfigError
from afa_model.training import step as module
from afa_model.training.losses import LossSettings, energy_loss
from afa_model.training.step import TrainingStep

WITH = LossSettings(regularisation=0.01)


def energy(logits, images01, target, boxes, method, sigma_xy=100.0, sigma_rgb=15.0):
    """From the formula, in float64, pixel pair by pixel pair; the lattice as `bilateral_filter` has it."""
    probs = F.interpolate(logits.double(), target.shape[1:], mode="bilinear", align_corners=False).softmax(1)
    probs = F.interpolate(probs, scale_factor=0.5, mode="bilinear", align_corners=False)
    images, target = 255 * images01[..., ::2, ::2].double(), target[:, ::2, ::2]
    rows, columns = torch.meshgrid(*(torch.arange(0, 2 * n, 2) for n in target.shape[1:]), indexing="ij")
    inside = torch.stack(
        [(rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1) for y0, y1, x0, x1 in boxes.tolist()]
    )[:, None].double()
    gate = (inside - probs.amax(1, keepdim=True)).clamp_min(0).masked_fill(target[:, None] == 255, 1)
    near = bilateral_filter(images, probs * inside, sigma_rgb, sigma_xy / 2, method, backend="reference")
    return -1e-7 * (probs * inside * gate * near).sum() / len(probs)


@pytest.mark.parametrize("method", ["lattice", "exact"])
@pytest.mark.parametrize("iteration", [1, 2])
def test_energy_of_the_phases_target_joins_the_loss(iteration, method):
    settings = LossSettings(regularisation=3.0, method=method)
    result = TrainingStep(tiny(), *ALL, loss=settings)(batch(), iteration)
    images01, boxes = denormalize(batch()["image"]), batch()["img_box"]
    targets = {1: result.refined_label, 2: result.aff_label}
    want = energy(result.seg_logits, images01, targets[iteration], boxes, method)
    assert result.reg_loss < 0 and relative_error(result.reg_loss, want) < 1e-4
    total = result.cls_loss + 0.1 * result.seg_loss + 0.1 * result.aff_loss + 3.0 * result.reg_loss
    torch.testing.assert_close(result.loss.detach(), total)
    if iteration == 2:  # the two targets are told apart
        assert relative_error(energy(result.seg_logits, images01, targets[1], boxes, method), want) > 1e-3


def test_its_gradient_reaches_the_network_with_its_weight():
    gradients = []
    for settings in (None, LossSettings(2e4), LossSettings(4e4)):
        model = tiny()
        TrainingStep(model, *ALL, loss=settings)(batch(), 2).loss.backward()
        gradients.append([p.grad for p in model.decoder.parameters()])
    once, twice = ([b - a for a, b in zip(gradients[0], other)] for other in gradients[1:])
    norm = torch.nn.utils.get_total_norm
    assert norm(once) > 1e-3 * norm(gradients[0])
    assert norm([b - 2 * a for a, b in zip(once, twice)]) < 1e-3 * norm(twice)


def test_none_in_the_classifiers_phase_and_none_where_it_is_off(monkeypatch):
    result = TrainingStep(tiny(), *ALL, loss=WITH)(batch(), 0)
    assert result.reg_loss is None and torch.equal(result.loss.detach(), result.cls_loss)
    looked = TrainingStep(tiny(), *ALL, loss=WITH)(batch(), 0, everything=True)
    assert looked.reg_loss < 0 and torch.equal(looked.loss.detach(), looked.cls_loss)
    monkeypatch.setattr(module, "energy_loss", lambda *_: pytest.fail("is off"))
    for weight in (0.0, 0.99e-12):
        result = TrainingStep(tiny(), *ALL, loss=LossSettings(weight))(batch(), 2)
        assert result.reg_loss is None
    assert LossSettings(1e-12).regularises


def test_crops_without_a_box_count_everywhere():
    logits, images01 = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    labels = torch.randint(0, 3, (2, 32, 32))
    everywhere = torch.tensor([[0, 32, 0, 32]] * 2)
    assert torch.equal(*(energy_loss(logits, images01, labels, box, WITH) for box in (None, everywhere)))


def test_published_weight_and_sigmas():
    """The paper's VOC run has it; COCO's never had."""
    published, coco = (parse(["--config", name]).loss for name in ("voc", "coco"))
    assert published == LossSettings(0.01, sigma_rgb=15, sigma_xy=100, scale_factor=0.5, method="lattice")
    assert not coco.regularises and not LossSettings().regularises


@pytest.mark.parametrize(
    ("name", "value"),
    [("regularisation", -1), ("sigma_rgb", 0), ("sigma_xy", float("inf")), ("scale_factor", 1.5), ("method", "x")],
)
def test_settings_without_sense_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        LossSettings(**{name: value})
    with pytest.raises(ConfigError, match=f"loss.{name}: expected"):
        parse([f"--loss.{name}={value}"])
