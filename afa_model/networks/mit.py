"""Mix Transformer (MiT-B0..B5), SegFormer's backbone, registered with timm; gives last queries and keys.

Source: Xie et al., SegFormer (NeurIPS 2021), section 3.1 and Table 6. AFA (CVPR 2022, supplement 1.1) changes
the stride of the last patch embedding from 2 to 1, so that the last stage works at 1/16 of the image.

    timm.create_model("mit_b1", pretrained=False, stride=(4, 2, 2, 1))

Attention is ``scaled_dot_product_attention`` in every stage: no attention map is ever formed. Where a map is
wanted (the affinity head), the queries and keys that would make it are returned instead.

Parameter names are the public ``mit_b*.pth`` files'; ``weights.py`` reads the other layouts. The weights
themselves are NVIDIA's, for non-commercial use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbone import Pyramid
from .onednn import Linear, depthwise_gelu
from .weights import checkpoint_filter_fn


def _tokens_to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, N, C] -> [B, C, h, w] as a view (channels_last in memory)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _image_to_tokens(image: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, C]; a view where the image is channels_last."""
    return image.flatten(2).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """3x3 depthwise convolution of tokens, which is what gives MiT its sense of position, and GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return _image_to_tokens(depthwise_gelu(_tokens_to_image(x, height, width), self.dwconv))


class Mlp(nn.Module):
    """Mix-FFN: linear, depthwise 3x3, GELU, linear."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.drop(self.dwconv(self.fc1(x), height, width))
        return self.drop(self.fc2(x))


