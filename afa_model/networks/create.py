"""Makes a backbone by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model_in_modules
from torch import nn

from ..runtime.tensor_files import nothing_runs
from . import mit  # noqa: F401  (registers mit_b0..mit_b5 with timm)
from .cnn import NoMaps, create_cnn
from .settings import STRIDE
from .vit import Lacking, create_vit
from .weights import load_mit_weights

# The files here that register backbones with attention with timm, and what reads their weight files.
WITH_ATTENTION = {"mit": load_mit_weights}
DECIDED = {"features_only", "num_classes", "pretrained", "pretrained_cfg", "checkpoint_path"}


def create_backbone(
    name: str,
    stride: Sequence[int],
    pretrained: bool | str | Path,
    arguments: Mapping[str, Any],
    affinity_blocks: int = 2,
    aux_layer: int | None = None,
) -> nn.Module:
    """A timm model by name: a MiT with the strides of its four patch embeddings; a Vision Transformer, whose patches
    are its grid; or a CNN, which takes the strides' product.

    Raises:
        ValueError: timm has no such model, it cannot be a backbone (the error says what is missing), or the weights do
            not fit it.
        FileNotFoundError: no file at ``pretrained``.
    """
    decided = sorted(DECIDED.intersection(arguments))
    if decided:
        raise ValueError(f"backbone_args: {', '.join(decided)}: decided by what a backbone is here, not an argument")
    if not timm.is_model(name):
        raise ValueError(
            f"backbone: expected mit_b0 .. mit_b5, or a Vision Transformer or a CNN of timm's, got {name!r}"
        )
    family = next((module for module in WITH_ATTENTION if is_model_in_modules(name, [module])), None)
    if family is not None:
        _no_aux(name, aux_layer)
        arguments = {"affinity_blocks": affinity_blocks, **arguments}
        with nothing_runs():
            backbone = timm.create_model(name, pretrained=pretrained is True, num_classes=0, stride=stride, **arguments)
        if not isinstance(pretrained, bool):
            WITH_ATTENTION[family](backbone, pretrained)
        return backbone
    try:
        backbone = create_vit(name, pretrained, arguments, affinity_blocks, aux_layer)
    except Lacking as lacking:
        _no_aux(name, aux_layer)
        try:
            return create_cnn(name, math.prod(stride), pretrained, dict(arguments))
        except NoMaps as error:
            raise ValueError(
                f"backbone: {name} is no Vision Transformer that AFA can use: {lacking}; and no CNN: {error}."
                " Take a MiT, a plain Vision Transformer such as vit_base_patch16_224, or a CNN such as resnet50"
            ) from error
    if tuple(stride) != STRIDE and math.prod(stride) != backbone.cell:
        raise ValueError(
            f"stride: {name} has patches of {backbone.cell} pixels, which are its grid, not {math.prod(stride)}:"
            f" {list(STRIDE)}, as without this setting, leaves it to them; got {list(stride)}"
        )
    return backbone


def _no_aux(name: str, aux_layer: int | None) -> None:
    if aux_layer is not None:
        raise ValueError(f"aux_layer: expected none with {name}, which is no Vision Transformer, got {aux_layer}")
