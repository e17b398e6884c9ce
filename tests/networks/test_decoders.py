"""The decoders by name, of every kind of backbone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import relative_error
from support.tiny_vit import tiny_vit

from afa_model.networks.afa import AFA
from afa_model.networks.decoder import DECODERS, LargeFOVHead, SegFormerHead

MIT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 2), "num_heads": (1, 2, 3, 4)}


def made_of(backbone: str, **arguments) -> AFA:
    if backbone == "vit":
        return tiny_vit(**arguments)
    return AFA("mit_b0", 5, **{"embedding": 16} | arguments, backbone_args=MIT)


def test_largefov_is_two_dilated_convolutions_and_one_of_1x1():
    """As a sum over the nine cells 5 apart, with zeros outside."""
    torch.manual_seed(0)
    head = LargeFOVHead((8, 8, 8, 6), 4, embedding=7).eval()
    x = torch.randn(2, 6, 13, 9)

    def dilated(x, conv):
        wide = F.pad(x, (5, 5, 5, 5))
        height, width = x.shape[2:]
        parts = [
            torch.einsum("bchw,oc->bohw", wide[:, :, 5 * i :, 5 * j :][:, :, :height, :width], conv.weight[:, :, i, j])
            for i in range(3)
            for j in range(3)
        ]
        return sum(parts) + conv.bias[:, None, None]

    inner = dilated(dilated(x, head.conv6).relu(), head.conv7).relu()
    want = torch.einsum("bchw,kc->bkhw", inner, head.conv8.weight[:, :, 0, 0]) + head.conv8.bias[:, None, None]
    maps = [torch.full((2, 8, 1, 1), torch.nan)] * 3 + [x]  # the others are not asked
    assert relative_error(head(maps), want) < 1e-5


def test_widths_by_default_are_the_published_ones():
    assert AFA("mit_b0", 5).decoder.embedding == 256 and AFA("mit_b0", 5).arguments["embedding"] == 256
    large = AFA("mit_b0", 5, decoder="largefov")
    assert large.decoder.conv6.weight.shape == (512, 256, 3, 3) and large.decoder.conv7.weight.shape == (512, 512, 3, 3)
    assert large.decoder.conv8.weight.shape == (5, 512, 1, 1) and large.arguments["embedding"] == 512
    assert large.decoder.conv6.dilation == large.decoder.conv7.padding == (5, 5)
    assert AFA("mit_b0", 5, decoder="largefov", embedding=9).decoder.conv8.in_channels == 9
    assert set(DECODERS) == {"segformer", "largefov"}


def test_scores_keep_their_size_through_largefov():
    torch.manual_seed(0)
    head = LargeFOVHead((64,) * 4, 8, embedding=512, dropout=0.0)
    x = torch.randn(1, 64, 32, 32).relu_() * 2**0.5  # of mean square 1
    with torch.no_grad():
        inner = F.relu(head.conv7(F.relu(head.conv6(x))))[:, :, 10:22, 10:22]  # whose reach has no zeros around
    assert float(inner.square().mean()) == pytest.approx(1, rel=0.15)
    assert not head.conv6.bias.any() and not head.conv7.bias.any()


def test_dropout_of_whole_channels_in_training_alone():
    head = LargeFOVHead((6,) * 4, 4, embedding=7, dropout=0.5).train()
    x = [torch.randn(1, 6, 5, 5)]
    assert not torch.equal(head(x), head(x)) and torch.equal(head.eval()(x), head(x))
    assert isinstance(head.dropout, torch.nn.Dropout2d) and LargeFOVHead((6,) * 4, 4).dropout.p == 0.1
    assert AFA("mit_b0", 5, decoder="largefov", decoder_dropout=0.3, backbone_args=MIT).decoder.dropout.p == 0.3


@pytest.mark.parametrize("backbone", ["vit", "mit"])
@pytest.mark.parametrize("decoder", ["segformer", "largefov"])
def test_every_decoder_with_every_backbone(backbone, decoder):
    model = made_of(backbone, decoder=decoder).eval()
    assert isinstance(model.decoder, {"segformer": SegFormerHead, "largefov": LargeFOVHead}[decoder])
    images = torch.randn(2, 3, 64, 80)
    result = model(images)
    fine = backbone == "mit" and decoder == "segformer"
    assert result.seg_logits.shape == (2, 5, *((16, 20) if fine else (4, 5)))
    result.seg_logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    own = {name for name in model.state_dict() if name.startswith("decoder.conv")}
    assert (len(own) == 6) == (decoder == "largefov")


def test_a_cnn_has_none():
    assert AFA("resnet18", 5, decoder="largefov").decoder is None
