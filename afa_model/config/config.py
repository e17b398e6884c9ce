"""All that can be set about a run: the rooms' own settings, put together."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Literal

from ..conventions import require
from ..data.order import LoaderSettings
from ..data.settings import DataSettings
from ..data.transforms import AugmentSettings
from ..errors import ConfigError
from ..evaluation.evaluate import EvaluateSettings
from ..labels.settings import LabelSettings
from ..networks.settings import ModelSettings
from ..runtime.processes import PROCESS_TIMEOUT, check_device
from ..training.losses import LossSettings
from ..training.schedule import OptimSettings, ScheduleSettings
from ..training.step import StepSettings

MOST_SEED = 2**63
"""What torch's generators take, with room for a number per process."""


@dataclass
class EvalSettings(EvaluateSettings):
    """Evaluation, while training and by `afa evaluate`.

    Args:
        every: steps between evaluations while training; 0 evaluates never.
    """

    every: int = 2_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.every >= 0, "every", "at least 0", self.every)


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

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", "at least 1", self.every)
        require(self.pictures_every >= 0, "pictures_every", "at least 0", self.pictures_every)


@dataclass
class CheckpointSettings:
    """When the state of a run is saved.

    Args:
        every: steps between checkpoints (there is always one at the end).
        keep_last: how many of the newest are kept, besides the best.
    """

    every: int = 500
    keep_last: int = 2

    def __post_init__(self) -> None:
        require(self.every >= 1, "every", "at least 1", self.every)
        require(self.keep_last >= 1, "keep_last", "at least 1", self.keep_last)


@dataclass
class Config:
    """The run itself.

    Args:
        out: folder for checkpoints, logs and pictures.
        resume: never, auto (the newest checkpoint in out, if there is one), a checkpoint, or another run's folder (the
            newest in it).
        seed: of weights, dropout, the order of the data and their augmentation.
        device: auto (CUDA if there is one), cpu, cuda or cuda:N.
        amp: auto (bfloat16 where the device is a GPU that has it), bf16 or off.
        channels_last: keep images and convolution weights in channels_last memory format.
        compile: run backbone and decoder through torch.compile while training; auto does on a GPU for which Triton
            compiles, in runs of 1000 steps or more, for it starts slowly.
        cuda_graph: on a GPU, make the pseudo-labels in a CUDA graph; auto does where one can hold them, and where what
            it gives is what the step gives without it.
        process_timeout: minutes that one of several processes waits for another before the run ends with an error.
        data: where the images and labels are.
        augment: how training photographs are varied.
        loader: how they are grouped.
        model: the network.
        labels: how pixel labels are made from image-level ones, in training and evaluation.
        step: what one training step computes.
        loss: the dense energy loss in it.
        optim: the optimizer.
        schedule: length and learning rate.
        eval: evaluation.
        log: logs.
        checkpoint: checkpoints.
    """

    out: str = "runs/voc"
    resume: str = "never"
    seed: int = 0
    device: str = "auto"
    amp: Literal["auto", "bf16", "off"] = "auto"
    channels_last: bool = False
    compile: bool | Literal["auto"] = "auto"
    cuda_graph: bool | Literal["auto"] = "auto"
    process_timeout: float = PROCESS_TIMEOUT
    data: DataSettings = field(default_factory=DataSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    step: StepSettings = field(default_factory=StepSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)


def sections(config: Config) -> dict[str, object]:
    """The parts of a configuration that are settings of their own, by name."""
    parts = {item.name: getattr(config, item.name) for item in dataclasses.fields(Config)}
    return {name: part for name, part in parts.items() if dataclasses.is_dataclass(part)}


# Counts of steps that belong to a schedule, by section.
_COUNTS = {
    "schedule": ("max_iters", "warmup_iters"),
    "step": ("cam_iters", "aff_iters", "contrast_from"),
    "eval": ("every",),
    "log": ("every", "pictures_every"),
    "checkpoint": ("every",),
}


def scaled(config: Config) -> Config:
    """With every count of steps multiplied by ``schedule.scale``, which is 1 then; what happens at all goes on
    happening, and what never does does not.
    """
    scale = config.schedule.scale
    if scale != 1 and 0 < scale < float("inf"):
        for name, counts in _COUNTS.items():
            section = getattr(config, name)
            for count in counts:
                value = getattr(section, count)
                setattr(section, count, max(round(value * scale), min(value, 1)))
        config.schedule.scale = 1.0
    return config


def check(config: Config) -> Config:
    """Refuse values that make no sense: in a section (each checks itself), and between sections.

    Raises:
        ConfigError: naming the key, what was expected and what was given.
    """
    config.out, config.resume = os.path.expanduser(config.out), os.path.expanduser(config.resume)
    for name, part in sections(config).items():
        try:
            getattr(part, "__post_init__", lambda: None)()  # again: values may have been changed since
        except ValueError as error:
            raise ConfigError(f"{name}.{error}") from error
    schedule, step = config.schedule, config.step
    shorter = (
        f"at most schedule.max_iters = {schedule.max_iters} (for a shorter run set all of schedule.max_iters,"
        " schedule.warmup_iters, step.cam_iters and step.aff_iters)"
    )
    try:
        require(0 <= config.seed < MOST_SEED, "seed", f"0 .. {MOST_SEED - 1}", config.seed)
        require(0 < config.process_timeout < 1e6, "process_timeout", "minutes above 0", config.process_timeout)
        check_device(config.device)
        require(bool(config.out), "out", "a folder", config.out)
        graphed = config.cuda_graph is True and step.cam_mode == "train"
        require(not graphed, "cuda_graph", "false with step.cam_mode train, whose noise a graph cannot hold", True)
        crf = config.cuda_graph is True and config.labels.refinement == "crf"
        require(not crf, "cuda_graph", "false with labels.refinement crf, whose sizes vary with the image", True)
        for key, value in (
            ("schedule.warmup_iters", schedule.warmup_iters),
            ("step.cam_iters", step.cam_iters),
            ("step.aff_iters", step.aff_iters),
            ("step.contrast_from", step.contrast_from),
        ):
            require(value <= schedule.max_iters, key, shorter, value)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config
