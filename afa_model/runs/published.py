"""Models that others hand on: checkpoints of the public AFA code (weights alone, known by their names, with or without
the ``module.`` of DDP), and folders as the Hugging Face Hub keeps them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import Config, from_dict, parse
from ..data.classes import class_names
from ..errors import CheckpointError, ConfigError
from ..networks.afa import AFA
from ..networks.hub import CONFIG, check_hub_folder
from ..networks.weights import under_prefix, weights_in

# names that the weights of a whole AFA have, the encoder's first
AFA_MARKS = ("encoder.patch_embed1.proj.weight", "decoder.linear_pred.weight", "attn_proj.weight", "classifier.weight")
_DEPTHS = {1: (2, 2, 2, 2), 2: (3, 4, 6, 3), 3: (3, 4, 18, 3), 4: (3, 8, 27, 3), 5: (3, 6, 40, 3)}  # mit_b0's as b1's


def published_weights(content: Any) -> dict[str, Tensor] | None:
    """The weights of a whole AFA in what a file holds; None where it is none, or a checkpoint of this project."""
    if not isinstance(content, Mapping) or "format" in content:
        return None
    try:
        state = under_prefix(weights_in(content), AFA_MARKS)
    except ValueError:
        return None
    return state if all(name in state for name in AFA_MARKS) else None


def depths_in(names: Collection[str], prefix: str = "") -> tuple[int, ...]:
    """How many blocks the four stages of a MiT have, by its names (the public ones)."""
    begins = [f"{prefix}block{stage}." for stage in range(1, 5)]
    return tuple(
        1 + max((int(name.removeprefix(begin).split(".")[0]) for name in names if name.startswith(begin)), default=-1)
        for begin in begins
    )


def mit_like(depths: Sequence[int], width: int) -> str:
    """Of mit_b0 .. mit_b5 the one of these blocks and this width of the first stage; of damaged weights the nearest."""
    candidates = {0: _DEPTHS[1]} if width == 32 else _DEPTHS
    nearest = min(candidates, key=lambda n: sum(abs(a - b) for a, b in zip(candidates[n], depths)))
    return f"mit_b{nearest}"


def published_settings(num_classes: int) -> tuple[Config, tuple[str, ...]]:
    """The settings of the paper's run on the data set of so many classes (else on VOC), and the classes' names."""
    known = {len(class_names(dataset)): dataset for dataset in ("voc", "coco")}.get(num_classes)
    names = class_names(known) if known else ("background", *(f"class {index}" for index in range(1, num_classes)))
    config = parse(["--config", known or "voc"])
    config.data.num_classes = num_classes
    return config, names


def published_model(path: Path, state: Mapping[str, Tensor]) -> tuple[AFA, Config, tuple[str, ...]]:
    """The model, the settings of the paper's run on its data set, and the K names of its classes.

    Backbone and number of classes are read from the weights; stride and pooling leave no trace in them and are the
    published ones.

    Raises:
        CheckpointError: the weights are not those of an AFA with a MiT.
    """
    depths = depths_in(state, "encoder.")
    backbone = mit_like(depths, len(state[AFA_MARKS[0]]))
    config, names = published_settings(len(state["decoder.linear_pred.weight"]))
    config.model.backbone = backbone
    try:
        model = AFA(num_classes=len(names), **config.model.arguments())
        model.load_state_dict(dict(state))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} has the names of a published AFA checkpoint, but is none of mit_b0 .. mit_b5"
            f" (blocks {depths}): {error}"
        ) from error
    return model, config, names


def hub_model(folder: Path) -> tuple[AFA, Config, tuple[str, ...]]:
    """The model of a folder that ``save_pretrained`` wrote, the settings of the run that trained it (the published ones
    where the folder does not say), and the K names of its classes.

    Raises:
        CheckpointError: the folder holds something else.
    """
    model = AFA.from_pretrained(check_hub_folder(folder))
    config, names = published_settings(model.num_classes)
    try:
        config = from_dict(model.about["run"]) if "run" in model.about else config
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG} does not fit this version of afa: {error}") from error
    for name in config.model.arguments():
        value = model.arguments[name]
        setattr(config.model, name, tuple(value) if isinstance(value, list) else value)
    config.model.pretrained, config.data.num_classes = False, model.num_classes
    return model, config, tuple(model.class_names or names)
