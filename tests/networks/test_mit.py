"""MiT: grids, attention, weight layouts, timm's interfaces."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from support.common import relative_error
from torch import nn

from afa_model.networks.mit import Attention, MixTransformer
from afa_model.networks.weights import checkpoint_filter_fn, load_mit_weights

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 3), "num_heads": (1, 2, 3, 4)}


def shaken(model: nn.Module) -> nn.Module:
    """Every tensor different from its neighbours, so that a swapped name shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def to_hugging_face(state: dict[str, torch.Tensor], version: int = 4) -> dict[str, torch.Tensor]:
    """Public names -> transformers' names: 4 is what all versions write, 5 what newer ones hold in memory."""
    renames = [
        (r"^(patch_embed\d)\.norm", r"\1.layer_norm", r"\1.layer_norm"),
        (r"^patch_embed(\d)", r"patch_embeddings.\1", r"stages.\1.patch_embeddings"),
        (r"^norm(\d)", r"layer_norm.\1", r"stages.\1.layer_norm"),
        (r"\.norm1\.", ".layer_norm_1.", ".layernorm_before."),
        (r"\.norm2\.", ".layer_norm_2.", ".layernorm_after."),
        (r"attn\.q\.", "attention.self.query.", "attention.q_proj."),
        (r"attn\.proj\.", "attention.output.dense.", "attention.o_proj."),
        (r"attn\.sr\.", "attention.self.sr.", "attention.sequence_reduction.sequence_reduction."),
        (r"attn\.norm\.", "attention.self.layer_norm.", "attention.sequence_reduction.layer_norm."),
        (r"^block(\d)", r"block.\1", r"stages.\1.blocks"),
    ]
    if version == 4:
        renames.append((r"mlp\.fc", "mlp.dense", ""))
    out = {}
    for name, value in state.items():
        if name.startswith("head."):
            out[name.replace("head.", "classifier.")] = value
            continue
        name = re.sub(r"^(patch_embed|block|norm)(\d)", lambda m: f"{m[1]}{int(m[2]) - 1}", name)
        for pattern, four, five in renames:
            name = re.sub(pattern, four if version == 4 else five, name)
        name = ("segformer.encoder." if version == 4 else "segformer.") + name
        if "attn.kv." in name:
            key, val = value.chunk(2)
            old = ("attention.self.key.", "attention.self.value.")
            key_name, value_name = old if version == 4 else ("attention.k_proj.", "attention.v_proj.")
            out[name.replace("attn.kv.", key_name)] = key
            out[name.replace("attn.kv.", value_name)] = val
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(
    ("variant", "millions"),
    [(f"mit_b{i}", millions) for i, millions in enumerate((3.4, 13.1, 24.2, 44.0, 60.8, 81.4))],
)
def test_sizes_are_the_papers(variant, millions):
    with torch.device("meta"):
        model = timm.create_model(variant, num_classes=0)
    # SegFormer, Table 1a (which rounds in places by up to 0.1 million).
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.16)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (31, 130), (17, 9), (1, 1)])
@pytest.mark.parametrize(
    ("stride", "factors"), [((4, 2, 2, 1), (4, 8, 16, 16)), ((4, 2, 2, 2), (4, 8, 16, 32))]
)
def test_grids_at_any_size(size, stride, factors):
    model = MixTransformer(num_classes=0, stride=stride, **TINY).eval()
    with torch.no_grad():
        maps, query, key, aux = model.forward_pyramid(torch.randn(2, 3, *size))
    for got, dim, factor in zip(maps, TINY["embed_dims"], factors):
        assert got.shape == (2, dim, -(-size[0] // factor), -(-size[1] // factor))
        assert got.isfinite().all()
    assert aux is None
    # Three blocks in the last stage, of which the last two give queries and keys of four heads each.
    assert query.shape == key.shape == (2, 8, maps[3].shape[2] * maps[3].shape[3], 8)


def test_attention_is_softmax_of_scaled_scores():
    torch.manual_seed(0)
    attention = Attention(12, heads=3, sr_ratio=1, drop=0.0, qkv_bias=True)
    x = torch.randn(2, 20, 12)
    got, query, key = attention(x, 4, 5)
    value = attention.kv(x)[..., 12:].unflatten(2, (3, 4)).transpose(1, 2)
    weights = (query @ key.transpose(2, 3) / 4**0.5).softmax(-1)
    assert relative_error(got, attention.proj((weights @ value).transpose(1, 2).flatten(2))) < 1e-6
    assert relative_error(query, attention.q(x).unflatten(2, (3, 4)).transpose(1, 2)) < 1e-6


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="stride"):
        MixTransformer(stride=(4, 2, 2))
    with pytest.raises(ValueError, match="embed_dims"):
        MixTransformer(embed_dims=(32, 63, 160, 256))
    with pytest.raises(ValueError, match="global_pool"):
        MixTransformer(global_pool="max", **TINY)
    with pytest.raises(ValueError, match="images"):
        MixTransformer(**TINY)(torch.randn(1, 4, 64, 64))


@pytest.mark.parametrize("layout", ["public", "hf", "hf_bare", "hf5", "afa", "wrapped"])
def test_every_layout_gives_the_same_forward(layout, tmp_path):
    source = shaken(MixTransformer(num_classes=7, **TINY))
    public = source.state_dict()
    bare = {name: value for name, value in public.items() if not name.startswith("head.")}
    states = {
        "public": public,
        "hf": to_hugging_face(public) | {"decode_head.classifier.weight": torch.zeros(2)},
        "hf_bare": {name.removeprefix("segformer."): v for name, v in to_hugging_face(bare).items()},
        "hf5": to_hugging_face(public, version=5),
        "afa": {f"encoder.{name}": v for name, v in bare.items()} | {"decoder.x": torch.zeros(2)},
        "wrapped": {"state_dict": {f"module.backbone.{name}": v for name, v in bare.items()}},
    }
    assert layout == "public" or not set(states[layout]) & set(public)
    path = tmp_path / "weights.pth"
    torch.save(states[layout], path)
    model = MixTransformer(num_classes=0, **TINY).eval()
    load_mit_weights(model, path)
    images = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), source.forward_features(images))


