"""ToCo's patch contrast: its number, its gradient, and what a step makes of the auxiliary classifier."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.common import relative_error
from support.tiny_step import ALL, batch, small_vit, tiny

from afa_model.conventions import IGNORE
from afa_model.labels.cams import multi_scale_cam
from afa_model.labels.pseudo_labels import cam_to_label, grid_label
from afa_model.labels.slots import ClassSlots
from afa_model.training.losses import patch_contrast_loss
from afa_model.training.step import StepSettings, TrainingStep

STEP, LABELS = ALL
CONTRASTS = dataclasses.replace(LABELS, high_score=0.4, low_score=0.3)  # scores between which a tiny model's CAM is


def by_pairs(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """The loss, pair by pair."""
    pull, push, same, different = 0.0, 0.0, 1, 1
    for image, own in zip(tokens.flatten(2), labels.flatten(1).tolist()):
        for i, mine in enumerate(own):
            for j, other in enumerate(own):
                if i == j or IGNORE in (mine, other):
                    continue
                a, b = image[:, i], image[:, j]
                cosine = (a @ b / (a.norm() * b.norm())).abs()
                if mine == other:
                    pull, same = pull + cosine, same + 1
                else:
                    push, different = push + cosine, different + 1
    return 0.5 * (1 - pull / same) + 0.5 * push / different, same, different


@pytest.mark.parametrize("values", [(0, 3, IGNORE), (0, 1, 2), (4,), (7, IGNORE)])
def test_number_and_gradient_are_those_of_the_pairs(rng, values):
    tokens = torch.randn(2, 6, 3, 4, generator=rng, requires_grad=True)
    labels = torch.tensor(values)[torch.randint(len(values), (2, 3, 4), generator=rng)]
    loss, pos_count, neg_count = patch_contrast_loss(tokens, labels, IGNORE)
    want, same, different = by_pairs(tokens, labels)
    assert (int(pos_count), int(neg_count)) == (same, different)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(value, tokens)[0] for value in (loss, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_without_a_pair_it_is_a_half_and_teaches_nothing(rng):
    tokens = torch.randn(1, 4, 2, 3, generator=rng, requires_grad=True)
    loss, _, _ = patch_contrast_loss(tokens, torch.full((1, 2, 3), IGNORE), IGNORE)
    assert loss == 0.5 and not torch.autograd.grad(loss, tokens)[0].any()


def test_tokens_of_zeros_and_half_precision_are_fine(rng):
    labels = torch.randint(3, (1, 4, 5), generator=rng)
    tokens = torch.randn(1, 8, 4, 5, generator=rng)
    tokens[:, :, 1, 2] = 0
    leaf = tokens.clone().requires_grad_()
    loss, _, _ = patch_contrast_loss(leaf, labels)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        again, _, _ = patch_contrast_loss(tokens, labels)
    assert torch.equal(loss, again), "autocast does not round its cosines"
    half, _, _ = patch_contrast_loss(tokens.bfloat16(), labels)
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(loss), rel=1e-2)


def test_labels_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"labels: expected \[B, h, w\] for tokens \[2, 8, 4, 5\], got \[2, 5, 4\]"):
        patch_contrast_loss(torch.zeros(2, 8, 4, 5), torch.zeros(2, 5, 4, dtype=torch.long))


def test_labels_of_patches_follow_scores_and_box(rng):
    slots = ClassSlots.of(torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0]]))
    cam = torch.rand(2, 2, 48, 80, generator=rng)
    small = torch.nn.functional.interpolate(cam, (3, 5), mode="bilinear")
    want = cam_to_label(small, slots, (0.4, 0.6))
    assert set(want.unique().tolist()) >= {0, IGNORE} and torch.equal(grid_label(cam, slots, (0.4, 0.6), (3, 5)), want)
    box = torch.tensor([[0, 48, 0, 80], [16, 48, 0, 32]])
    inside = grid_label(cam, slots, (0.4, 0.6), (3, 5), box)
    assert torch.equal(inside[0], want[0]) and torch.equal(inside[1, 1:, :2], want[1, 1:, :2])
    assert (inside[1, 0] == IGNORE).all() and (inside[1, :, 2:] == IGNORE).all()


# --- in a step ---


def parts(result) -> list[float]:
    values = (result.cls_loss, result.aux_loss, result.contrast_loss, result.seg_loss, result.aff_loss)
    return [0.0 if value is None else float(value) for value in values]


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_both_losses_join_in_every_phase_with_their_weights(iteration):
    how = dataclasses.replace(STEP, aux_weight=0.7, contrast_weight=0.3, seg_weight=0.2, aff_weight=0.4)
    result = TrainingStep(small_vit(aux_layer=-2), how, CONTRASTS)(batch(), iteration)
    cls, aux, contrast, seg, aff = parts(result)
    learned = 0.2 * seg + 0.4 * aff
    assert (learned > 0) == (iteration > 0) and aux > 0 and 0 < contrast < 1
    assert float(result.loss) == pytest.approx(cls + 0.7 * aux + 0.3 * contrast + learned, rel=1e-5)


def test_the_contrast_is_of_the_last_tokens_by_the_auxiliary_cam():
    model, example = small_vit(aux_layer=-2), batch()
    result = TrainingStep(model, STEP, CONTRASTS)(example, 0)
    slots = ClassSlots.of(example["cls_labels"])
    cams = multi_scale_cam(model, example["image"], CONTRASTS.cam_scales, slots=slots, aux=True)
    assert not torch.equal(cams.aux_cam, cams.cam)
    assert relative_error(result.labels.aux_cam, cams.aux_cam) < 1e-4
    patches = grid_label(cams.aux_cam, slots, (0.3, 0.4), (4, 4), example["img_box"])
    assert len({*patches.unique().tolist()} - {IGNORE}) > 1, "pairs of both kinds"
    want, _, _ = patch_contrast_loss(model(example["image"]).last_map, patches, IGNORE)
    assert float(result.contrast_loss) == pytest.approx(float(want), rel=1e-4)
    of_the_cam = grid_label(cams.cam, slots, (0.3, 0.4), (4, 4), example["img_box"])
    other, _, _ = patch_contrast_loss(model(example["image"]).last_map, of_the_cam, IGNORE)
    assert float(result.contrast_loss) != pytest.approx(float(other), rel=1e-4), "a case in which it matters which"


def test_the_auxiliary_cam_of_an_image_is_that_of_its_classifier():
    """The model whose two classifiers see the same tokens has one CAM twice."""
    model = small_vit(aux_layer=-1)
    with torch.no_grad():
        model.aux_classifier.weight.copy_(model.classifier.weight)
    model.encoder.model.norm = torch.nn.Identity()  # only the last map is normed
    cams = multi_scale_cam(model, batch()["image"], (1.0, 0.5), aux=True)
    assert torch.equal(cams.cam, cams.aux_cam)
    assert multi_scale_cam(model, batch()["image"], (1.0, 0.5)).aux_cam is None


def test_when_the_contrast_begins():
    step = TrainingStep(small_vit(aux_layer=-2), dataclasses.replace(STEP, contrast_from=1), CONTRASTS)
    before, looked, after = step(batch(), 0), step(batch(), 0, True), step(batch(), 1)
    assert before.contrast_loss is None and before.labels is None and before.aux_loss > 0
    assert looked.contrast_loss > 0 and torch.equal(looked.loss, before.loss), "only to be seen"
    assert after.contrast_loss > 0
    never = TrainingStep(small_vit(aux_layer=-2), dataclasses.replace(STEP, contrast_weight=0.0), CONTRASTS)
    assert never(batch(), 2, True).contrast_loss is None and never(batch(), 2).aux_loss > 0


def test_looking_teaches_no_contrast():
    gradients = []
    for everything in (None, True):
        model = small_vit(aux_layer=-2)
        step = TrainingStep(model, dataclasses.replace(STEP, contrast_from=1), CONTRASTS)
        step(batch(), 0, everything).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, looked) for plain, looked in zip(*gradients))


def test_a_model_without_an_auxiliary_classifier_has_neither_loss():
    for model in (tiny(), small_vit()):
        result = TrainingStep(model, STEP, LABELS)(batch(), 2)
        assert result.aux_loss is None and result.contrast_loss is None and result.labels.aux_cam is None


def test_contrast_parts_tokens_of_different_labels():
    """What it is for: with it tokens that differ in label differ more, without it less."""
    example, spread = batch(), {}
    for weight in (0.0, 5.0):
        model = small_vit(aux_layer=-2)
        step = TrainingStep(model, dataclasses.replace(STEP, contrast_weight=weight), CONTRASTS)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(25):
            optimizer.zero_grad()
            step(example, 0).loss.backward()
            optimizer.step()
        model.eval()
        slots = ClassSlots.of(example["cls_labels"])
        cam = multi_scale_cam(model, example["image"], CONTRASTS.cam_scales, slots=slots, aux=True).aux_cam
        patches = grid_label(cam, slots, CONTRASTS.scores, (4, 4), example["img_box"])
        loss, _, neg_count = patch_contrast_loss(model(example["image"]).last_map, patches, IGNORE)
        assert neg_count > 10
        spread[weight] = float(loss)
    assert spread[5.0] < 0.6 * spread[0.0]


@pytest.mark.parametrize("name", ["aux_weight", "contrast_weight", "contrast_from"])
def test_settings_without_sense_are_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
        StepSettings(**{name: -1})
