"""Multi-scale class activation maps: recorded numbers, symmetries, and a model left as it was."""

from __future__ import annotations

import pytest
import torch
from support.common import relative_error

from afa_kernels import window_to_dense
from afa_model.labels.cams import multi_scale_cam
from afa_model.networks.afa import AFA

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


@pytest.fixture
def model() -> AFA:
    torch.manual_seed(0)
    return AFA("mit_b0", 5, embedding=16, backbone_args=TINY)


def test_matches_recorded_numbers(golden):
    state = {name: torch.from_numpy(value) for name, value in golden("model_state").items()}
    want = {name: torch.from_numpy(value) for name, value in golden("model_forward").items()}
    model = AFA("mit_b0", 21)
    model.load_state_dict(state)
    got = multi_scale_cam(model.train(), want["images"], (1.0, 0.5, 1.5), radius=11)
    assert relative_error(got.cam, want["multi_scale_cam"]) < 1e-4
    assert got.affinity.shape == (2, 23 * 23, 9, 12)
    # A radius of 11 covers the whole 9 x 12 grid, so the window holds every pair.
    assert relative_error(window_to_dense(got.affinity, 11), want["multi_scale_affinity"]) < 1e-4


def test_each_channel_spans_zero_to_one(model):
    cam = multi_scale_cam(model, torch.randn(2, 3, 65, 83), radius=None).cam
    assert cam.shape == (2, 4, 65, 83)
    assert torch.equal(cam.amin((2, 3)), torch.zeros(2, 4))
    top = cam.amax((2, 3))
    # A class without positive evidence anywhere stays 0; all others reach 1 but for the 1e-5 in the divisor.
    assert ((top == 0) | ((top > 0.9) & (top < 1))).all()


def test_published_sizes_of_the_scales_are_rounded_down(model, monkeypatch):
    seen, real = [], model.cam_and_attention
    monkeypatch.setattr(model, "cam_and_attention", lambda x, **how: seen.append(tuple(x.shape)) or real(x, **how))
    multi_scale_cam(model, torch.randn(1, 3, 65, 67), (1.0, 0.5, 1.5))
    assert seen == [(2, 3, 65, 67), (2, 3, 32, 33), (2, 3, 97, 100)]


def test_mirrored_image_gives_the_mirrored_cam(model):
    images = torch.randn(1, 3, 64, 64)
    plain = multi_scale_cam(model, images).cam
    mirrored = multi_scale_cam(model, images.flip(3)).cam
    assert relative_error(mirrored.flip(3), plain) < 1e-5


def test_model_comes_back_as_it_was(model):
    model.train()
    model.decoder.linear_fuse.bn.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = multi_scale_cam(model, torch.randn(1, 3, 64, 64), radius=2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not got.cam.requires_grad and not got.affinity.requires_grad


def test_model_comes_back_after_an_error(model):
    with pytest.raises(ValueError, match="images"):
        multi_scale_cam(model.train(), torch.randn(1, 1, 64, 64))
    assert all(module.training for module in model.modules())


def test_drop_path_does_not_reach_the_labels():
    torch.manual_seed(0)
    model = AFA("mit_b0", 5, embedding=16, backbone_args=TINY | {"drop_path_rate": 0.5}).train()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(multi_scale_cam(model, images).cam, multi_scale_cam(model, images).cam)


def test_affinity_is_the_largest_scales_wherever_it_stands(model):
    images = torch.randn(1, 3, 64, 96)
    first = multi_scale_cam(model, images, (1.5, 1.0), radius=2).affinity
    last = multi_scale_cam(model, images, (1.0, 1.5), radius=2).affinity
    assert first.shape == (1, 25, 6, 9)
    assert torch.equal(first, last)
    assert multi_scale_cam(model, images, (0.25,), radius=None).affinity is None


def test_cnn_baseline_has_cams_but_no_affinity():
    model = AFA("resnet18", 5)
    images = torch.randn(1, 3, 64, 64)
    assert multi_scale_cam(model, images, (1.0, 0.5)).cam.shape == (1, 4, 64, 64)
    with pytest.raises(ValueError, match=r"radius.*no attention"):
        multi_scale_cam(model, images, radius=4)


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_wrong_scales_are_named(model, scales):
    with pytest.raises(ValueError, match="scales"):
        multi_scale_cam(model, torch.randn(1, 3, 64, 64), scales)
