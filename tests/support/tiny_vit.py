"""Vision Transformers of a few thousand parameters, of every family, and what their own attention is."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_model.conventions import MEAN, STD
from afa_model.networks.afa import AFA

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}
ROTARY = SMALL | {"embed_dim": 32}  # a head's width is a multiple of 4

# The timm model, and what makes it small.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "query and key norms": ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "deit iii": ("deit3_small_patch16_224", SMALL),
    "dino": ("vit_small_patch8_224", SMALL),
    "dinov2": ("vit_small_patch14_dinov2", SMALL),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "dinov3": ("vit_small_patch16_dinov3", ROTARY),
    "eva-02": ("eva02_tiny_patch14_224", SMALL),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", ROTARY),
    "clip": ("vit_base_patch16_clip_224", SMALL),
    "siglip, no class token": ("vit_base_patch16_siglip_224", SMALL),
    "relative, network": ("vit_relpos_small_patch16_224", SMALL),
    "beit": ("beit_base_patch16_224", SMALL | {"img_size": 48}),
}


def tiny_vit(family: str = "vit", classes: int = 5, seed: int = 0, **arguments: Any) -> AFA:
    """With all its parameters random: some of timm's start at 0."""
    name, small = FAMILIES[family]
    torch.manual_seed(seed)
    small = small | {"drop_path_rate": 0.0} | arguments.pop("backbone_args", {})
    model = AFA(name, classes, backbone_args=small, **{"embedding": 16, "decoder_dropout": 0.0} | arguments)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def own_model(family: str, model: AFA, size: tuple[int, int]) -> nn.Module:
    """timm's model with the same weights, made for images of one size by timm's own means."""
    name, small = FAMILIES[family]
    plain = timm.create_model(name, num_classes=0, **small)
    plain.load_state_dict(model.encoder.model.state_dict(), strict=False)
    if family != "beit" or size != (48, 48):
        plain.set_input_size(img_size=size)
    return plain.eval()


def as_it_takes_them(plain: nn.Module, images: Tensor, cell: int) -> Tensor:
    """Images by ImageNet's mean and deviation -> by the model's, zeros below and right of them up to whole patches."""
    config = plain.pretrained_cfg
    column = torch.tensor([MEAN, STD, config["mean"], config["std"]])[:, :, None, None]
    images = ((images * column[1] + column[0]) - column[2]) / column[3]
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % cell, 0, -height % cell))


def own_attention(plain: nn.Module, images: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """What a timm model makes of images that it takes -> the raw scores q.k [B, blocks x heads, N, N] of the patch
    tokens in its last blocks, and their last tokens [B, N, C], normed.
    """
    seen: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append((module, args[0], kwargs))

    with ExitStack() as stack:
        for block in plain.blocks[-blocks:]:
            stack.enter_context(_Removed(block.attn.register_forward_pre_hook(see, with_kwargs=True)))
        tokens = plain.forward_features(images)
    if isinstance(plain.norm, nn.Identity):
        tokens = plain.fc_norm(tokens)
    prefix = plain.num_prefix_tokens
    scores = [_scores(module, x, kwargs.get("rope"), prefix) for module, x, kwargs in seen]
    return torch.cat(scores, 1)[:, :, prefix:, prefix:], tokens[:, prefix:]


class _Removed:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _scores(attn: nn.Module, x: Tensor, rope: Tensor | None, prefix: int) -> Tensor:
    if getattr(attn, "qkv", None) is not None:
        query, key, _ = (x @ attn.qkv.weight.T).chunk(3, -1)
        if attn.qkv.bias is not None:
            query, key = query + attn.qkv.bias.chunk(3)[0], key + attn.qkv.bias.chunk(3)[1]
        elif getattr(attn, "q_bias", None) is not None:
            query = query + attn.q_bias  # keys have none
    else:
        query, key = attn.q_proj(x), attn.k_proj(x)
    query, key = (each.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for each in (query, key))
    if hasattr(attn, "q_norm"):
        query, key = attn.q_norm(query), attn.k_norm(key)
    if rope is not None:
        query, key = (_rotated(each, rope, prefix, attn.rotate_half) for each in (query, key))
    return query @ key.transpose(2, 3)


def _rotated(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Pairs of channels (neighbours, or of the two halves) turned by their angles; the prefix tokens stay."""
    still, x = x[:, :, :prefix], x[:, :, prefix:]
    sine, cosine = rope.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([still, x * cosine + turned * sine], 2)


def cells(size: tuple[int, int], cell: int) -> tuple[int, int]:
    return math.ceil(size[0] / cell), math.ceil(size[1] / cell)
