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
from .cnn import create_cnn
from .weights import load_mit_weights

# The files here that register backbones with attention with timm, and what reads their weight files.
WITH_ATTENTION = {"mit": load_mit_weights}


def create_backbone(
    name: str, stride: Sequence[int], pretrained: bool | str | Path, arguments: Mapping[str, Any]
) -> nn.Module:
    """A timm model by name, with the strides of its four patch embeddings (a CNN takes their product).

    Raises:
        ValueError: timm has no such model, or the weights do not fit it.
        FileNotFoundError: no file at ``pretrained``.
    """
    if not timm.is_model(name):
        raise ValueError(f"backbone: expected mit_b0 .. mit_b5 or a CNN of timm's, got {name!r}")
    family = next((module for module in WITH_ATTENTION if is_model_in_modules(name, [module])), None)
    if family is None:
        return create_cnn(name, math.prod(stride), pretrained, dict(arguments))
    with nothing_runs():
        backbone = timm.create_model(name, pretrained=pretrained is True, num_classes=0, stride=stride, **arguments)
    if not isinstance(pretrained, bool):
        WITH_ATTENTION[family](backbone, pretrained)
    return backbone
