"""The training step: a recorded run replayed, its phases, and that it never waits for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.common import DEVICE, relative_error
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from afa_model.conventions import MEAN, STD
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.training.schedule import build_optimizer, learning_rate, set_learning_rate
from afa_model.training.step import StepSettings, TrainingStep

NEAR = LabelSettings(radius=2)
TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


def tiny(drop: float = 0.0) -> AFA:
    torch.manual_seed(0)
    arguments = {"embedding": 16, "decoder_dropout": drop, "backbone_args": TINY | {"drop_path_rate": drop}}
    return AFA("mit_b0", 5, **arguments).train()


def batch(size: int = 64, seed: int = 0, **changes) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(2, 3, size, size, generator=generator),
        "cls_labels": torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]]),
        "img_box": torch.tensor([[0, size, 3, size - 5], [7, size, 0, size]]),
        "name": ["a", "b"],
        **changes,
    }


def test_recorded_run_is_replayed(golden):
    """24 optimizer steps of the public implementation, with the tolerances stated beside its numbers."""
    run, state = golden("trajectory"), golden("model_state")
    model = AFA("mit_b0", 21, decoder_dropout=0.0, backbone_args={"drop_path_rate": 0.0}).train()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    settings = StepSettings(
        cam_iters=int(run["cam_iters"]),
        aff_iters=int(run["aff_iters"]),
        compute_unused=True,
    )
    step = TrainingStep(model.to(DEVICE), settings, LabelSettings(radius=int(run["radius"])))
    base, total = float(run["base_lr"]), int(run["steps"])
    optimizer = build_optimizer(model, base, float(run["weight_decay"]))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    finite = np.isfinite(run["seg_loss"])
    assert 0 < finite.sum() < total

    for i in range(total):
        result = step(
            {
                "image": ((torch.from_numpy(run["images"][i]) / 255 - mean) / std).to(DEVICE),
                "cls_labels": torch.from_numpy(run["cls_labels"][i]).to(DEVICE),
                "img_box": torch.from_numpy(run["img_box"][i]),
            },
            i,
        )
        optimizer.zero_grad()
        result.loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        set_learning_rate(
            optimizer,
            learning_rate(i, total, base, int(run["warmup_iter"]), float(run["warmup_ratio"])),
        )
        optimizer.step()

        assert result.affinity.shape[2:] == (int(run["infer_grid"]),) * 2
        for name in ("cls_loss", "aff_loss", "seg_loss"):
            got = float(getattr(result, name))
            assert np.isfinite(got), f"{name} of step {i}"
            if name != "seg_loss" or finite[i]:
                assert got == pytest.approx(float(run[name][i]), rel=3e-4), f"{name} of step {i}"
        assert float(norm) == pytest.approx(float(run["grad_norm"][i]), rel=3e-4), f"gradient of step {i}"
        assert int(result.pos_count) == run["pos_count"][i], f"pairs of step {i}"
        assert int(result.neg_count) == run["neg_count"][i], f"pairs of step {i}"
        for label, name in ((result.refined_label, "refined_hist"), (result.aff_label, "aff_hist")):
            counts = np.bincount(label.flatten().cpu().numpy(), minlength=256)
            assert np.abs(counts - run[name][i]).sum() <= 20, f"{name} of step {i}"

    got = {name: value.double().norm() for name, value in model.state_dict().items()}
    for name, want in zip(run["final_norm_names"], run["final_norms"]):
        # The recorded run sent its CAM passes through the decoder in train mode, so four batches a step; here
        # they skip it, and its batch norm's running statistics follow the training batches alone.
        if name == "decoder.linear_fuse.bn.num_batches_tracked":
            assert (got[name], want) == (total, 4 * total)
        elif "running" not in name:
            assert float(got[name]) == pytest.approx(float(want), rel=1e-3, abs=1e-6), name


def test_phases_compute_what_they_use():
    step = TrainingStep(tiny(), StepSettings(cam_iters=1, aff_iters=3), NEAR)
    for iteration in (0, 1):
        result = step(batch(), iteration)
        assert torch.equal(result.loss.detach(), result.cls_loss)
        assert result.cam is result.refined_label is result.seg_loss is result.aff_loss is None
    for iteration in (2, 3):
        result = step(batch(), iteration)
        want = result.cls_loss + 0.1 * result.seg_loss + 0.1 * result.aff_loss
        assert torch.allclose(result.loss.detach(), want)
        assert result.cam.shape == (2, 4, 64, 64) and result.refined_label.shape == (2, 64, 64)
        assert result.aff_label is result.affinity is None
    result = step(batch(), 4)
    assert result.aff_label.shape == (2, 64, 64) and result.affinity.shape == (2, 25, 6, 6)
    rest = [t for t in (*vars(result).values(), *result.labels) if isinstance(t, torch.Tensor) and t is not result.loss]
    assert len(rest) >= 10 and not any(t.requires_grad for t in rest)
    logged = step(batch(), 0, everything=True)
    assert logged.aff_label is not None and logged.seg_loss is not None
    assert torch.equal(logged.loss.detach(), logged.cls_loss)


def test_computing_more_does_not_change_the_training():
    """What a phase leaves out has no weight: parameters move alike, optimizer state included."""
    finals = []
    for everything in (False, True):
        model = tiny()
        step = TrainingStep(model, StepSettings(1, 2, compute_unused=everything), NEAR)
        optimizer = build_optimizer(model, 1e-3)
        for i in range(5):
            optimizer.zero_grad()
            step(batch(seed=i), i).loss.backward()
            assert all(p.grad is not None for p in model.parameters()), "every parameter gets a gradient"
            optimizer.step()
        assert all(s["step"] == 5 for s in optimizer.state.values())
        finals.append(dict(model.named_parameters()))
    for name, value in finals[0].items():
        assert relative_error(finals[1][name], value) < 1e-4, name


def test_all_ignored_labels_give_a_finite_loss_and_gradient():
    model = tiny()
    step = TrainingStep(model, StepSettings(0, 1), NEAR)
    for iteration in (1, 2):
        model.zero_grad()
        result = step(batch(img_box=torch.zeros(2, 4, dtype=torch.long)), iteration)
        assert (result.refined_label == 255).all()
        assert float(result.seg_loss) == float(result.aff_loss) == 0
        assert (int(result.pos_count), int(result.neg_count)) == (1, 1)
        result.loss.backward()
        assert result.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_batch_without_box_or_without_classes():
    step = TrainingStep(tiny(), StepSettings(0, 1), NEAR)
    without_box = {name: value for name, value in batch().items() if name != "img_box"}
    got, want = step(without_box, 2), step(batch(img_box=torch.tensor([[0, 64, 0, 64]] * 2)), 2)
    assert torch.equal(got.aff_label, want.aff_label) and torch.equal(got.refined_label, want.refined_label)
    assert float(got.loss.detach()) == pytest.approx(float(want.loss.detach()), rel=1e-6)
    result = step(batch(cls_labels=torch.zeros(2, 4)), 2)
    assert set(result.aff_label.unique().tolist()) == {0, 255}, "what is not open is background"
    assert int(result.neg_count) == 1 and float(result.seg_loss) > 0


def test_odd_sizes_and_bfloat16_autocast():
    model = tiny()
    step = TrainingStep(model, StepSettings(0, 1), NEAR)
    box = torch.tensor([[0, 61, 3, 75], [7, 60, 0, 75]])
    odd = batch(img_box=box, image=torch.randn(2, 3, 61, 75))
    exact = step(odd, 2)
    assert exact.aff_label.shape == (2, 61, 75) and exact.seg_logits.shape == (2, 5, 16, 19)
    with torch.autocast("cpu", torch.bfloat16):
        result = step(odd, 2)
    result.loss.backward()
    assert result.seg_logits.dtype == torch.bfloat16 and result.loss.dtype == torch.float32
    assert float(result.cls_loss) == pytest.approx(float(exact.cls_loss), rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_is_for_the_training_pass_only():
    model = tiny(drop=0.3)
    step = TrainingStep(model, StepSettings(0, 1), NEAR)
    first, second = step(batch(), 2), step(batch(), 2)
    assert torch.equal(first.refined_label, second.refined_label)
    assert not torch.equal(first.seg_logits, second.seg_logits)
    assert model.training


def test_cnn_baseline_learns_from_the_image_labels():
    model = AFA("resnet18", 5).train()
    step = TrainingStep(model, StepSettings(0, 1))
    result = step(batch(), 5)
    result.loss.backward()
    assert torch.equal(result.loss.detach(), result.cls_loss) and result.refined_label is None
    assert all(p.grad is not None for p in model.parameters())
    logged = step(batch(), 5, everything=True)
    assert logged.refined_label.shape == (2, 64, 64) and logged.aff_label is None


def test_nothing_waits_for_the_device():
    """On fake CUDA tensors, which have no values, reading one back is an error; the step needs none."""
    box = batch()["img_box"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        step = TrainingStep(tiny(), StepSettings(0, 1), NEAR)
        fake = {"image": torch.randn(2, 3, 64, 64), "cls_labels": torch.ones(2, 4), "img_box": box}
        for iteration in (0, 1, 2):
            result = step(fake, iteration)
            assert result.loss.device.type == "cuda"
        assert result.aff_label.shape == (2, 64, 64)
        with pytest.raises(DataDependentOutputException):
            result.loss.item()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(StepSettings, {"cam_iters": 5, "aff_iters": 4}), (LabelSettings, {"low_score": 0.6, "high_score": 0.5})],
)
def test_contradictory_settings_are_named(kind, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)
