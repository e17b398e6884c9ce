"""From a configuration or a checkpoint to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config, from_dict
from ..errors import CheckpointError, ConfigError
from ..networks.afa import AFA
from . import checkpoint


@dataclass(frozen=True)
class Restored:
    """What a checkpoint of a run gives back.

    Attributes:
        model: in evaluation mode, on the device asked for.
        config: of the run.
        class_names: K names, background first.
        path: the file that was read.
        iteration: steps the model was trained for.
    """

    model: AFA
    config: Config
    class_names: tuple[str, ...]
    path: Path
    iteration: int


def build_model(config: Config, num_classes: int, pretrained: bool = True) -> AFA:
    """The model a configuration describes, on the CPU; ``pretrained=False`` leaves ImageNet weights out.

    Raises:
        ConfigError: naming the key of what cannot be built.
    """
    settings = config.model
    weights = settings.pretrained if pretrained else False
    try:
        return AFA(settings.backbone, num_classes, settings.stride, settings.pooling, weights)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model: {error}") from error


def checkpoint_of(path: str | Path) -> Path:
    """``path`` itself; of a run's folder the best checkpoint, or the newest if there was no evaluation.

    Raises:
        CheckpointError: the folder holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    best = path / checkpoint.BEST
    found = [best] if best.is_file() else checkpoint.checkpoints(path)
    if not found:
        raise CheckpointError(f"checkpoint: {path} holds no {checkpoint.BEST} and no iter_*.pt")
    return found[0]


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Restored:
    """Load a model that `afa train` saved; ``path`` is a checkpoint or a run's folder.

    Raises:
        CheckpointError: no such file, or no checkpoint of this project.
    """
    path = checkpoint_of(path)
    state = checkpoint.read(path)
    names = tuple(state["class_names"])
    try:
        config = from_dict(state["config"])
        model = build_model(config, len(names), pretrained=False)
        model.load_state_dict(state["model"])
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this version of afa: {error}"
        ) from error
    return Restored(model.to(device).eval(), config, names, path, state["progress"]["iteration"])
