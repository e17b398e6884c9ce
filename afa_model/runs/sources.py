"""What is in a file or folder of weights, whoever wrote it, and how it differs from the model it seems to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..config import Config, from_dict
from ..errors import CheckpointError, ConfigError
from ..networks.afa import AFA
from ..networks.hub import WEIGHTS, is_hub_folder
from ..networks.layouts import LAYOUTS, find_mit
from ..networks.mit import MixTransformer
from ..networks.weights import under_prefix, weights_in
from ..runtime.tensor_files import read_tensors
from . import checkpoint
from .published import AFA_MARKS, depths_in, hub_model, mit_like, published_settings
from .restore import checkpoint_of, handed_on

_ENCODER = "encoder."


@dataclass(frozen=True)
class Source:
    """Weights by public names, and what is known of them beside.

    Attributes:
        title: what was found, in words.
        state: the tensors, of a whole AFA or of a MiT alone.
        model: the network that they seem to be of, whose own tensors do not matter.
        others: names in the file that have no place in it.
        config: settings of the run that trained an AFA (of published weights the published ones), None of a MiT.
        names: of an AFA's classes.
        about: see :class:`~afa_model.networks.hub.HubModel`.
        best: mIoU in percent of the best evaluation while training.
    """

    title: str
    state: dict[str, Tensor]
    model: nn.Module
    others: list[str] = field(default_factory=list)
    config: Config | None = None
    names: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    best: float = float("-inf")

    @property
    def whole(self) -> bool:
        """Whether it is a whole AFA."""
        return isinstance(self.model, AFA)

    def require_mit(self, names: str) -> None:
        """ConfigError if it is a whole model whose backbone is no MiT; ``names``: what needs one."""
        if self.whole and not isinstance(self.model.encoder, MixTransformer):
            raise ConfigError(f"to: {self.title} has no MiT, {names}; take afa or hub")

    def backbone(self) -> Source:
        """Its MiT alone.

        Raises:
            ConfigError: its backbone is none.
        """
        if not self.whole:
            return self
        self.require_mit("whose names mit, huggingface and mmseg are")
        state = {name.removeprefix(_ENCODER): value for name, value in self.state.items() if name.startswith(_ENCODER)}
        return Source(self.title, state, self.model.encoder)

    def fitting(self) -> Source:
        """What of it fits the model."""
        wanted = self.model.state_dict()
        state = {name: self.state[name] for name in self.state if _shape(wanted.get(name)) == _shape(self.state[name])}
        return replace(self, state=state, others=[])


@dataclass(frozen=True)
class Differences:
    """Between the tensors of a file and those that a model needs."""

    missing: list[str]
    others: list[str]
    shapes: list[str]

    @classmethod
    def of(cls, source: Source) -> Differences:
        """What stands between a source and the model that it seems to be."""
        wanted, state = source.model.state_dict(), source.state
        # A count that nothing depends on here; files from before PyTorch 0.4 lack it.
        missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
        shapes = [
            f"{name} is {_shape(value)} in place of {_shape(wanted[name])}"
            for name, value in state.items()
            if name in wanted and _shape(wanted[name]) != _shape(value)
        ]
        return cls(missing, [*source.others, *(name for name in state if name not in wanted)], shapes)

    def lines(self, most: int = 10) -> list[str]:
        """For the reader; none where there is no difference."""
        told = [
            f"{what} ({len(names)}): {grouped(names)}"
            for what, names in (("missing", self.missing), ("unknown", self.others))
            if names
        ]
        told += [f"another shape: {line}" for line in self.shapes[:most]]
        more = len(self.shapes) - most
        return told + ([f"another shape: {more} more"] if more > 0 else [])


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def grouped(names: Collection[str], most: int = 5) -> str:
    """Names in one line: those that begin alike as one, with their number, as finely as ``most`` groups allow."""
    deepest = max(name.count(".") + 1 for name in names)
    groups = Counter(name.split(".")[0] for name in names)
    for depth in range(2, deepest + 1):
        finer = Counter(".".join(name.split(".")[:depth]) for name in names)
        if len(finer) > most:
            break
        groups = finer
    first = {group: next(name for name in names if f"{name}.".startswith(f"{group}.")) for group in groups}
    shown = [first[group] if count == 1 else f"{group}.* ({count})" for group, count in groups.items()]
    more = f", and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def read_source(path: str | Path) -> Source:
    """What a file, a run's folder or a folder as the Hub keeps one holds.

    Raises:
        CheckpointError: there is none, or nothing known in it; the error says what there is.
    """
    path = checkpoint_of(path)
    if path.name == WEIGHTS and is_hub_folder(path.parent):
        model, config, names = hub_model(path.parent)
        title = f"{model.backbone}, {len(names)} classes, as the Hub keeps it"
        return Source(title, read_tensors(path), model, [], config, names, model.about)
    content = read_tensors(path)
    if isinstance(content, Mapping) and "format" in content:
        return _own(path, checkpoint.checked(path, content))
    try:
        tensors = weights_in(content)
        weights = _nearly_afa(tensors)
        found = None if weights is not None else find_mit(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    if weights is not None:
        return _published(weights, tensors, content)
    if found is None:
        known = "; ".join(layout.title for layout in LAYOUTS.values())
        raise CheckpointError(
            f"{path} holds neither an AFA nor a MiT by names that are known ({known}), but tensors ({len(tensors)}):"
            f" {grouped(tensors)}"
        )
    name = mit_like(depths_in(found.state), len(found.state["patch_embed1.proj.weight"]))
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=len(found.state.get("head.weight", ())))
    return Source(f"{name} by the names of {LAYOUTS[found.layout].title}", found.state, model, found.others)


def _nearly_afa(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of an AFA, of which parts may be missing."""
    state = under_prefix(tensors, AFA_MARKS)
    backbone, *others = [name in state for name in AFA_MARKS]
    return state if backbone and any(others) else None


def _own(path: Path, state: dict[str, Any]) -> Source:
    try:
        config, names = from_dict(state["config"]), tuple(state["class_names"])
        model = _imagined(config, len(names))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} does not fit this version of afa: {error}") from error
    title = f"{config.model.backbone}, {len(names)} classes, a checkpoint of afa train"
    about, best = handed_on(state, config, model.has_affinity), state["progress"].get("best", float("-inf"))
    return Source(title, state["model"], model, [], config, names, about, best)


def _published(weights: dict[str, Tensor], tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Source:
    taken = set(map(id, weights.values()))
    others = [name for name, value in tensors.items() if id(value) not in taken]
    _, decoder, _, classifier = AFA_MARKS
    count = len(weights[decoder]) if decoder in weights else 1 + len(weights.get(classifier, range(20)))
    config, names = published_settings(count)
    width = len(weights["encoder.patch_embed1.proj.weight"])
    config.model.backbone = mit_like(depths_in(weights, _ENCODER), width)
    title = f"{config.model.backbone}, {len(names)} classes, as the public AFA code writes it"
    step = next((content[key] for key in ("iter", "iteration", "step") if type(content.get(key)) is int), None)
    about = {} if step is None else {"iteration": step}
    return Source(title, weights, _imagined(config, len(names)), others, config, names, about)


def _imagined(config: Config, num_classes: int) -> AFA:
    """The model of a configuration, without memory for its tensors."""
    with torch.device("meta"):
        return AFA(num_classes=num_classes, **config.model.arguments())
