"""Classification and segmentation losses: recorded numbers, and batches that lack something."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import relative_error

from afa_model.training.losses import classification_loss, segmentation_loss


def test_segmentation_loss_matches_recorded_numbers(golden):
    recorded = golden("seg_loss")
    logits = torch.from_numpy(recorded["logits"]).requires_grad_()
    loss = segmentation_loss(logits, torch.from_numpy(recorded["labels"]))
    loss.backward()
    assert relative_error(loss, torch.tensor(recorded["loss"])) < 1e-5
    assert relative_error(logits.grad, torch.from_numpy(recorded["grad_logits"])) < 1e-4


@pytest.mark.parametrize(
    ("values", "halves"), [((255,), 0), ((0, 255), 1), ((2, 3, 255), 1), ((0, 1, 4, 255), 2), ((0,), 1)]
)
def test_an_empty_half_counts_zero(rng, values, halves):
    logits = torch.randn(2, 5, 6, 7, generator=rng, requires_grad=True)
    labels = torch.tensor(values)[torch.randint(len(values), (2, 6, 7), generator=rng)]
    loss = segmentation_loss(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)

    want, seen = torch.zeros(()), 0
    for half in (labels == 0, (labels > 0) & (labels != 255)):
        if half.any():
            want = want + 0.5 * F.cross_entropy(logits.permute(0, 2, 3, 1)[half], labels[half])
            seen += 1
    assert seen == halves
    assert torch.allclose(loss, want, rtol=1e-5)
    assert gradient.isfinite().all()
    assert bool(gradient.any()) == bool(halves)
    if halves:
        (want_gradient,) = torch.autograd.grad(want, logits)
        assert torch.allclose(gradient, want_gradient, rtol=1e-4, atol=1e-8)


def test_logits_are_resized_to_the_labels(rng):
    logits = torch.randn(1, 3, 5, 6, generator=rng)
    labels = torch.randint(3, (1, 19, 23), generator=rng)
    full = F.interpolate(logits, (19, 23), mode="bilinear", align_corners=False)
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(full, labels))


def test_half_precision_logits_are_summed_in_float32(rng):
    logits = torch.randn(1, 3, 64, 64, generator=rng).bfloat16()
    labels = torch.randint(3, (1, 64, 64), generator=rng)
    loss = segmentation_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, segmentation_loss(logits.float(), labels))


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="labels"):
        segmentation_loss(torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long))


def test_classification_loss_is_the_mean_binary_cross_entropy(rng):
    logits = torch.randn(3, 4, generator=rng)
    labels = torch.randint(2, (3, 4), generator=rng)
    want = F.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.allclose(classification_loss(logits, labels), want)
    assert classification_loss(logits.bfloat16(), labels).dtype == torch.float32