class Attention(nn.Module):
    """Self-attention whose keys and values come from a map reduced ``sr_ratio`` times in each direction."""

    def __init__(self, dim: int, heads: int, sr_ratio: int, drop: float, qkv_bias: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"embed_dims: {dim} is not divisible by its {heads} heads")
        self.heads = heads
        self.sr_ratio = sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.drop = nn.Dropout(drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gives the attended tokens [B, N, C], and query and key [B, heads, N or fewer, d], unscaled."""
        query = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        source = x
        if self.sr_ratio > 1:
            source = self.norm(_image_to_tokens(self.sr(self._at_least_one_patch(x, height, width))))
        key, value = self.kv(source).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2))), query, key

    def _at_least_one_patch(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens as a map; one smaller than the reduction kernel (image side < 29) repeats its border."""
        image = _tokens_to_image(x, height, width)
        if height >= self.sr_ratio and width >= self.sr_ratio:  # apart: exported sizes must not depend on each other
            return image
        padding = (0, max(self.sr_ratio - width, 0), 0, max(self.sr_ratio - height, 0))
        return F.pad(image, padding, mode="replicate")


class Block(nn.Module):
    """Attention and Mix-FFN, each normalised before and added to its input."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        drop: float,
        drop_path: float,
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, sr_ratio, drop, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        attended, query, key = self.attn(self.norm1(x), height, width)
        x = x + self.drop_path(attended)
        x = x + self.drop_path(self.mlp(self.norm2(x), height, width))
        return x, query, key


class OverlapPatchEmbed(nn.Module):
    """Strided convolution with overlapping kernels; the grid is ceil(side / stride)."""

    def __init__(self, kernel: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(_image_to_tokens(x)), x.shape[2], x.shape[3]


class MixTransformer(nn.Module):
    """MiT. ``stride``: of the four patch embeddings, (4, 2, 2, 2) in SegFormer, (4, 2, 2, 1) in AFA.

    ``affinity_blocks``: how many of the last blocks give queries and keys (2 in AFA; or all if fewer).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        stride: Sequence[int] = (4, 2, 2, 2),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        affinity_blocks: int = 2,
    ) -> None:
        super().__init__()
        lists = {"stride": stride, "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
        for name, value in lists.items():
            if len(value) != 4 or any(int(v) != v or v < 1 for v in value):
                raise ValueError(f"{name}: expected four positive integers, got {tuple(value)}")
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool: expected 'avg' or '', got {global_pool!r}")
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.num_features = self.head_hidden_size = embed_dims[3]
        self.embed_dims, self.depths, self.stride = tuple(embed_dims), tuple(depths), tuple(stride)
        self.affinity_blocks = min(affinity_blocks, depths[3])
        self.affinity_heads = self.affinity_blocks * num_heads[3]
        self.grad_checkpointing = False
        self.feature_info = []
        rates = [drop_path_rate * j / max(sum(depths) - 1, 1) for j in range(sum(depths))]
        reduction, previous = 1, in_chans
        for i in range(4):
            dim = embed_dims[i]
            reduction *= stride[i]
            embed = OverlapPatchEmbed(7 if i == 0 else 3, stride[i], previous, dim)
            first = sum(depths[:i])
            blocks = [
                Block(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], drop_rate, rate, qkv_bias)
                for rate in rates[first : first + depths[i]]
            ]
            # The public checkpoints number these attributes instead of keeping the stages in a list.
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"norm{i + 1}"})
            previous = dim
        self.head = nn.Linear(embed_dims[3], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _stage(self, i: int, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Stage i (0..3) of a map: its normalised output, and the queries and keys of its affinity blocks."""
        x, height, width = getattr(self, f"patch_embed{i + 1}")(x)
        blocks = getattr(self, f"block{i + 1}")
        queries: list[Tensor] = []
        keys: list[Tensor] = []
        for j, block in enumerate(blocks):
            if self.grad_checkpointing and self.training:
                x, query, key = checkpoint(block, x, height, width, use_reentrant=False)
            else:
                x, query, key = block(x, height, width)
            if i == 3 and j >= len(blocks) - self.affinity_blocks:
                queries.append(query)
                keys.append(key)
        return _tokens_to_image(getattr(self, f"norm{i + 1}")(x), height, width), queries, keys

    def forward_pyramid(self, x: Tensor) -> Pyramid:
        """[B, in_chans, H, W] of any size -> :class:`Pyramid`. Each grid is ceil(side / stride so far)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans or not x.numel():
            raise ValueError(f"images: expected [B, {self.in_chans}, H, W], got {list(x.shape)}")
        maps = []
        for i in range(4):
            x, queries, keys = self._stage(i, x)
            maps.append(x)
        return Pyramid(maps, torch.cat(queries, 1), torch.cat(keys, 1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's feature interface; maps are always normalised, as decoders expect (``norm`` is ignored)."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        wanted, last = feature_take_indices(4, indices)
        maps = []
        for i in range(last + 1 if stop_early else 4):
            x, _, _ = self._stage(i, x)
            maps.append(x)
        taken = [maps[i] for i in wanted]
        return taken if intermediates_only else (x, taken)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_pyramid(x).maps[3]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3)) if self.global_pool == "avg" else x
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet classification: [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass: about the memory of one block instead of all of them."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patch_embed1", "blocks": r"^(?:patch_embed|block|norm)(\d)"}

    def no_weight_decay(self) -> set[str]:
        return set()


def _cfg(variant: str) -> dict[str, Any]:
    return {
        "hf_hub_id": f"nvidia/mit-{variant}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "license": "NVIDIA source code licence for SegFormer (non-commercial)",
    }


default_cfgs = generate_default_cfgs({f"mit_b{i}.in1k": _cfg(f"b{i}") for i in range(6)})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        MixTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _variant(name: str, depths: Sequence[int], embed_dims: Sequence[int]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **{"depths": depths, "embed_dims": embed_dims, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"MiT-{name[-2:].upper()}: depths {tuple(depths)}, widths {tuple(embed_dims)}."
    globals()[name] = register_model(entrypoint)


_wide = partial(_variant, embed_dims=(64, 128, 320, 512))
_variant("mit_b0", (2, 2, 2, 2), (32, 64, 160, 256))
_wide("mit_b1", (2, 2, 2, 2))
_wide("mit_b2", (3, 4, 6, 3))
_wide("mit_b3", (3, 4, 18, 3))
_wide("mit_b4", (3, 8, 27, 3))
_wide("mit_b5", (3, 6, 40, 3))
