"""Vision Transformers as backbones: their own scores and tokens at any size, in every family that timm has."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from support.common import relative_error
from support.tiny_vit import FAMILIES, as_it_takes_them, cells, own_attention, own_model, tiny_vit
from timm.layers import set_fused_attn
from torch.overrides import TorchFunctionMode

from afa_kernels import affinity_from_maps
from afa_model.conventions import MEAN, STD
from afa_model.labels.cams import Known, multi_scale_cam
from afa_model.networks.afa import AFA


def images_of(model: AFA, down: int = 3, across: int = 4, off: int = 0, count: int = 2) -> torch.Tensor:
    """down x across patches less ``off`` pixels each way."""
    generator = torch.Generator().manual_seed(1)
    cell = model.encoder.cell
    return torch.randn(count, 3, down * cell - off, across * cell - off, generator=generator)


def names_with_gradient(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_affinity_and_cam_are_those_of_the_models_own_scores_and_tokens(family):
    """Raw scores from the weights and what goes into each attention, by hooks, of timm's model as it comes."""
    model = tiny_vit(family).eval()
    images = images_of(model, off=5)
    result = model(images)
    cell = model.encoder.cell
    plain = own_model(family, model, tuple(side * cell for side in cells(images.shape[2:], cell)))
    scores, tokens = own_attention(plain, as_it_takes_them(plain, images, cell), blocks=2)
    grid = cells(images.shape[2:], cell)
    assert result.grid == grid
    want = affinity_from_maps(scores, *model.affinity_head(), *grid, 2)
    got = model.affinity(result, 2)
    assert float((got - want).detach().abs().max()) < 1e-5 and float(got.detach().std()) > 0.01
    classify = model.classifier.weight.flatten(1)
    want_cam = (tokens @ classify.T).transpose(1, 2).unflatten(2, grid)
    got_cam = model.cam(images)
    assert relative_error(got_cam, want_cam) < 1e-5
    assert relative_error(result.cls_logits, tokens.amax(1) @ classify.T) < 1e-5

    weight = torch.randn(want.shape)
    ((got * weight).sum() + got_cam.square().sum()).backward()
    ((want * weight).sum() + want_cam.square().sum()).backward()
    ours, theirs = names_with_gradient(model.encoder.model), names_with_gradient(plain)
    assert set(ours) == set(theirs) and len(ours) > 20
    largest = max(float(value.norm()) for value in theirs.values())
    for name, value in theirs.items():
        if value.shape == ours[name].shape:  # not the embeddings that timm made for another size
            assert float((ours[name] - value).norm()) < 1e-3 * float(value.norm()) + 1e-6 * largest, name


BOTH_NORMS = {"use_post_transformer_norm": True, "use_fc_norm": True}


@pytest.mark.parametrize(("family", "more"), [*((family, {}) for family in FAMILIES), ("eva-02", BOTH_NORMS)])
def test_every_parameter_learns(family, more):
    model = tiny_vit(family, aux_layer=-2, backbone_args=more).train()
    result = model(images_of(model))
    losses = result.seg_logits.square().sum() + result.aux_logits.sum() + model.affinity(result, 1).sum()
    losses.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["classifier.weight"]  # whose scores were not asked


