"""AFA: recorded numbers, shapes, what each part computes, the CNN baseline."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import DEVICE, relative_error

from afa_kernels import attention_affinity_loss, window_to_dense
from afa_model.networks.afa import AFA
from afa_model.networks.decoder import SegFormerHead
from afa_model.training.losses import classification_loss, segmentation_loss

TINY = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


def tiny(**arguments) -> AFA:
    backbone_args = TINY | arguments.pop("backbone_args", {})
    return AFA("mit_b0", 5, embedding=16, backbone_args=backbone_args, **arguments)


@pytest.fixture(scope="module")
def recorded(golden):
    """The recorded weights in a model, and what they gave."""
    state = {name: torch.from_numpy(value) for name, value in golden("model_state").items()}
    model = AFA("mit_b0", 21)
    model.load_state_dict(state, strict=True)
    numbers = {name: torch.from_numpy(value).to(DEVICE) for name, value in golden("model_forward").items()}
    return model.to(DEVICE).eval(), numbers


def test_parameter_names_are_the_public_ones(recorded, golden):
    assert list(recorded[0].state_dict()) and set(recorded[0].state_dict()) == set(golden("model_state"))


@torch.no_grad()
def test_forward_matches_recorded_numbers(recorded):
    model, want = recorded
    result = model(want["images"])
    assert relative_error(result.cls_logits, want["cls_logits"]) < 1e-4
    assert relative_error(result.seg_logits, want["seg_logits"]) < 1e-4
    assert relative_error(model.cam(want["images"]), want["cam"]) < 1e-4
    scores = result.query @ result.key.transpose(2, 3)
    assert relative_error(scores[:, :8], want["attn_last_0"]) < 1e-4
    assert relative_error(scores[:, 8:], want["attn_last_1"]) < 1e-4
    assert result.grid == (6, 8)
    dense = window_to_dense(model.affinity(result, radius=8), radius=8)
    assert relative_error(dense, want["affinity"]) < 1e-4  # a radius of 8 covers the whole 6 x 8 grid


def test_published_initialisation():
    """Deviations over seeds; recorded weights cannot show them, as they are loaded over whatever was there."""
    heads, fuses = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        model = AFA("mit_b0", 21)
        heads.append(model.attn_proj.weight.flatten())
        fuses.append(model.decoder.linear_fuse.conv.weight.flatten())
    # Kaiming, fan out: 1 for the affinity's head with a gain of sqrt(2 / 6), 256 for the fusion with sqrt(2)
    assert torch.cat(heads).std().item() == pytest.approx(0.577, rel=0.06)
    assert torch.cat(fuses).std().item() == pytest.approx(0.0884, rel=0.005)
    assert 0 < model.attn_proj.bias.abs().item() <= 0.25 and model.decoder.linear_fuse.conv.bias is None


def test_published_initialisation_of_all_else():
    """In the heads torch's own: uniform up to 1 / sqrt(fan in). In the backbone normal, of 0.02 in linear layers and by
    the fan out in convolutions, with biases of 0.
    """
    torch.manual_seed(0)
    model, head = AFA("mit_b0", 21), AFA("mit_b0", 21).decoder
    for layer in (model.classifier, head.linear_pred, head.linear_c4.proj, head.linear_c1.proj):
        bound = layer.weight.shape[1] ** -0.5
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    seen = set()
    for module in model.encoder.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            want = 0.02
            if isinstance(module, torch.nn.Conv2d):
                want = (2 / (module.kernel_size[0] ** 2 * module.out_channels / module.groups)) ** 0.5
            assert module.weight.std().item() == pytest.approx(want, rel=0.1)
            assert not module.bias.any()
            seen.add(type(module))
    assert len(seen) >= 2


def test_published_norms():
    model = AFA("mit_b0", 21)
    for name, module in model.encoder.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            usual = name.startswith("patch_embed") or "attn" in name
            assert module.eps == (1e-5 if usual else 1e-6), name
    norm = model.decoder.linear_fuse.bn
    assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-5, 0.1, True, True)


def test_published_noise():
    """Drop path from 0 to 0.1, linear over the blocks; a tenth of the decoder's channels dropped."""
    model = AFA("mit_b0", 21)
    blocks = [block for stage in range(1, 5) for block in getattr(model.encoder, f"block{stage}")]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * i / 7 for i in range(8)])
    assert model.decoder.dropout.p == 0.1 and isinstance(model.decoder.dropout, torch.nn.Dropout2d)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (130, 31), (24, 40)])
