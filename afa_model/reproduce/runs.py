"""The networks of a sweep: each is a run of `afa train` in a folder named by its settings, trained once.

Rows that differ only in what counts after the classifier's phase go on from one checkpoint of its end, as resuming
does, bit for bit on the CPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config, check, to_dict
from ..errors import ConfigError
from ..runs import checkpoint
from ..runs.loop import train

Settings = TypeVar("Settings")

# What a network does not depend on.
_ASIDE = ("out", "resume", "device", "process_timeout", "log", "checkpoint", "data.num_workers", "data.check",
          "eval.num_workers", "eval.progress", "eval.batch", "eval.channels_last")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A network to train.

    Attributes:
        name: its settings in short, such as ``radius-2``.
        config: all its settings; ``out`` is its folder.
        base: those of the sweep, with the run's seed.
    """

    name: str
    config: Config
    base: Config

    @property
    def folder(self) -> Path:
        """Where it is trained, and what is found out about it is written."""
        return Path(self.config.out)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do for it."""
        path = _at(self.folder, self.config.schedule.max_iters)
        if not path.is_file():
            return False
        return not (self.config.eval.every and checkpoint.read(path).get("owes_evaluation"))

    def start(self) -> Run | None:
        """The run up to the end of the classifier's phase, which others share; None where no run shares it."""
        config, base = self.config, self.base
        if config.step.compute_unused or self._until >= config.schedule.max_iters:
            return None
        weights = {name: getattr(base.step, name) for name in ("seg_weight", "aff_weight")}
        step, off = replace(config.step, **weights), replace(config.eval, every=0)
        same = replace(config, labels=base.labels, loss=base.loss, step=step, eval=off)
        return _placed("start", same, base)

    @property
    def _until(self) -> int:
        return self.config.step.cam_iters + 1  # the iteration of that number is the last of the phase

    def make(self) -> None:
        """Train it to its end, from its own newest checkpoint, or the shared one, which is made first if need be.

        Raises:
            InUse: another process is at it, or at the shared start.
            KeyboardInterrupt: a signal ended it; a later call goes on.
        """
        resume, start = "auto", self.start()
        if start is not None and not checkpoint.checkpoints(self.folder):
            resume = str(start.make_start(self._until))
        _train(replace(self.config, resume=resume))

    def make_start(self, until: int) -> Path:
        """Train as far as that -> the checkpoint."""
        path = _at(self.folder, until)
        if not path.is_file():
            _train(replace(self.config, resume="auto"), until)
        return path


def run_of(base: Config, settings: Mapping[str, Any], seed: int) -> Run:
    """The run of a row: the sweep's settings with the row's on top. ``base.out`` is the folder of all runs.

    Raises:
        ConfigError: an unknown setting, or a value that makes no sense.
    """
    base = replace(base, seed=seed)
    config = check(with_settings(base, settings))
    differing = [key for key in settings if _value(config, key) != _value(base, key)]
    words = [f"{key.rpartition('.')[2]}-{_value(config, key)}" for key in differing]
    return _placed("_".join(words) or "default", config, base)


def with_settings(settings: Settings, changes: Mapping[str, Any], prefix: str = "") -> Settings:
    """A copy of a settings dataclass with some values changed, by dotted names; it checks itself. In errors ``prefix``
    stands before the names.

    Raises:
        ConfigError: naming the key.
    """
    inner: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if first not in {item.name for item in dataclasses.fields(settings)}:
            raise ConfigError(f"{prefix}{key}: unknown setting")
        if rest:
            inner.setdefault(first, {})[rest] = value
        else:
            own[first] = tuple(value) if isinstance(value, list) else value
    for name, values in inner.items():
        own[name] = with_settings(getattr(settings, name), values, f"{prefix}{name}.")
    try:
        return replace(settings, **own)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def identity(config: Config) -> str:
    """A word of eight letters for all settings on which the network depends; the data are known by where they lie."""
    values = _that_count(config)
    if not config.eval.every:  # it is scored afterwards only
        del values["eval"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def data_of(config: Config) -> dict[str, Any]:
    """The settings of the data that decide what is learned and scored."""
    return _that_count(config)["data"]


def _that_count(config: Config) -> dict[str, Any]:
    values = to_dict(config)
    for key in _ASIDE:
        section, _, name = key.partition(".")
        (values[section] if name else values).pop(name or section)
    values["data"]["root"] = str(Path(config.data.root).resolve())
    return values


def _placed(name: str, config: Config, base: Config) -> Run:
    short = re.sub(r"[^\w.-]+", "-", name)[:60]
    out = Path(base.out, f"{short}-s{config.seed}-{identity(config)}")
    return Run(name, replace(config, out=str(out)), base)


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


def _at(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:08d}.pt"


def _train(config: Config, until: int | None = None) -> None:
    if train(config, until).interrupted:
        raise KeyboardInterrupt