class Calls(TorchFunctionMode):
    """Counts what is called by name, and keeps the sizes of all that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(getattr(func, "__name__", ""))
        self.shapes += [tuple(each.shape) for each in [out] if isinstance(each, torch.Tensor)]
        return out


@pytest.mark.parametrize("family", ["vit", "dinov3", "eva-02", "clip"])
@torch.no_grad()
def test_fused_attention_stays_and_nothing_is_computed_twice(family):
    model = tiny_vit(family).eval()
    images = images_of(model, 5, 6, count=1)
    plain = own_model(family, model, tuple(images.shape[2:]))
    with Calls() as ours:
        model.encoder.forward_pyramid(images)
    with Calls() as theirs:
        tokens = plain.forward_features(as_it_takes_them(plain, images, model.encoder.cell))
        if isinstance(plain.norm, torch.nn.Identity):
            plain.fc_norm(tokens)
    assert ours.names.count("scaled_dot_product_attention") == 3
    for name in ("linear", "layer_norm", "conv2d"):
        assert ours.names.count(name) == theirs.names.count(name), name
    tokens = 30 + model.encoder.prefix_tokens
    assert not [shape for shape in ours.shapes if shape[-2:] in ((30, 30), (tokens, tokens))]


@torch.no_grad()
def test_where_timm_is_told_not_to_fuse_the_last_blocks_do():
    want = tiny_vit().eval()(torch.ones(1, 3, 32, 48))
    set_fused_attn(False)
    try:
        model = tiny_vit().eval()
    finally:
        set_fused_attn(True)
    with Calls() as calls:
        got = model(torch.ones(1, 3, 32, 48))
    assert calls.names.count("scaled_dot_product_attention") == 2
    assert relative_error(got.query, want.query) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (16, 90), (61, 33)])
@torch.no_grad()
def test_any_size(family, size):
    model = tiny_vit(family).eval()
    result = model(torch.randn(1, 3, *size))
    grid = cells(size, model.cell)
    assert result.grid == grid and result.last_map.shape[2:] == grid
    assert result.query.shape == result.key.shape == (1, 4, grid[0] * grid[1], result.query.shape[3])
    padded = any(side % model.cell for side in size)
    assert result.seg_logits.shape == (1, 5, *(size if padded else grid))
    assert all(each.isfinite().all() for each in result if isinstance(each, torch.Tensor))


def test_how_many_blocks_give_queries_and_keys():
    images = torch.randn(1, 3, 32, 32)
    by_number = {number: tiny_vit(affinity_blocks=number).eval() for number in (1, 2, 3, 7)}
    queries = {number: model(images).query for number, model in by_number.items()}
    assert [queries[number].shape[1] for number in (1, 2, 3, 7)] == [2, 4, 6, 6]
    assert torch.equal(queries[2][:, -2:], queries[1]) and torch.equal(queries[3][:, 2:], queries[2])
    assert by_number[7].abilities.affinity_blocks == 3
    assert AFA("mit_b0", 5, affinity_blocks=1).attn_proj.in_channels == 8
    with pytest.raises(ValueError, match="affinity_blocks: expected at least 1, got 0"):
        tiny_vit(affinity_blocks=0)


@torch.no_grad()
def test_maps_are_at_quarters_of_the_depth_and_the_last_is_normed():
    model = tiny_vit(backbone_args={"depth": 8}, aux_layer=-3).eval()
    images = images_of(model)
    seen = {}
    for index, block in enumerate(model.encoder.model.blocks):
        block.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out}))
    maps, _, _, aux = model.encoder.forward_pyramid(images)
    want = [seen[1], seen[3], seen[5], model.encoder.model.norm(seen[7])]
    for got, tokens in zip([*maps, aux], [*want, seen[5]], strict=True):
        assert torch.equal(got.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert model.abilities.widths == (24,) * 4


def test_the_auxiliary_classifier_sees_the_block_asked_for():
    model = tiny_vit(aux_layer=0, pooling="gap").eval()
    images = images_of(model)
    result, attended = model(images), model.cam_and_attention(images)
    pooled = result.aux_map.mean((2, 3))
    assert relative_error(result.aux_logits, pooled @ model.aux_classifier.weight.flatten(1).T) < 1e-6
    assert torch.equal(attended.aux_cam, F.conv2d(result.aux_map, model.aux_classifier.weight))
    result.aux_logits.sum().backward()
    reached = names_with_gradient(model.encoder.model)
    assert "blocks.0.mlp.fc2.weight" in reached and not any(name.startswith("blocks.1") for name in reached)
    same = tiny_vit(aux_layer=-3, pooling="gap").eval()
    assert torch.equal(same(images).aux_logits, result.aux_logits)
    assert model(images).cls_logits.shape == result.aux_logits.shape and tiny_vit()(images).aux_logits is None
    for layer in (3, -4):
        with pytest.raises(ValueError, match=rf"aux_layer: expected -3 .. 2 for 3 blocks, got {layer}"):
            tiny_vit(aux_layer=layer)
    for backbone in ("mit_b0", "resnet18"):
        with pytest.raises(ValueError, match=f"aux_layer: expected none with {backbone}, which is no Vision"):
            AFA(backbone, 5, aux_layer=-3)


def test_drop_path_is_that_of_mit_unless_said():
    made = AFA("test_vit", 5), AFA("test_vit", 5, backbone_args={"drop_path_rate": 0.3})
    rates = [model.encoder.model.blocks[-1].drop_path2.drop_prob for model in made]
    assert rates == pytest.approx([0.1, 0.3])


@pytest.mark.parametrize("backbone", ["vit", "mit_b0"])
def test_a_frozen_backbone_learns_nothing_and_drops_nothing(backbone):
    frozen = {"freeze_backbone": True, "embedding": 16}
    noisy = {"backbone_args": {"drop_path_rate": 0.9}}
    model = tiny_vit(**frozen | noisy) if backbone == "vit" else AFA(backbone, 5, **frozen | noisy)
    model.train()
    assert model.decoder.training and not any(module.training for module in model.encoder.modules())
    images = torch.randn(2, 3, 48, 32)
    assert not model(images.clone().requires_grad_()).last_map.requires_grad
    result = model(images)
    assert torch.equal(result.last_map, model(images).last_map)
    assert not result.last_map.requires_grad and not result.query.requires_grad
    (result.seg_logits.square().sum() + result.cls_logits.sum() + model.affinity(result, 1).sum()).backward()
    assert {name.split(".")[0] for name in names_with_gradient(model)} == {"decoder", "classifier", "attn_proj"}
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    thawed = tiny_vit(**noisy).train()
    assert not torch.equal(thawed(images).last_map, thawed(images).last_map)


def test_what_was_padded_is_cut_off():
    """As if the image had been larger, black by the model's own mean there, and the result cut."""
    model = tiny_vit("clip").eval()
    images = images_of(model, 3, 3, off=6, count=1)
    black = [(mean - ours) / by for mean, ours, by in zip(model.encoder.model.pretrained_cfg["mean"], MEAN, STD)]
    larger = torch.tensor(black).view(1, 3, 1, 1).repeat(1, 1, 48, 48)
    larger[:, :, :42, :42] = images
    with torch.no_grad():
        got, whole = model(images), model(larger)
        assert relative_error(got.query, whole.query) < 1e-5 and whole.seg_logits.shape == (1, 5, 3, 3)
        want = F.interpolate(whole.seg_logits, (48, 48), mode="bilinear")[:, :, :42, :42]
        assert relative_error(got.seg_logits, want) < 1e-5

        cams = [model.cam(x) for x in (larger, torch.cat([images.flip(3), larger[:, :, :42, 42:]], 3))]
        assert cams[0].shape[2:] == (3, 3)
        plain, mirrored = model.cam(images), model.cam(images.flip(3))
        whole = [F.interpolate(cam, (48, 48), mode="bilinear")[:, :, :42, :42] for cam in (plain, mirrored)]
        cam = torch.maximum(whole[0], whole[1].flip(3)).relu()
        cam = cam - cam.amin((2, 3), keepdim=True)
        cam = cam / (cam.amax((2, 3), keepdim=True) + 1e-5)
        assert relative_error(multi_scale_cam(model, images, (1.0,)).cam, cam) < 1e-5
        same = multi_scale_cam(model, images, (1.0,), known=Known(got.last_map)).cam
        assert relative_error(same, cam) < 1e-5


