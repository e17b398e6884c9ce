"""Position embeddings are made once for a size where they cannot change, and anew where they can."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from support.common import relative_error
from support.tiny_vit import SMALL, tiny_vit
from timm.layers import resample_abs_pos_embed

from afa_model.networks import vit_positions
from afa_model.networks.vit_relative import MOST_SIZES


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """What is made, in its order."""
    log: list[str] = []
    monkeypatch.setattr(
        vit_positions,
        "resample_abs_pos_embed",
        lambda *args: (log.append("own"), resample_abs_pos_embed(*args))[1],
    )
    return log


def rotary_of(model, log: list[str]) -> None:
    rope = model.encoder.model.rope
    rope.get_embed = lambda shape: (log.append("rotary"), type(rope).get_embed(rope, shape=shape))[1]


@torch.no_grad()
def test_learned_ones_are_made_once_for_a_size(made):
    model = tiny_vit().eval()
    first, second = torch.randn(1, 3, 32, 48), torch.randn(1, 3, 48, 32)
    for _ in range(2):
        model(first), model(second)
    assert made == ["own", "own"]
    want = model(first).query
    model.encoder.model.pos_embed.neg_()  # as a step of training, or other weights, would
    got = model(first).query
    assert made == ["own"] * 3 and not torch.allclose(got, want, atol=1e-2)
    assert relative_error(got, copy.deepcopy(model)(first).query) < 1e-6


def written_through_data(parameter: torch.nn.Parameter) -> None:
    parameter.data.neg_()


def learned_by_a_fused_optimiser(parameter: torch.nn.Parameter) -> None:
    parameter.grad = torch.randn_like(parameter)  # one and the same everywhere is taken out by norms
    torch.optim.AdamW([parameter], lr=1.0, fused=True).step()


@pytest.mark.parametrize("change", [written_through_data, learned_by_a_fused_optimiser])
@pytest.mark.parametrize("family", ["vit", "rotary, mixed"])
def test_a_change_that_leaves_no_trace_in_the_version_is_seen(family, change):
    model = tiny_vit(family).eval()
    positions = model.encoder.model.pos_embed if family == "vit" else model.encoder.model.rope.freqs
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before, version = model(images).query, positions._version
    change(positions)
    assert positions._version == version
    with torch.no_grad():
        got, want = model(images).query, copy.deepcopy(model)(images).query
    assert relative_error(got, want) < 1e-6 and relative_error(before, want) > 1e-2


@torch.no_grad()
def test_what_learns_is_made_in_every_pass_of_another_device(monkeypatch):
    model = tiny_vit("vit").eval().encoder.model
    source = torch.empty(1, 197, 24, device="meta")
    assert vit_positions._constant(model, [model.pos_embed], learns=True)
    monkeypatch.setattr(torch.Tensor, "is_meta", False)
    assert not vit_positions._constant(model, [source], learns=True)
    assert vit_positions._constant(model, [source], learns=False)


def test_they_learn(made):
    model = tiny_vit()
    images = torch.randn(1, 3, 32, 48)
    for mode in (True, False):
        model.train(mode)
        model.zero_grad()
        model(images).cls_logits.sum().backward()
        assert model.encoder.model.pos_embed.grad.abs().sum() > 0
    with torch.no_grad():
        model.train()(images)  # whose weights change between passes
    assert made == []
    tiny_vit(freeze_backbone=True).train()(images)
    assert made == ["own"]


def test_what_was_kept_in_inference_mode_is_good_for_a_gradient():
    model = tiny_vit("dinov3").eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        model(images)
    model(images).cls_logits.sum().backward()
    relative = tiny_vit("beit").eval()
    with torch.inference_mode():
        relative(images)
    relative(images).cls_logits.sum().backward()
    assert relative.encoder.model.blocks[0].attn.relative_position_bias_table.grad.any()


@pytest.mark.parametrize("family", ["dinov3", "eva-02"])
def test_rotary_ones_that_nothing_learns_are_made_once_in_training_too(family):
    model, log = tiny_vit(family).train(), []
    rotary_of(model, log)
    for _ in range(3):
        model(torch.randn(1, 3, 32, 48)).cls_logits.sum().backward()
    assert log == ["rotary"]


def test_rotary_ones_that_learn_are_made_in_each_pass():
    model, log = tiny_vit("rotary, mixed").train(), []
    rotary_of(model, log)
    images = torch.randn(1, 3, 32, 48)
    for _ in range(2):
        model(images).cls_logits.sum().backward()
    assert log == ["rotary"] * 2 and model.encoder.model.rope.freqs.grad.any()
    with torch.no_grad():
        model.eval()(images), model(images)
    assert log == ["rotary"] * 3


@torch.no_grad()
def test_a_cuda_graph_finds_rotary_ones_and_makes_what_learns_itself(made, monkeypatch):
    """Rotary ones are made on the host; learned ones change from one replay to the next."""
    model, log = tiny_vit("eva-02").eval(), []
    rotary_of(model, log)
    images = torch.randn(1, 3, 28, 42)
    want = model(images)
    monkeypatch.setattr(vit_positions, "captured", lambda: True)
    assert torch.equal(model(images).query, want.query)
    assert (made, log) == (["own"], ["rotary"])
    positions = model.encoder.model._pos_embed.__self__
    for columns in range(40):
        positions._keep(("rotary", (1, columns), images), [], lambda: torch.ones(1))
    assert len(positions.held) == 41, "what a graph reads was let go"


def test_noise_of_coordinates_is_new_each_time():
    model = tiny_vit("dinov3").train()
    rope, images = model.encoder.model.rope, torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(model(images).query, model(images).query)
        rope.rescale_coords, rope.aug_active = 2.0, True
        assert not torch.equal(model(images).query, model(images).query)


@torch.no_grad()
def test_not_more_sizes_are_kept_than_said():
    model = tiny_vit("eva-02").eval()
    kept = model.encoder.model._pos_embed.__self__.kept
    for columns in range(1, vit_positions.MOST_SIZES + 5):
        model(torch.randn(1, 3, 14, 14 * columns))
    assert len(kept) == 2 * vit_positions.MOST_SIZES
    relative = tiny_vit("relative, network").eval()
    for columns in range(1, MOST_SIZES + 5):
        relative(torch.randn(1, 3, 16, 16 * columns))
    assert len(relative.encoder.model.blocks[0].attn.rel_pos.get_bias.__self__.sizes.made) == MOST_SIZES


@torch.no_grad()
def test_relative_tables_are_resampled_to_the_grids_distances():
    """Near distances keep their entries, as do those of the class token."""
    model = tiny_vit("beit").eval()
    attention = model.encoder.model.blocks[1].attn
    table = attention.relative_position_bias_table
    steps = torch.arange(-2.0, 3)
    table[:25, 0] = (steps[:, None] + 10 * steps).flatten()
    table[:25, 1], table[25:] = 0.5, torch.tensor([[7.0], [8.0], [9.0]])
    seen = []

    def see(*_):
        seen.append(attention._get_rel_pos_bias()[0])

    attention.register_forward_hook(see)
    model(torch.randn(1, 3, 64, 96))
    (bias,) = seen
    assert bias.shape == (2, 25, 25) and bias[0, 0, 0] == 9
    assert (bias[:, 0, 1:] == 7).all() and (bias[:, 1:, 0] == 8).all()
    assert torch.allclose(bias[1, 1:, 1:], torch.tensor(0.5))
    inner = bias[0, 1:, 1:].unflatten(0, (4, 6)).unflatten(2, (4, 6))
    assert float(inner[2, 3, 1, 3] - inner[1, 3, 1, 3]) == pytest.approx(1)
    assert float(inner[1, 4, 1, 3] - inner[1, 3, 1, 3]) == pytest.approx(10)
    assert float(inner[3, 3, 0, 3] - inner[1, 3, 1, 3]) == pytest.approx(2)  # the last entry, for what is farther too
    assert model.encoder.relative and not tiny_vit().encoder.relative


@pytest.mark.parametrize("made_for", [(48, 48), (32, 80)])
@pytest.mark.parametrize("size", [(80, 112), (48, 64), (16, 32), (64, 80)])  # some leave a side of the table as it is
@torch.no_grad()
def test_relative_tables_are_what_timm_resamples(made_for, size):
    model = tiny_vit("beit", backbone_args={"img_size": made_for}).eval()
    plain = timm.create_model("beit_base_patch16_224", num_classes=0, **SMALL, img_size=made_for)
    plain.load_state_dict(model.encoder.model.state_dict())
    plain.eval().set_input_size(img_size=size)
    images = torch.randn(1, 3, *size)
    want = plain.fc_norm(plain.forward_features(images * model.encoder.scale + model.encoder.shift))[:, 1:]
    assert relative_error(model(images).last_map.flatten(2).mT, want) < 1e-5
    seen = []
    table = model.encoder.model.blocks[1].attn
    table.register_forward_hook(lambda *_: seen.append(table._get_rel_pos_bias()))
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    own = plain.blocks[1].attn._get_rel_pos_bias()
    assert seen[0].dtype == own.dtype and relative_error(seen[0], own) < 1e-5


@pytest.mark.parametrize("family", ["beit", "relative, network"])
@torch.no_grad()
def test_relative_positions_in_another_precision(family):
    model = tiny_vit(family).eval()
    images = torch.randn(1, 3, 32, 80)
    single = model(images).last_map
    assert relative_error(model.double()(images.double()).last_map.float(), single) < 1e-5
    assert relative_error(model.bfloat16()(images.bfloat16()).last_map.float(), single) < 0.05

