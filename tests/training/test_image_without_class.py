"""An image of no class teaches the classifier that there is none, and its pixels are background; the others' stay."""

from __future__ import annotations

import torch
from support.tiny_step import ALL, batch, tiny
from torch.nn import functional as F

from afa_model.training.step import TrainingStep


def test_an_image_without_a_class():
    example = batch()
    both = {**example, "cls_labels": torch.stack([torch.zeros(4), example["cls_labels"][1]])}
    model = tiny()
    result = TrainingStep(model, *ALL)(both, 2)
    result.loss.backward()
    logits = tiny()(both["image"]).cls_logits
    torch.testing.assert_close(result.cls_loss, F.multilabel_soft_margin_loss(logits, both["cls_labels"]))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    own = TrainingStep(tiny(), *ALL)(example, 2)
    y0, y1, x0, x1 = example["img_box"][0].tolist()
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[y0:y1, x0:x1] = False
    for name in ("refined_label", "aff_label"):
        label = getattr(result, name)
        assert set(label[0][~outside].unique().tolist()) == {0}
        assert set(label[0][outside].unique().tolist()) == {255}
        assert torch.equal(label[1], getattr(own, name)[1])


def test_a_batch_without_any_class():
    example = {**batch(), "cls_labels": torch.zeros(2, 4)}
    result = TrainingStep(tiny(), *ALL)(example, 2)
    result.loss.backward()
    assert result.loss.isfinite() and set(result.refined_label.unique().tolist()) <= {0, 255}
    # All pairs of pixels are alike, nothing is to be told apart (the counts have one added).
    assert int(result.neg_count) == 1 and int(result.pos_count) > 1 and result.seg_loss > 0
