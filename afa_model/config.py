"""All that can be set about a run: typed settings, read from YAML and dotted options, checked before use."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from .errors import ConfigError
from .evaluate import EvaluateSettings
from .step import StepSettings
from .transforms import AugmentSettings
from .voc import DataSettings

Settings = TypeVar("Settings")

CONFIG_FOLDER = Path(__file__).parent / "configs"


@dataclass
class ModelSettings:
    """The network.

    Args:
        backbone: mit_b0 ... mit_b5, or a timm CNN such as resnet50 (gives CAMs only: the paper's baseline).
        pretrained: file with ImageNet weights of the backbone (mit_b1.pth, or in Hugging Face's layout of
            nvidia/mit-b1); false trains from scratch, true lets timm fetch them.
        stride: of the four patch embeddings. Their product is the grid of CAM and affinity: 16 pixels.
        pooling: what turns class maps into class scores: global maximum (gmp) or average (gap).
    """

    backbone: str = "mit_b1"
    pretrained: bool | str = False
    stride: tuple[int, int, int, int] = (4, 2, 2, 1)
    pooling: Literal["gmp", "gap"] = "gmp"


@dataclass
class OptimSettings:
    """AdamW. The backbone's norm layers are frozen.

    Args:
        lr: learning rate of the backbone.
        head_multiplier: the classifier, affinity head and decoder learn this many times faster.
        weight_decay: of all weights but the norms'.
        betas: decay rates of AdamW's running averages.
        clip_norm: gradients longer than this are scaled down to it; null leaves them as they are.
    """

    lr: float = 6e-5
    head_multiplier: float = 10.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None


@dataclass
class ScheduleSettings:
    """Learning rate over the iterations: linear warm-up, then polynomial decay to 0.

    Args:
        max_iters: length of the training, in steps.
        warmup_iters: length of the warm-up, in steps.
        warmup_ratio: the warm-up starts from this times the learning rate.
        power: of the decay; 1 is linear.
    """

    max_iters: int = 20_000
    warmup_iters: int = 1_500
    warmup_ratio: float = 1e-6
    power: float = 1.0


@dataclass
class LoaderSettings:
    """How training images are grouped.

    Args:
        batch_size: images per step and process (the published run: 2 on each of 2 GPUs).
    """

    batch_size: int = 2


@dataclass
class EvalSettings(EvaluateSettings):
    """Evaluation, while training and by `afa evaluate`.

    Args:
        every: steps between evaluations while training; 0 evaluates never.
    """

    every: int = 2_000


@dataclass
class LogSettings:
    """What a run writes about itself.

    Args:
        every: steps between lines on the screen and points in TensorBoard (train.csv has every step).
        pictures_every: steps between pictures of CAM, pseudo-labels, affinity and prediction; 0 draws none.
        tensorboard: write TensorBoard files.
    """

    every: int = 50
    pictures_every: int = 500
    tensorboard: bool = True


@dataclass
class CheckpointSettings:
    """When the state of a run is saved.

    Args:
        every: steps between checkpoints (there is always one at the end).
        keep_last: how many of the newest are kept, besides the best.
    """

    every: int = 500
    keep_last: int = 2


@dataclass
class Config:
    """The run itself.

    Args:
        out: folder for checkpoints, logs and pictures.
        resume: never, auto (the newest checkpoint in out, if there is one) or the path of a checkpoint.
        seed: of weights, dropout, the order of the data and their augmentation.
        device: auto (CUDA if there is one), cpu or cuda.
        amp: auto (bfloat16 where the device is a GPU that has it), bf16 or off.
        channels_last: keep images and convolution weights in channels_last memory format.
        compile: run backbone and decoder through torch.compile while training (for GPUs; starts slowly).
        cuda_graph: on a GPU, make the pseudo-labels in a CUDA graph.
        data: where the images and labels are.
        augment: how training photographs are varied.
        loader: how they are grouped.
        model: the network.
        step: what one training step computes.
        optim: the optimizer.
        schedule: length and learning rate.
        eval: evaluation.
        log: logs.
        checkpoint: checkpoints.
    """

    out: str = "runs/voc"
    resume: str = "never"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "bf16", "off"] = "auto"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    step: StepSettings = field(default_factory=StepSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


def check(config: Config) -> Config:
    """Refuse values that make no sense.

    Raises:
        ConfigError: naming the key, what was expected and what was given.
    """

    def require(condition: bool, key: str, expected: str) -> None:
        if not condition:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{key}: expected {expected}, got {value!r}")

    def at_least(least: float, *keys: str) -> None:
        for key in keys:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, name)
            require(value is None or value >= least, key, f"at least {least}")

    optim, schedule, step = config.optim, config.schedule, config.step
    at_least(0, "seed", "data.num_workers", "optim.weight_decay", "schedule.warmup_iters", "schedule.power")
    at_least(0, "eval.every", "log.pictures_every")
    at_least(
        1, "loader.batch_size", "schedule.max_iters", "log.every", "checkpoint.every", "checkpoint.keep_last"
    )
    at_least(1, "eval.limit", "eval.radius")
    at_least(0, "eval.num_workers", "eval.par_iterations")
    at_least(32, "eval.long_side")
    require(0 < optim.lr < float("inf"), "optim.lr", "a positive number")
    require(optim.head_multiplier > 0, "optim.head_multiplier", "a positive number")
    require(optim.clip_norm is None or optim.clip_norm > 0, "optim.clip_norm", "a positive number or null")
    require(all(0 <= beta < 1 for beta in optim.betas), "optim.betas", "numbers in 0..1 (1 not included)")
    require(0 < schedule.warmup_ratio <= 1, "schedule.warmup_ratio", "a number in 0..1 (0 not included)")
    require(all(stride >= 1 for stride in config.model.stride), "model.stride", "four numbers of at least 1")
    require(len(config.eval.scales) > 0 and min(config.eval.scales) > 0, "eval.scales", "positive numbers")
    require(len(step.cam_scales) > 0 and min(step.cam_scales) > 0, "step.cam_scales", "positive numbers")
    require(bool(config.out), "out", "a folder")

    shorter = (
        f"at most schedule.max_iters = {schedule.max_iters} (for a shorter run set all of schedule.max_iters,"
        " schedule.warmup_iters, step.cam_iters and step.aff_iters)"
    )
    require(schedule.warmup_iters <= schedule.max_iters, "schedule.warmup_iters", shorter)
    require(0 <= step.cam_iters <= schedule.max_iters, "step.cam_iters", shorter)
    require(0 <= step.aff_iters <= schedule.max_iters, "step.aff_iters", shorter)
    require(step.cam_iters <= step.aff_iters, "step.aff_iters", f"at least step.cam_iters = {step.cam_iters}")
    return config


class Parser(ArgumentParser):
    """Raises errors as ConfigError, in one line that names the key; suggests one for an unknown key."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments, allow_abbrev=False)  # a shortened key is an unknown key

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(self._readable(str(message))) from ex

    def format_help(self) -> str:
        """Docstrings mark code with double backquotes; a terminal shows it plain."""
        return super().format_help().replace("``", "")

    def _readable(self, message: str) -> str:
        """jsonargparse's words, with the key in front."""
        if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            return self._unknown(f"{match[1]}.{match[2]}")
        if match := re.search(r"unrecognized arguments: --([^\s=]+)", message):
            return self._unknown(match[1])
        if match := re.search(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)", message):
            return self._unknown(match[1])
        wrong_type = r'Parser key "([\w.]+)":\s*Expected (?:a |an )?(.*?)\. Got value: (.*)'
        if match := re.search(wrong_type, message, re.S):
            wanted = re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
            hint = " (a list is written [1, 0.5])" if "tuple" in wanted else ""
            return f"{match[1]}: expected {wanted}, got {match[3].strip()}{hint}"
        return " ".join(message.split())

    def _unknown(self, key: str) -> str:
        known = [action.dest for action in self._actions]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
        return f"{key}: unknown setting" + (f" (did you mean {near[0]}?)" if near else "")


def parser(prog: str, description: str, defaults: Mapping[str, Any] | None = None) -> ArgumentParser:
    """A parser that knows ``--config FILE|NAME``, ``--print_config`` and a dotted option for every setting.

    Args:
        defaults: nested settings to start from instead of the built-in ones (those of a checkpoint).
    """
    usage = f"{prog} [--config FILE|NAME] [--SECTION.KEY VALUE ...]"
    result = Parser(prog=prog, usage=usage, description=description)
    result.add_argument(
        "--config", action="config", help=f"YAML file, or the name of a packaged one: {', '.join(packaged())}"
    )
    result.add_class_arguments(Config)
    if defaults:
        result.set_defaults(_flatten(defaults))
    return result


def packaged() -> list[str]:
    """Names of the configurations that come with the project."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(name: str) -> str:
    """The file ``name`` stands for: a path, or (with or without ``.yaml``) a packaged configuration.

    Raises:
        ConfigError: there is neither.
    """
    if Path(name).is_file():
        return name
    known = CONFIG_FOLDER / f"{Path(name).stem}.yaml"
    if Path(name).name == name and known.is_file():
        return str(known)
    raise ConfigError(
        f"config: no file {name!r}, and no packaged configuration of that name ({', '.join(packaged())})"
    )


def resolve_config_names(argv: Sequence[str]) -> list[str]:
    """``argv`` with the names after ``--config`` replaced by the files they stand for."""
    result, previous = [], ""
    for word in argv:
        if previous == "--config":
            word = find_config(word)
        elif word.startswith("--config="):
            word = "--config=" + find_config(word.removeprefix("--config="))
        result.append(word)
        previous = word
    return result


def build(settings: Namespace) -> Config:
    """Parsed settings -> checked :class:`Config`.

    Raises:
        ConfigError: a value makes no sense.
    """
    values = {item.name: settings[item.name] for item in dataclasses.fields(Config)}
    for name, value in values.items():
        kind = type(getattr(Config(), name))
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{name}: expected settings ({name}.KEY), got {value!r}")
            values[name] = section(kind, value, f"{name}.")
    _refuse_null(Config, values, "")
    return check(Config(**values))


def section(kind: type[Settings], values: Namespace, prefix: str = "") -> Settings:
    """Parsed values -> a settings dataclass, whose own checks do not know the key it stands under.

    Raises:
        ConfigError: a value makes no sense; ``prefix`` is put before the message.
    """
    _refuse_null(kind, values.as_dict(), prefix)
    try:
        return kind(**values.as_dict())
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{prefix}{error}") from error


def _refuse_null(kind: type, values: Mapping[str, Any], prefix: str) -> None:
    """jsonargparse takes null for "not given" whatever the type; only a type with None in it may be null."""
    types = get_type_hints(kind)
    for name, value in values.items():
        if value is None and type(None) not in get_args(types[name]):
            raise ConfigError(
                f"{prefix}{name}: expected {getattr(types[name], '__name__', types[name])}, got null"
            )


def parse(
    argv: Sequence[str],
    prog: str = "afa train",
    description: str = "",
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Command line -> checked :class:`Config`. ``--help`` and ``--print_config`` print and exit.

    Raises:
        ConfigError: an unknown setting, a wrong type, a value that makes no sense; the message names the key.
    """
    return build(parser(prog, description, defaults).parse_args(resolve_config_names(argv)))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data (for YAML and checkpoints)."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The reverse of :func:`to_dict`, with every check of :func:`parse`."""
    return build(parser("afa", "").parse_object(dict(values)))


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that ``--config`` reads."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
