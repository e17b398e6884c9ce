"""From a configuration or a checkpoint to a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config, from_dict
from ..errors import CheckpointError, ConfigError
from ..networks.afa import AFA
from ..runtime.tensor_files import read_tensors
from . import checkpoint
from .published import published_model, published_weights


@dataclass(frozen=True)
class Restored:
    """What a checkpoint of a run gives back.

    Attributes:
        model: in evaluation mode, on the device asked for.
        config: of the run.
        class_names: K names, background first.
        path: the file that was read.
        iteration: steps the model was trained for; None where the file does not say (a published one).
        folder: the one the run was started in, from which the relative paths of its settings count, if known.
    """

    model: AFA
    config: Config
    class_names: tuple[str, ...]
    path: Path
    iteration: int | None
    folder: str | None = None

    @property
    def trained(self) -> str:
        """How far the model was trained, in words."""
        return "published weights" if self.iteration is None else f"trained for {self.iteration} steps"


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
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    best = path / checkpoint.BEST
    found = [best] if best.is_file() else checkpoint.checkpoints(path)
    if not found:
        raise CheckpointError(f"checkpoint: {path} holds no {checkpoint.BEST} and no iter_*.pt")
    return found[0]


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Restored:
    """Load a model that `afa train` or the public AFA code saved; ``path`` is a checkpoint or a run's folder.

    Raises:
        CheckpointError: no such file, or no checkpoint of either.
    """
    path = checkpoint_of(path)
    content = read_tensors(path)
    weights = published_weights(content)
    if weights is not None:
        model, config, names = published_model(path, weights)
        return Restored(model.to(device).eval(), config, names, path, None)
    state = checkpoint.checked(path, content)
    names = tuple(state["class_names"])
    try:
        config = from_dict(state["config"])
        model = build_model(config, len(names), pretrained=False)
        model.load_state_dict(state["model"])
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this version of afa: {error}"
        ) from error
    folder, progress = state.get("folder"), state["progress"]
    return Restored(model.to(device).eval(), config, names, path, progress["iteration"], folder)
