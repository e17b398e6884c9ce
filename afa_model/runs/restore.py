"""From a configuration or a checkpoint to a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config, from_dict, to_dict
from ..errors import CheckpointError, ConfigError
from ..networks.afa import AFA
from ..networks.hub import CONFIG, WEIGHTS, is_hub_folder
from ..networks.weights import not_finite
from ..runtime.tensor_files import read_tensors
from . import checkpoint
from .published import hub_model, published_model, published_weights


@dataclass(frozen=True)
class Restored:
    """What a checkpoint of a run gives back.

    Attributes:
        model: in evaluation mode, on the device asked for; it knows its classes and what else ``save_pretrained``
            writes down (`handed_on`).
        config: of the run.
        class_names: K names, background first.
        path: the file that was read.
        iteration: steps the model was trained for; None where it is not known (a published one).
        folder: the one the run was started in, from which the relative paths of its settings count, if known.
        names_known: whether the file says what its classes are; else the names are those of VOC or COCO, by their
            number, or numbers.
    """

    model: AFA
    config: Config
    class_names: tuple[str, ...]
    path: Path
    iteration: int | None
    folder: str | None = None
    names_known: bool = True

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
        return AFA(num_classes=num_classes, pretrained=weights, **settings.arguments())
    except (ValueError, OSError) as error:
        raise ConfigError(f"model: {error}") from error


def checkpoint_of(path: str | Path) -> Path:
    """``path`` itself; of a run's folder the best checkpoint, or the newest if there was no evaluation; of a folder as
    the Hub keeps one the weights.

    Raises:
        CheckpointError: the folder holds none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    best = path / checkpoint.BEST
    found = [best] if best.is_file() else checkpoint.checkpoints(path)
    if not found and is_hub_folder(path):
        return path / WEIGHTS
    if not found:
        raise CheckpointError(
            f"checkpoint: {path} holds no {checkpoint.BEST} and no iter_*.pt, nor {CONFIG} and {WEIGHTS} as the Hub has"
        )
    return found[0]


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Restored:
    """Load a model that `afa train`, the public AFA code or ``save_pretrained`` saved; ``path`` is a checkpoint, a
    run's folder, or one as the Hub keeps it.

    Raises:
        CheckpointError: no such file, no checkpoint of either, or its weights are NaN or infinite.
    """
    restored = _restored(checkpoint_of(path), device)
    wrong = not_finite(restored.model)
    if wrong:
        raise CheckpointError(f"checkpoint {restored.path} holds NaN or infinite weights: {wrong}")
    return restored


def _restored(path: Path, device: str | torch.device) -> Restored:
    if path.name == WEIGHTS and is_hub_folder(path.parent):
        model, config, names = hub_model(path.parent)
        known, step = model.class_names is not None, model.about.get("iteration")
        return Restored(model.to(device).eval(), config, names, path, step, names_known=known)
    content = read_tensors(path)
    weights = published_weights(content)
    if weights is not None:
        model, config, names = published_model(path, weights)
        model.class_names = names
        return Restored(model.to(device).eval(), config, names, path, None, names_known=False)
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
    model.class_names, model.about = names, handed_on(state, config, model.has_affinity)
    folder, progress = state.get("folder"), state["progress"]
    return Restored(model.to(device).eval(), config, names, path, progress["iteration"], folder)


def handed_on(state: Mapping[str, Any], config: Config, segments: bool) -> dict[str, Any]:
    """What of a checkpoint goes with its weights into other hands: steps, the best score so far and its protocol, and
    the settings, without paths, which may say more than whoever publishes a model means to.

    ``segments``: whether the model has a decoder, whose score then counts.
    """
    run = to_dict(config)
    for name in ("out", "resume", "device"):
        del run[name]
    for name in ("root", "label_file"):
        del run["data"][name]
    for name in ("train_split", "val_split"):
        run["data"][name] = Path(run["data"][name]).name
    run["model"]["pretrained"] = False
    about = {"iteration": state["progress"]["iteration"], "run": run}
    best = state["progress"].get("best")
    if best is not None and math.isfinite(best):
        segments = segments and "segmentation" in (config.eval.kinds or ("segmentation",))
        about["scores"] = {
            "protocol": config.eval.protocol or "training",
            "split": run["data"]["val_split"],
            "note": "The best of the evaluations while training, up to these weights.",
            "miou": {"segmentation" if segments else "best label map": round(best, 2)},
        }
    return about