@pytest.mark.parametrize("stride", [(4, 2, 2, 1), (4, 2, 2, 2)])
@torch.no_grad()
def test_shapes_at_odd_sizes(size, stride):
    model = tiny(stride=stride).eval()
    result = model(torch.randn(2, 3, *size))
    factor = stride[3] * 16
    grid = tuple(-(-side // factor) for side in size)
    assert result.cls_logits.shape == (2, 4)
    assert result.seg_logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert result.grid == grid
    assert result.query.shape == result.key.shape == (2, 8, grid[0] * grid[1], 8)
    assert model.cam(torch.randn(2, 3, *size)).shape == (2, 4, *grid)
    affinity = model.affinity(result, radius=2)
    assert affinity.shape == (2, 25, *grid)
    assert affinity.min() >= 0 and affinity.max() <= 1


@torch.no_grad()
def test_cam_and_decode_false_skip_the_decoder():
    model = tiny().eval()
    images = torch.randn(1, 3, 64, 64)
    whole = model(images)

    def fail(*_):
        raise AssertionError("the decoder ran")

    model.decoder.register_forward_pre_hook(fail)
    model.cam(images)
    part = model(images, decode=False)
    assert part.seg_logits is None
    assert torch.equal(part.cls_logits, whole.cls_logits) and torch.equal(part.query, whole.query)


@pytest.mark.parametrize("pooling", ["gmp", "gap"])
@torch.no_grad()
def test_classification_is_pooled_features_times_classifier(pooling):
    model = tiny(pooling=pooling).eval()
    images = torch.randn(2, 3, 64, 80)
    features = model.encoder.forward_features(images)
    pooled = F.adaptive_max_pool2d(features, 1) if pooling == "gmp" else F.adaptive_avg_pool2d(features, 1)
    assert relative_error(model(images).cls_logits, model.classifier(pooled).flatten(1)) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_decoder_equals_the_published_arrangement(training):
    """Project, upsample, concatenate, fuse: the formula as the paper states it, forward and gradient."""
    torch.manual_seed(0)
    head = SegFormerHead((8, 16, 24, 32), num_classes=5, embedding=12, dropout=0.0).train(training)
    sizes = ((17, 22), (9, 11), (5, 6), (5, 6))
    maps = [torch.randn(2, d, *s, requires_grad=True) for d, s in zip((8, 16, 24, 32), sizes)]

    def published():
        parts = []
        for x, layer in zip(maps, (head.linear_c1, head.linear_c2, head.linear_c3, head.linear_c4)):
            y = layer.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
            parts.append(F.interpolate(y, sizes[0], mode="bilinear", align_corners=False))
        fused = head.linear_fuse.bn(head.linear_fuse.conv(torch.cat(parts[::-1], 1)))
        return head.linear_pred(F.relu(fused))

    weight = torch.randn(2, 5, *sizes[0])
    inputs = [*maps, *head.parameters()]
    want, got = published(), head(maps)
    assert relative_error(got, want) < 1e-5
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-4)


def test_each_loss_reaches_its_own_parameters():
    torch.manual_seed(0)
    model = tiny(decoder_dropout=0.0).train()
    result = model(torch.randn(2, 3, 64, 64))
    labels = torch.randint(0, 3, (2, 64, 64))
    losses = {
        "classifier": classification_loss(result.cls_logits, torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])),
        "decoder": segmentation_loss(result.seg_logits, labels),
        "attn_proj": attention_affinity_loss(
            result.query, result.key, *model.affinity_head(), labels[:, ::16, ::16], 2
        )[0],
    }
    for own, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            top = name.split(".")[0]
            reached = parameter.grad is not None and bool((parameter.grad != 0).any())
            if top == own and "bias" not in name:
                assert reached, f"{name} gets no gradient from its loss"
            if top not in (own, "encoder"):
                assert not reached, f"{name} gets a gradient from the loss of {own}"
        last = model.encoder.block4[-1].attn
        assert last.q.weight.grad.abs().sum() > 0
    # The affinity needs queries and keys of the last block only: what comes after them is not its business.
    assert last.proj.weight.grad is None or not last.proj.weight.grad.any()


def test_bfloat16_autocast_runs_forward_and_backward():
    torch.manual_seed(0)
    model = tiny(decoder_dropout=0.0, backbone_args={"drop_path_rate": 0.0}).train()
    images = torch.randn(2, 3, 64, 64)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images)
        affinity = model.affinity(result, 2)
        loss = segmentation_loss(result.seg_logits, torch.randint(0, 5, (2, 64, 64)))
    (loss + affinity.float().sum()).backward()
    assert result.seg_logits.dtype == torch.bfloat16
    assert relative_error(result.seg_logits, exact.seg_logits) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_compiles_without_graph_break():
    model = tiny().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(images)
        # not bit for bit: eager linear layers take oneDNN's matrix product
        torch.testing.assert_close(got.seg_logits, model(images).seg_logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [(4, 2, 2, 1), (4, 2, 2, 2)])
def test_resnet50_gives_cams_only(stride):
    model = AFA("resnet50", 5, stride=stride).eval()
    images = torch.randn(1, 3, 65, 96)
    with torch.no_grad():
        result = model(images)
        cam = model.cam(images)
    factor = 16 * stride[3]
    assert not model.has_affinity
    assert result.cls_logits.shape == (1, 4)
    assert (result.seg_logits, result.query, result.key) == (None, None, None)
    assert result.grid == cam.shape[2:] == (-(-65 // factor), 96 // factor)
    with pytest.raises(ValueError, match="resnet50 has no attention"):
        model.affinity(result, 4)


def test_pretrained_file_reaches_the_backbone(tmp_path):
    source = tiny()
    path = tmp_path / "mit.pth"
    torch.save(source.encoder.state_dict() | {"head.weight": torch.zeros(1000, 32)}, path)
    model = tiny(pretrained=path)
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    with pytest.raises(ValueError, match="pretrained"):
        AFA("mit_b0", 5, pretrained=path)
    with pytest.raises(ValueError, match="pretrained"):
        AFA("resnet18", 5, pretrained=str(path))
    with pytest.raises(FileNotFoundError, match="pretrained"):
        AFA("resnet18", 5, pretrained=tmp_path / "absent.pth")


def test_pretrained_file_of_a_cnn(tmp_path):
    source = AFA("resnet18", 5)
    path = tmp_path / "resnet.pth"
    torch.save(source.encoder.state_dict() | {"fc.weight": torch.zeros(1000, 512)}, path)
    model = AFA("resnet18", 5, pretrained=path)
    assert torch.equal(model.encoder.conv1.weight, source.encoder.conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"backbone": "mit_b9"}, "backbone"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "backbone: .* attends within windows"),
        ({"num_classes": 1}, "num_classes"),
        ({"pooling": "max"}, "pooling"),
        ({"stride": (4, 2, 2)}, "stride"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        AFA(**{"backbone": "mit_b0", "num_classes": 5} | arguments)
