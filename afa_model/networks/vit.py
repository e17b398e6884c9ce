"""Any Vision Transformer of timm's as a backbone: known by what it can do, not by its class.

What is asked of one: a row of ``blocks`` that each attend from all tokens to all tokens in one fused call, tokens of a
grid of patches after ``num_prefix_tokens`` others (class, distillation, registers), and any size of image. ViT, DeiT,
DeiT III, DINO, DINOv2, DINOv3, EVA-02, CLIP, SigLIP and their like have it.

Images come normalised with ImageNet's mean and deviation, as everywhere in AFA; a model that was trained with others
(CLIP, EVA-02) gets them converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import MEAN, STD, resize
from ..runtime.tensor_files import nothing_runs
from .backbone import Pyramid
from .vit_attention import Taker, is_program
from .vit_positions import keep_positions
from .vit_relative import any_size
from .vit_weights import load_vit_weights

DROP_PATH = 0.1  # as MiT has it in AFA


class Lacking(ValueError):
    """What a timm model lacks to be a backbone of this kind."""


class ViTBackbone(nn.Module):
    """A timm Vision Transformer that gives four maps at quarters of its depth, and queries and keys.

    Args:
        model: of timm's.
        affinity_blocks: how many of the last blocks give queries and keys (all if it has fewer).
        aux_layer: block whose tokens are given as a map beside; negative counts from the end (-1: the last).

    Attributes:
        embed_dims, affinity_heads, affinity_blocks: see :mod:`.backbone`.
        cell: side of a patch in pixels. An image is padded to whole patches below and at the right: its grid is
            ceil(side / cell).
        relative: whether it has relative positions, which are made for one size at a time.

    Raises:
        ValueError: aux_layer or affinity_blocks is out of range.
    """

    def __init__(self, model: nn.Module, affinity_blocks: int = 2, aux_layer: int | None = None) -> None:
        super().__init__()
        if affinity_blocks < 1:
            raise ValueError(f"affinity_blocks: expected at least 1, got {affinity_blocks}")
        depth = len(model.blocks)
        if aux_layer is not None and not -depth <= aux_layer < depth:
            raise ValueError(f"aux_layer: expected {-depth} .. {depth - 1} for {depth} blocks, got {aux_layer}")
        self.model = model
        self.cell = int(model.feature_info[-1]["reduction"])
        self.affinity_blocks = min(affinity_blocks, depth)
        self.prefix_tokens = int(model.num_prefix_tokens)
        self.embed_dims = (int(model.num_features),) * 4
        self.map_layers = tuple(math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4))
        self.aux_layer = None if aux_layer is None else aux_layer % depth
        self.layers = sorted({*self.map_layers} | ({self.aux_layer} - {None}))
        config = getattr(model, "pretrained_cfg", None) or {}
        mean, deviation = config.get("mean") or MEAN, config.get("std") or STD
        self.converts = tuple(mean) != MEAN or tuple(deviation) != STD
        if self.converts:
            scale = [ours / theirs for ours, theirs in zip(STD, deviation)]
            shift = [(ours - theirs) / by for ours, theirs, by in zip(MEAN, mean, deviation)]
            self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
            self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)
        keep_positions(model)
        self.taker = Taker(model.blocks[-self.affinity_blocks :])
        self.relative = any_size(model, self.taker)
        self.affinity_heads = 0  # what `look` sees

    @property
    def final_norm(self) -> nn.Module:
        """The model's last norm; some keep it for after the pooling of tokens, which here there is none of."""
        norm = self.model.norm
        return getattr(self.model, "fc_norm", norm) if isinstance(norm, nn.Identity) else norm

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches of an image of ``size`` (height, width), rounded up.

        By positive numbers: ONNX divides negative ones towards 0.
        """
        return (size[0] + self.cell - 1) // self.cell, (size[1] + self.cell - 1) // self.cell

    def forward_pyramid(self, images: Tensor) -> Pyramid:
        """[B, 3, H, W] of any size -> :class:`~.backbone.Pyramid`, all of whose maps have the grid's size."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        x = images * self.scale + self.shift if self.converts else images
        height, width = self.grid((images.shape[2], images.shape[3]))
        x = F.pad(x, (0, width * self.cell - images.shape[3], 0, height * self.cell - images.shape[2]))
        taken = self.taker.start((height, width))
        try:
            tokens = self.model.forward_intermediates(
                x, indices=self.layers, norm=False, output_fmt="NLC", intermediates_only=True
            )
        finally:
            self.taker.stop()
        if not taken:
            raise Lacking("its last blocks do not hand queries and keys to fused attention")
        by_layer = dict(zip(self.layers, tokens))
        last = self.map_layers[-1]
        aux = None if self.aux_layer is None else _as_map(by_layer[self.aux_layer], height, width)
        by_layer[last] = self.final_norm(by_layer[last])
        maps = [_as_map(by_layer[layer], height, width) for layer in self.map_layers]
        query, key = (torch.cat([pair[i][:, :, self.prefix_tokens :] for pair in taken], 1) for i in (0, 1))
        return Pyramid(maps, query, key, aux)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass.

        Raises:
            ValueError: the model has relative positions, whose size is known during a pass alone.
        """
        if enable and self.relative:
            raise ValueError("set_grad_checkpointing: a model with relative positions cannot recompute its blocks")
        self.model.set_grad_checkpointing(enable)

    def cropped(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps [B, C, h, w] on the grid of images of ``size``: as they are where whole patches fill the image; else at
        the image's size (bilinear), without what was padded. Resized to the image both are made by one rule.
        """
        height, width = (cells * self.cell for cells in self.grid(size))
        if not is_program() and (height, width) == tuple(size):
            return maps
        whole = resize(maps, (height, width))
        if not is_program():
            return whole[:, :, : size[0], : size[1]]
        for dim, side in zip((2, 3), size):  # a program for any size must not ask whether something is cut off
            whole = whole.index_select(dim, torch.arange(side, device=whole.device))
        return whole


