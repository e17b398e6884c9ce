"""Checkpoints of the public AFA code: weights alone, known by their names, with or without the ``module.`` of DDP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config, parse
from ..data.classes import class_names
from ..errors import CheckpointError
from ..networks.afa import AFA
from ..networks.weights import under_prefix, weights_in

_MARKS = ("encoder.patch_embed1.proj.weight", "decoder.linear_pred.weight", "attn_proj.weight", "classifier.weight")
_DEPTHS = {(2, 2, 2, 2): 1, (3, 4, 6, 3): 2, (3, 4, 18, 3): 3, (3, 8, 27, 3): 4, (3, 6, 40, 3): 5}  # mit_b1 .. mit_b5


def published_weights(content: Any) -> dict[str, Tensor] | None:
    """The weights of a whole AFA in what a file holds; None where it is none, or a checkpoint of this project."""
    if not isinstance(content, Mapping) or "format" in content:
        return None
    try:
        state = under_prefix(weights_in(content), _MARKS)
    except ValueError:
        return None
    return state if all(name in state for name in _MARKS) else None


def published_model(path: Path, state: Mapping[str, Tensor]) -> tuple[AFA, Config, tuple[str, ...]]:
    """The model, the settings of the paper's run on its data set, and the K names of its classes.

    Backbone and number of classes are read from the weights; stride and pooling leave no trace in them and are the
    published ones.

    Raises:
        CheckpointError: the weights are not those of an AFA with a MiT.
    """
    depths = tuple(
        1 + max((int(name.split(".")[2]) for name in state if name.startswith(f"encoder.block{stage}.")), default=-1)
        for stage in range(1, 5)
    )
    number = _DEPTHS.get(depths, -1) if state[_MARKS[0]].shape[0] == 64 else 0
    num_classes = len(state["decoder.linear_pred.weight"])
    known = {len(class_names(dataset)): dataset for dataset in ("voc", "coco")}.get(num_classes)
    names = class_names(known) if known else ("background", *(f"class {index}" for index in range(1, num_classes)))
    config = parse(["--config", known or "voc"])
    config.model.backbone, config.data.num_classes = f"mit_b{number}", num_classes
    try:
        model = AFA(config.model.backbone, num_classes, config.model.stride, config.model.pooling)
        model.load_state_dict(dict(state))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} has the names of a published AFA checkpoint, but is none of mit_b0 .. mit_b5"
            f" (blocks {depths}): {error}"
        ) from error
    return model, config, names
