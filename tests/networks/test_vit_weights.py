"""Weights of Vision Transformers: every file in circulation is read whole, what is wrong with one is listed."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.tiny_vit import FAMILIES, SMALL
from timm.layers import resample_abs_pos_embed

from afa_model.networks.afa import AFA


def own(family: str, **changes) -> dict[str, torch.Tensor]:
    """Weights as timm has them, with a head, and no two alike."""
    name, small = FAMILIES[family]
    torch.manual_seed(4)
    state = timm.create_model(name, num_classes=7, **small | changes).state_dict()
    return {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}


def load(family: str, path, **changes) -> dict[str, torch.Tensor]:
    """By our names, without a head."""
    name, small = FAMILIES[family]
    return AFA(name, 5, pretrained=path, embedding=16, backbone_args=small | changes).encoder.model.state_dict()


def behind(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_own_without_its_head(family, tmp_path):
    state = own(family)
    if any(name.startswith("head") for name in state):
        assert any(len(value) == 7 for name, value in state.items() if name.startswith("head"))
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        got = load(family, tmp_path / file)
        assert same(got, state) and not any(name.startswith(("head", "attn_pool")) for name in got)


def test_containers(tmp_path):
    """DeiT's, DINO's whole checkpoint (of two networks the teacher), its teacher alone, a run of timm's, and EVA's."""
    state = own("vit")
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    head = {"head.mlp.0.weight": torch.ones(2), "head.last_layer.weight_g": torch.ones(2)}
    contents = {
        "deit": {"model": state},
        "dino": {
            "student": behind("module.backbone.", other) | behind("module.", head),
            "teacher": behind("backbone.", state) | head,
            "optimizer": {"state": {}},
            "epoch": 3,
        },
        "teacher": {"teacher": behind("backbone.", state) | behind("dino_head.", head)},
        "student": {"student": behind("module.backbone.", state)},
        "both by name": behind("student.backbone.", other) | behind("teacher.backbone.", state),
        "backbone": behind("backbone.", state),
        "average": {"state_dict": other, "state_dict_ema": state, "epoch": 2},
        "eva": {"module": state},
        "afa": behind("encoder.model.", state) | dict.fromkeys(("decoder.conv8.bias", "attn_proj.bias"), torch.ones(1)),
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / "w.pth")
        assert same(load("vit", tmp_path / "w.pth"), state), name


def clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> those of CLIP's visual part."""
    out = {}
    words = (
        ("blocks.", "transformer.resblocks."),
        ("norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("patch_embed.proj", "conv1"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
    )
    for name, value in state.items():
        if name.startswith("head."):
            continue
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = name.replace("norm.", "ln_post.")
        if name == "cls_token":
            name, value = "class_embedding", value[0, 0]
        if name == "pos_embed":
            name, value = "positional_embedding", value[0]
        out[name] = value
    return out | {"proj": torch.ones(24, 9)}


@pytest.mark.parametrize("prefix", ["visual.", "module.visual.", "clip.visual.", ""])
def test_the_visual_part_of_clip(prefix, tmp_path):
    state = own("clip")
    text = {"token_embedding.weight": torch.ones(3), "transformer.resblocks.0.ln_1.weight": torch.ones(5),
            "positional_embedding": torch.ones(4, 5), "logit_scale": torch.tensor(4.6)}  # fmt: skip
    torch.save(behind(prefix, clip_names(state)) | (text if prefix == "visual." else {}), tmp_path / "w.pth")
    assert same(load("clip", tmp_path / "w.pth"), state)
    torch.save(behind("visual.trunk.", state) | text, tmp_path / "w.pth")  # open_clip's, with a model of timm's
    assert same(load("clip", tmp_path / "w.pth"), state)


def test_dinov2s_own_names(tmp_path):
    state = own("dinov2, registers")
    other = ("reg_token", "cls_token", "pos_embed", "head.weight", "head.bias")
    theirs = {name: value for name, value in state.items() if name not in other}
    theirs |= {"mask_token": torch.ones(1, 24), "register_tokens": state["reg_token"]}
    theirs["cls_token"] = state["cls_token"] - 1
    theirs["pos_embed"] = torch.cat([torch.ones(1, 1, 24), state["pos_embed"]], 1)
    torch.save(theirs, tmp_path / "w.pth")
    got = load("dinov2, registers", tmp_path / "w.pth")
    assert torch.allclose(got.pop("cls_token"), state["cls_token"], atol=1e-6) and same(got, state)


def test_deit_iiis_own_names(tmp_path):
    state = own("deit iii")
    names = {name: name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2") for name in state}
    theirs = {names[name]: value for name, value in state.items()}
    assert theirs.keys() != state.keys()
    torch.save({"model": theirs}, tmp_path / "w.pth")
    assert same(load("deit iii", tmp_path / "w.pth"), state)


@pytest.mark.parametrize("family", ["vit", "eva-02", "siglip, no class token"])
def test_position_embeddings_of_another_grid_are_resampled(family, tmp_path):
    cell = {"eva-02": 14}.get(family, 16)
    state = own(family, img_size=5 * cell)
    torch.save(state, tmp_path / "w.pth")
    got = load(family, tmp_path / "w.pth", img_size=8 * cell)
    prefix = 0 if family.startswith("siglip") else 1
    want = resample_abs_pos_embed(state["pos_embed"], [8, 8], [5, 5], prefix)
    assert torch.equal(got.pop("pos_embed"), want) and same(got, state)


def test_half_precision_becomes_single(tmp_path):
    state = {name: value.half() for name, value in own("vit").items()}
    torch.save(state, tmp_path / "w.pth")
    got = load("vit", tmp_path / "w.pth")
    assert got["norm.weight"].dtype == torch.float32 and torch.equal(got["norm.weight"].half(), state["norm.weight"])


def test_what_is_wrong_is_listed(tmp_path):
    state = own("vit")

    def error(content: dict, family: str = "vit", **changes) -> str:
        torch.save(content, tmp_path / "w.pth")
        begins = f"pretrained: .*w.pth does not hold the weights of {FAMILIES[family][0]}"
        with pytest.raises(ValueError, match=begins) as caught:
            load(family, tmp_path / "w.pth", **changes)
        return str(caught.value)

    partial = {name: value for name, value in state.items() if not name.startswith("blocks.1.")}
    told = error(partial)
    assert "missing (12): blocks.1.norm1.weight, blocks.1.norm1.bias, " in told and told.endswith("and 4 more")
    assert "unexpected" not in told and "head" not in told
    assert "unexpected (1): blocks.0.more" in error(state | {"blocks.0.more": torch.ones(1)})
    told = error({name: value[:5] if name == "norm.bias" else value for name, value in state.items()})
    assert told.endswith("of another shape (1): norm.bias [5] in place of [24]")
    assert "missing (1): dist_token" in error(state, "deit, distilled")
    told = error(own("deit, distilled"))
    assert "unexpected (1): dist_token" in told and "pos_embed [1, 198, 24] in place of [1, 197, 24]" in told
    assert "missing (42): cls_token, pos_embed" in error({"a.weight": torch.ones(2)})
    assert "its patches are 8 x 8 pixels, not (16, 16)" in error(own("dino"))
    assert "several networks of this kind (a., b.)" in error(behind("a.", state) | behind("b.", state))
    assert "missing (12): blocks.3." in error(state, depth=4)
    assert "holds no tensors by name, but 'epoch'" in error({"epoch": 3})
    with pytest.raises(FileNotFoundError, match="pretrained: no weight file at"):
        load("vit", tmp_path / "absent.pth")


def test_timm_says_that_it_has_no_weights():
    with pytest.raises(ValueError, match="No pretrained weights exist for vit_small_patch16_36x1_224"):
        AFA("vit_small_patch16_36x1_224", 5, pretrained=True, backbone_args=SMALL)