def test_imagenet_head_is_kept_where_it_fits():
    source = shaken(MixTransformer(num_classes=7, **TINY))
    state = to_hugging_face(source.state_dict())
    same = MixTransformer(num_classes=7, **TINY).eval()
    same.load_state_dict(checkpoint_filter_fn(state, same))
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(same(images), source(images))
    other = MixTransformer(num_classes=5, **TINY)
    assert "head.weight" not in checkpoint_filter_fn(state, other)


def test_weights_of_another_variant_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(MixTransformer(num_classes=0, **TINY).state_dict(), path)
    with pytest.raises(ValueError, match="pretrained"):
        load_mit_weights(MixTransformer(num_classes=0, **TINY | {"depths": (1, 1, 2, 3)}), path)
    with pytest.raises(FileNotFoundError, match="pretrained"):
        load_mit_weights(MixTransformer(num_classes=0, **TINY), tmp_path / "absent.pth")


def test_timm_interfaces():
    assert {f"mit_b{i}" for i in range(6)} <= set(timm.list_models("mit_*"))
    images = torch.randn(1, 3, 64, 64)
    wanted = {"features_only": True, "out_indices": (1, 3), "stride": (4, 2, 2, 1)}
    features = timm.create_model("mit_b0", **wanted, **TINY)
    assert features.feature_info.channels() == [16, 32]
    assert features.feature_info.reduction() == [8, 16]
    assert [tuple(x.shape) for x in features(images)] == [(1, 16, 8, 8), (1, 32, 4, 4)]
    classifier = timm.create_model("mit_b0", num_classes=5, **TINY)
    assert classifier(images).shape == (1, 5)
    classifier.reset_classifier(3)
    assert classifier(images).shape == (1, 3)
    assert classifier.pretrained_cfg["num_classes"] == 1000


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = MixTransformer(num_classes=3, drop_path_rate=0.0, **TINY).train()
    images = torch.randn(1, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.allclose(plain, recomputed, rtol=1e-5, atol=1e-7)