@torch.no_grad()
def test_multi_scale_cam_and_the_affinity_of_the_largest_scale():
    model = tiny_vit("dinov2, registers").eval()
    seen = multi_scale_cam(model, torch.randn(1, 3, 43, 56), (1.0, 0.5, 1.5), radius=1)
    assert seen.cam.shape == (1, 4, 43, 56) and seen.affinity.shape == (1, 9, 5, 6)
    assert float(seen.cam.amax()) == pytest.approx(1, abs=1e-3)


def test_compiles_without_graph_break():
    model = tiny_vit("dinov2, registers", aux_layer=-2).eval()
    images = images_of(model, off=3)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(images)
        for a, b in zip(got, model(images)):
            assert a == b if isinstance(a, tuple) else torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not model.encoder.taker.under_way


def test_copies_and_pickles_are_models_of_their_own():
    model = tiny_vit("eva-02").eval()
    images = images_of(model)
    want = model(images)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for other in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        assert list(other.state_dict()) == list(model.state_dict())
        assert torch.equal(other(images).query, want.query)
        with torch.no_grad():
            for parameter in other.encoder.parameters():
                parameter.zero_()
        assert not other(images).query.any() and torch.equal(model(images).query, want.query)


def test_names_of_weights_are_timms():
    model = tiny_vit("deit iii")
    own = own_model("deit iii", model, (48, 48)).state_dict()
    ours = {name for name in model.state_dict() if name.startswith("encoder")}
    assert ours == {f"encoder.model.{name}" for name in own}


