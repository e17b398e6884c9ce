"""What a step's settings change: how its CAM passes are made, what the affinity learns from, what is looked at."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.tiny_step import ALL, batch, tiny

from afa_model.labels.crf import CrfSettings
from afa_model.training import step as module
from afa_model.training.losses import LossSettings
from afa_model.training.step import StepSettings, TrainingStep


@pytest.mark.parametrize("iteration", [1, 2])
def test_cam_mode_train_teaches_the_decoders_batch_norm_in_every_pass(iteration):
    """As a plain loop over the passes does: the training pass, then each scale with its mirror image."""
    how = StepSettings(0, 1, cam_mode="train"), ALL[1]
    model, plain, example = tiny(), tiny(), batch()
    TrainingStep(model, *how)(example, iteration)
    images = example["image"]
    with torch.no_grad():
        plain(images)
        for scale in (1.0, 0.5, 1.5):
            size = int(images.shape[2] * scale)
            x = torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
            plain(torch.cat([x, x.flip(3)]))
    got, want = model.decoder.linear_fuse.bn, plain.decoder.linear_fuse.bn
    assert got.num_batches_tracked == want.num_batches_tracked == 4
    torch.testing.assert_close(got.running_mean, want.running_mean)
    torch.testing.assert_close(got.running_var, want.running_var)
    quiet = tiny()
    TrainingStep(quiet, *ALL)(example, iteration)
    assert quiet.decoder.linear_fuse.bn.num_batches_tracked == 1


@pytest.mark.parametrize("cam_mode", ["eval", "train"])
def test_looking_at_a_step_changes_nothing(cam_mode):
    """In the classifier's phase, where nothing of what is drawn is computed for the training itself."""
    how = StepSettings(2, 3, cam_mode=cam_mode), ALL[1]
    ends = []
    for everything in (None, True):
        model = tiny(drop=0.2)
        torch.manual_seed(3)
        result = TrainingStep(model, *how)(batch(), 1, everything)
        result.loss.backward()
        ends.append((result, torch.rand(1), model.state_dict(), [p.grad for p in model.parameters()]))
    (plain, *before), (looked, *after) = ends
    assert plain.seg_loss is None and looked.seg_loss > 0 and looked.aff_loss > 0 and looked.aff_label is not None
    assert looked.seg_logits is not None and torch.equal(plain.loss, looked.loss) and torch.equal(before[0], after[0])
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert all(torch.equal(got, want) for got, want in zip(before[2], after[2]))


@pytest.mark.parametrize("target", ["refined_cam", "segmentation"])
def test_looking_at_a_step_leaves_its_targets(target):
    """The last one that learns from the refined CAM, when the random-walk label is there to be seen as well."""
    how = StepSettings(0, 1, affinity_target=target), ALL[1]
    plain, looked = (TrainingStep(tiny(), *how)(batch(), 1, everything) for everything in (None, True))
    assert plain.aff_label is None and not torch.equal(looked.aff_label, looked.refined_label)
    torch.testing.assert_close(looked.loss, plain.loss)


def test_each_loss_has_a_weight_of_its_own():
    how = StepSettings(0, 1, seg_weight=0.3, aff_weight=0.7), ALL[1]
    result = TrainingStep(tiny(), *how, loss=LossSettings(50.0))(batch(), 2)
    want = result.cls_loss + 0.3 * result.seg_loss + 0.7 * result.aff_loss + 50 * result.reg_loss
    torch.testing.assert_close(result.loss.detach(), want)


def test_cam_mode_train_has_the_noise_of_training():
    model, example = tiny(drop=0.5), batch()
    cams = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        cams.append(TrainingStep(model, StepSettings(0, 1, cam_mode="train"), ALL[1])(example, 2).labels.cam)
    assert not torch.equal(*cams)
    torch.manual_seed(1)
    quiet = [TrainingStep(model, *ALL)(example, 2).labels.cam for _ in range(2)]
    assert torch.equal(*quiet)
    with pytest.raises(ValueError, match="cuda_graph: expected cam_mode eval"):
        TrainingStep(model, StepSettings(cam_mode="train"), cuda_graph=True)


@pytest.mark.parametrize("iteration", [1, 2])
@pytest.mark.parametrize("target", ["refined_cam", "segmentation"])
def test_target_of_the_affinity(monkeypatch, iteration, target):
    """VOC's learns from the refined CAM throughout, COCO's from the segmentation's target of the phase."""
    seen = []
    real = module.affinity_loss
    monkeypatch.setattr(module, "affinity_loss", lambda *a, **k: seen.append(a[4]) or real(*a, **k))
    result = TrainingStep(tiny(), StepSettings(0, 1, affinity_target=target), ALL[1])(batch(), iteration)
    late = target == "segmentation" and iteration == 2
    want = result.aff_label if late else result.refined_label
    assert torch.equal(seen[0], want[:, ::16, ::16])
    if iteration == 2:
        assert not torch.equal(result.aff_label[:, ::16, ::16], result.refined_label[:, ::16, ::16])


@pytest.mark.parametrize("name", ["cam_mode", "affinity_target"])
def test_a_way_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: expected .* or .*, got 'other'"):
        StepSettings(**{name: "other"})


def test_labels_may_be_refined_by_a_dense_crf():
    """Both of them, whichever way, and as sure of themselves as the kernels' weights make them."""
    example, images = batch(), []
    for shared in (False, True):
        for weight in (0.0, 0.5):
            crf = CrfSettings(2, weight, 2.0, weight, 8.0, 60.0)
            labels = dataclasses.replace(ALL[1], refinement="crf", dense_crf=crf)
            step = TrainingStep(tiny(), dataclasses.replace(ALL[0], shared_refinement=shared), labels)
            result = step(example, 3)
            images.append((result.refined_label, result.aff_label))
    for plain, refined in (images[:2], images[2:]):
        assert not torch.equal(plain[0], refined[0])
    assert torch.equal(images[1][0], images[3][0])
    with pytest.raises(ValueError, match="cuda_graph: expected refinement par, pamr or none, got crf"):
        TrainingStep(tiny(), ALL[0], labels, cuda_graph=True)