def _as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, N, C] -> [B, C, h, w], a view (channels_last in memory)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def lacking(model: nn.Module) -> str | None:
    """What a timm model does not have that is asked of one here, as far as it shows without a pass; None: nothing."""
    blocks = getattr(model, "blocks", None)
    if not (isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks)):
        return "it has no row of transformer blocks (`blocks`)"
    if not hasattr(model, "patch_embed") or not getattr(model, "feature_info", None):
        return "it has no grid of patch tokens (`patch_embed`)"
    if not hasattr(model, "num_prefix_tokens"):
        return "it does not say how many tokens come before those of the patches (`num_prefix_tokens`)"
    if not hasattr(model, "forward_intermediates"):
        return "it does not give the tokens of intermediate blocks (`forward_intermediates`)"
    reductions = sorted({info["reduction"] for info in model.feature_info})
    if len(reductions) > 1:
        return f"its blocks are not on one grid, but at 1/{', 1/'.join(map(str, reductions))} of the image"
    return None


def _windows(model: nn.Module) -> str:
    """For a model that lacks something: whether it attends in windows, of which there may be no global affinity."""
    found = next((type(part).__name__ for part in model.modules() if hasattr(part, "window_size")), None)
    return f" and attends within windows ({found})" if found else ""


def look(backbone: ViTBackbone) -> int:
    """One pass at each of two sizes, of a backbone on the device ``meta``, which computes nothing -> the heads of the
    queries and keys that it gives.

    Raises:
        Lacking: they are not those of all patch tokens, or not of every size.
    """
    heads = 0
    for grid in ((3, 2), (4, 5)):
        size = [side * backbone.cell - 1 for side in grid]
        try:
            with torch.no_grad():
                seen = backbone.eval().forward_pyramid(torch.empty(1, 3, *size, device="meta"))
        except Lacking:
            raise
        except Exception as error:  # whatever a model of another kind stumbles over
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Lacking(f"it takes no images of {size[0]} x {size[1]} pixels ({what})") from error
        heads = seen.query.shape[1]
        if any(tuple(each.shape[2:]) != grid for each in seen.maps):
            raise Lacking(f"its tokens are not a grid of patches of {backbone.cell} pixels")
        if seen.query.shape != seen.key.shape or seen.query.shape[2] != math.prod(grid):
            raise Lacking("its blocks do not attend from every patch token to every other")
    return heads


def create_vit(
    name: str,
    pretrained: bool | str | Path,
    arguments: Mapping[str, Any],
    affinity_blocks: int = 2,
    aux_layer: int | None = None,
) -> ViTBackbone:
    """A timm Vision Transformer by name.

    Raises:
        Lacking: the model is none, or cannot be used as one; the error says what is missing.
        ValueError: an argument is out of range, or the weights do not fit.
        FileNotFoundError: no file at ``pretrained``.
    """
    if arguments.get("patch_drop_rate"):
        raise ValueError("backbone_args: patch_drop_rate takes patches out of the grid that CAM and affinity need")
    with torch.device("meta"):
        empty, known = _create(name, False, arguments)
        if (what := lacking(empty)) is not None:
            raise Lacking(what + _windows(empty))
        heads = look(ViTBackbone(empty, affinity_blocks, aux_layer))
    model = _without_head(_create(name, pretrained is True, known)[0])
    if not isinstance(pretrained, bool):
        load_vit_weights(model, pretrained, name)
    backbone = ViTBackbone(model, affinity_blocks, aux_layer)
    backbone.affinity_heads = heads
    return backbone


def _create(name: str, pretrained: bool, arguments: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model and the arguments that it was made with: ours as well, where it knows them."""
    ours: dict[str, Any] = {"dynamic_img_size": True, "drop_path_rate": DROP_PATH}
    while True:
        known = {**ours, **arguments}
        try:
            with nothing_runs():
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **known), known
        except TypeError as error:
            refused = next((key for key in ours if key not in arguments and f"'{key}'" in str(error)), None)
            if refused is None:
                raise ValueError(f"backbone_args: {name} does not take {dict(arguments)} ({error})") from error
            del ours[refused]
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"backbone: timm does not make {name} ({error})") from error


def _without_head(model: nn.Module) -> nn.Module:
    """The model without what only its own classification uses, which would have no gradient here."""
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None
    if hasattr(model, "fc_norm") and not isinstance(model.norm, nn.Identity):
        model.fc_norm = nn.Identity()
    return model