@torch.no_grad()
def test_passes_of_several_threads_do_not_mix():
    model = tiny_vit().eval()
    inputs = [torch.randn(1, 3, 16 * (1 + index), 48) for index in range(4)]
    want = [model(images) for images in inputs]
    wrong = []

    def ask(index: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                if not torch.equal(model(inputs[index]).query, want[index].query):
                    wrong.append(index)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_recomputing_blocks_gives_the_same_gradients_and_keeps_nothing():
    model = tiny_vit("dinov3").train()
    images = images_of(model)
    gradients = []
    for enable in (False, True):
        model.encoder.set_grad_checkpointing(enable)
        model.zero_grad()
        result = model(images)
        (model.affinity(result, 1).sum() + result.cls_logits.sum()).backward()
        gradients.append(names_with_gradient(model))
    assert set(gradients[0]) == set(gradients[1]) and not model.encoder.taker.under_way
    for name, value in gradients[0].items():
        assert torch.allclose(gradients[1][name], value, rtol=1e-4, atol=1e-6), name
    with pytest.raises(ValueError, match="relative positions"):
        tiny_vit("beit").encoder.set_grad_checkpointing()


def test_bfloat16_autocast():
    model = tiny_vit("dinov3")
    exact = model(images_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images_of(model))
        affinity = model.affinity(result, 1)
    affinity.float().sum().backward()
    assert result.query.dtype == result.key.dtype == torch.bfloat16
    assert relative_error(result.query, exact.query) < 0.05


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_hub_folder_round_trip(family, tmp_path):
    arguments = {"decoder": "largefov", "aux_layer": -2, "affinity_blocks": 1, "freeze_backbone": True}
    model = tiny_vit(family, **arguments).eval()
    model.save_pretrained(tmp_path)
    again = AFA.from_pretrained(tmp_path)
    assert again.arguments == model.arguments and again.freeze_backbone
    images = images_of(model)
    with torch.no_grad():
        for a, b in zip(again(images), model(images)):
            assert a == b if isinstance(a, tuple) else torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("swin_tiny_patch4_window7_224", r"no row of transformer blocks .* attends within windows \(Swin"),
        ("xcit_nano_12_p8_224", "do not attend from every patch token to every other"),
        ("cait_xxs24_224", "takes no images of 47 x 31 pixels"),
        ("mixer_s32_224", "no grid of patch tokens"),
        ("samvit_base_patch16", "how many tokens come before those of the patches"),
        ("pvt_v2_b0", "no row of transformer blocks"),
    ],
)
def test_what_a_model_lacks_is_said(name, missing):
    with pytest.raises(ValueError, match=f"backbone: {name} is no Vision Transformer that AFA can use: .*{missing}"):
        AFA(name, 5)


def test_attention_that_is_no_fused_call_is_said():
    class Mean(torch.nn.Module):
        def __init__(self, dim, **_):
            super().__init__()

        def forward(self, x, **_):
            return x.mean(1, keepdim=True).expand_as(x)

    with pytest.raises(ValueError, match="its last blocks do not hand queries and keys to fused attention"):
        AFA("vit_tiny_patch16_224", 5, backbone_args={"attn_layer": Mean})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": (4, 2, 2, 2)}, r"stride: vit_tiny_patch16_224 has patches of 16 .* not 32: \[4, 2, 2, 1\], "),
        ({"backbone_args": {"patch_drop_rate": 0.5}}, "backbone_args: patch_drop_rate takes patches out of the grid"),
        ({"backbone_args": {"depht": 3}}, "backbone_args: vit_tiny_patch16_224 does not take .*depht"),
        ({"backbone": "vit_tiny_patch16_224.nothing"}, "backbone: timm does not make vit_tiny_patch16_224.nothing"),
        ({"backbone": "vit_of_no_one"}, "backbone: expected mit_b0 .. mit_b5, or a Vision Transformer or a CNN of"),
        ({"decoder": "unet"}, "decoder: expected one of segformer, largefov, got 'unet'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AFA(**{"backbone": "vit_tiny_patch16_224", "num_classes": 5} | arguments)
    assert tiny_vit(stride=(2, 2, 2, 2)).cell == 16  # the same grid


def test_images_of_another_kind_are_refused():
    model = tiny_vit()
    for shape in ((3, 32, 32), (1, 4, 32, 32), (0, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\]"):
            model(torch.randn(shape))
