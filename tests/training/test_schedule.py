"""Learning rate and parameter groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from afa_model.networks.afa import AFA
from afa_model.training.schedule import build_optimizer, learning_rate, parameter_groups, set_learning_rate

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


@pytest.fixture
def model() -> AFA:
    return AFA("mit_b0", 5, embedding=16, backbone_args=TINY)


def test_learning_rate_matches_recorded_numbers(golden):
    recorded = golden("schedule_and_scores")
    rates = [
        learning_rate(
            i,
            int(recorded["max_iter"]),
            float(recorded["base_lr"]),
            int(recorded["warmup_iter"]),
            float(recorded["warmup_ratio"]),
            float(recorded["power"]),
        )
        for i in range(len(recorded["lr"]))
    ]
    np.testing.assert_allclose(rates, recorded["lr"], rtol=1e-12)


def test_learning_rate_without_warmup_and_past_the_end():
    assert learning_rate(0, 100, 1.0, warmup_iters=0) == 1.0
    assert learning_rate(50, 100, 1.0, warmup_iters=0, power=2.0) == 0.25
    assert learning_rate(100, 100, 1.0) == pytest.approx(100 / 1500, rel=1e-4)  # still warming up
    assert learning_rate(101, 100, 1.0, warmup_iters=0) == 0.0


def test_every_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    sizes = {group["name"]: len(group["params"]) for group in groups}
    norms = sum("norm" in name for name, _ in model.encoder.named_parameters())
    assert sizes["backbone_norms"] == norms > 0
    assert sizes["heads"] == 3  # classifier weight; affinity weight and bias
    assert sizes["decoder"] == len(list(model.decoder.parameters()))


def test_heads_learn_faster_and_backbone_norms_stay(model):
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.01)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"backbone": 1e-3, "backbone_norms": 0, "heads": 1e-2, "decoder": 1e-2})
    set_learning_rate(optimizer, 5e-4)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"backbone": 5e-4, "backbone_norms": 0, "heads": 5e-3, "decoder": 5e-3})

    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        is_norm = name.startswith("encoder") and "norm" in name
        assert torch.equal(value, before[name]) == is_norm, name


def test_every_group_decays_but_the_backbones_norms(model):
    """Biases and the decoder's norm decay too, as published; the settings reach the optimizer."""
    optimizer = build_optimizer(model, 1e-3, weight_decay=0.03, betas=(0.8, 0.95))
    assert type(optimizer) is torch.optim.AdamW
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"backbone": 0.03, "backbone_norms": 0.0, "heads": 0.03, "decoder": 0.03}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-8, False), group["name"]
    usual = build_optimizer(model, 1e-3).param_groups[0]
    assert (usual["betas"], usual["weight_decay"]) == ((0.9, 0.999), 0.01)


def test_cnn_and_frozen_parameters():
    model = AFA("resnet18", 5)
    model.encoder.conv1.weight.requires_grad_(False)
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    assert set(groups) == {"backbone", "backbone_norms", "heads"}
    backbone = len(groups["backbone"]) + len(groups["backbone_norms"])
    assert backbone == len(list(model.encoder.parameters())) - 1
    assert any(p is model.encoder.bn1.weight for p in groups["backbone_norms"])


def test_wrapped_model_gives_the_same_groups(model):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    inner = [[id(p) for p in group["params"]] for group in parameter_groups(model)]
    assert [[id(p) for p in group["params"]] for group in parameter_groups(Wrapper(model))] == inner
