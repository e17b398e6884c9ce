"""What a run is made of: data, model, step and optimizer; one step of it, and its state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, from_dict, to_dict
from ..data.classes import other_name
from ..data.datasets import EvaluationSet, TrainingSet
from ..data.held_out import ImageLevelSet, held_out, without_masks
from ..data.order import Batches, training_loader
from ..errors import CheckpointError, ConfigError, DataError
from ..evaluation.evaluate import evaluate
from ..labels.kinds import kinds_of
from ..runtime.collectives import agreeing, gather_from_all, same_as_first
from ..runtime.machine import threads_beside
from ..runtime.precision import autocast
from ..runtime.processes import Here, data_parallel, memory_format, seed_everything, to_device
from ..training.acceleration import compiles, graphs
from ..training.schedule import build_optimizer, learning_rate, set_learning_rate
from ..training.step import StepResult, TrainingStep
from . import checkpoint
from .restore import build_model

# What decides the course of a run: changed at a resume, the losses differ from an uninterrupted run's.
_COURSE = ("seed", "amp", "augment", "loader", "model", "labels", "step", "loss", "optim", "schedule")

_SCORES_ONLY = ("labels.bkg_score", "labels.walk_score")  # but these change what is scored, not what is learned

_NUMBERS = ("loss", "cls_loss", "seg_loss", "aff_loss", "reg_loss", "pos_count", "neg_count")
_AUXILIARY = ("aux_loss", "contrast_loss")  # of a model that has an auxiliary classifier


class Trainer:
    """Data, model, step and optimizer of a run, and how far they have come.

    Attributes:
        model: the network itself, on its device.
        learning: the parameters that the optimizer changes.
        progress: steps done, best score.
        compiles, graphs: whether the networks are compiled, and pseudo-labels made in a CUDA graph.
        numbers: the names of what every step is to be logged with, beside its gradient's norm.
        notes: what a resume found, or what is odd about the run, for the log.
        owes_evaluation: one that was due after the last step was given up.
    """

    def __init__(self, config: Config, here: Here):
        self.config, self.here = config, here
        with agreeing():
            self.data, self.validation, note = open_data(config)
            seed_everything(config.seed)  # the same starting weights in every process
            self.model = self._place(build_model(config, self.data.num_classes))
            if self.validation is not None and self.validation.has_masks:
                self._check_kinds()  # now, not at the first evaluation
        optim = config.optim
        self.optimizer = build_optimizer(
            self.model, optim.lr, optim.weight_decay, optim.betas, optim.head_multiplier, optim.freeze_norms
        )
        groups = self.optimizer.param_groups
        self.learning = [p for group in groups if group["lr_scale"] > 0 for p in group["params"]]
        self.compiles = compiles(config.compile, here.device, config.schedule.max_iters)
        self.graphs = graphs(config.cuda_graph, here.device, config.step.cam_mode, config.labels.refinement)
        step = TrainingStep(
            self.model,
            config.step,
            config.labels,
            loss=config.loss,
            max_classes=int(self.data.labels.sum(1).max()),
            compile=self.compiles,
            cuda_graph=self.graphs,
            falls_back=[name for name in ("compile", "cuda_graph") if getattr(config, name) == "auto"],
        )
        self.step = data_parallel(step, here)
        self.progress = checkpoint.Progress()
        self.numbers = (*_NUMBERS, *(_AUXILIARY if self.model.aux_classifier is not None else ()))
        self.notes: list[str] = [note, *_about_frozen(config)] if note else _about_frozen(config)
        self.owes_evaluation = False
        self.batches: Batches | None = None
        seed_everything(config.seed + here.rank)  # dropout differs between processes

    def _check_kinds(self) -> None:
        try:
            kinds_of(self.model, self.config.eval.kinds, self.config.eval.crf)
        except ValueError as error:
            raise ConfigError(f"eval.{error}") from error

    def _place(self, model: nn.Module) -> nn.Module:
        here = self.here
        if here.world_size > 1 and here.device.type == "cuda":  # torch has no synchronised batch norm on the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(here.device, memory_format=memory_format(self.config.channels_last)).train()

    def state(self) -> dict[str, Any]:
        """The contents of a checkpoint. Every process must call this."""
        states = gather_from_all(checkpoint.random_state())
        config = to_dict(self.config)
        state = checkpoint.pack(self.model, self.optimizer, self.progress, states, config, self.data.class_names)
        return {**state, "owes_evaluation": self.owes_evaluation}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the contents of a checkpoint.

        Raises:
            CheckpointError: it is of another model, or of other classes.
        """
        differs = other_name(state["class_names"], self.data.class_names)
        if differs is not None:
            raise CheckpointError(
                f"{differs} ({self.config.data.root}): a run goes on with the classes it began with; start another"
            )
        self.progress = checkpoint.unpack(state, self.model, self.optimizer)
        self.owes_evaluation = bool(state.get("owes_evaluation")) and self.validation is not None
        states = state["random"]
        if len(states) == self.here.world_size:
            checkpoint.set_random_state(states[self.here.rank])
        else:
            self.notes.append(
                f"warning: the checkpoint is from {len(states)} process(es), this run has"
                f" {self.here.world_size}: it goes on, but not to the same losses"
            )
        try:
            before = to_dict(from_dict(state["config"]))  # with the names and what else there is to set today
        except ConfigError as error:
            raise CheckpointError(f"the checkpoint's settings do not fit this version of afa: {error}") from error
        now = to_dict(self.config)
        if any(_scoring(before[key]) != _scoring(now[key]) for key in ("eval", "labels")):
            self.progress.best = float("-inf")
            self.notes.append("evaluation is another than the checkpoint's: the best so far does not count")
        changed = list(_differences(before, now))
        if changed:
            self.notes.append("warning: changed since the checkpoint: " + ", ".join(changed))

    def start(self) -> None:
        """The data, from the step on that comes next.

        Raises:
            CheckpointError: the processes stand at different steps.
            DataError: they see different images or labels.
        """
        places = gather_from_all(self.progress.iteration)
        if len(set(places)) > 1:
            raise CheckpointError(
                f"the processes found checkpoints of different steps ({places}): out must be a shared folder"
            )
        labels = self.data.labels.numpy().tobytes()
        content = hashlib.sha256("\n".join(self.data.names).encode() + labels).hexdigest()
        if len(set(gather_from_all(content))) > 1:
            raise DataError(
                f"the processes see different data: {gather_from_all(len(self.data))} training images, or other names"
                f" or labels of them ({self.config.data.root} of each machine)"
            )
        threads = threads_beside(self.config.data.num_workers)
        if self.here.device.type == "cpu" and threads is not None:
            torch.set_num_threads(threads)
        loader = training_loader(
            self.data,
            self.config.loader.batch_size,
            self.config.seed,
            rank=self.here.rank,
            world_size=self.here.world_size,
            start_iteration=self.progress.iteration,
            pin_memory=self.here.device.type == "cuda",
        )
        with checkpoint.kept_random_state():
            self.batches = iter(loader)

    def close(self) -> None:
        """No further batches are wanted."""
        if self.batches is not None:
            self.batches.close()

    def losses(self, everything: bool | None = None) -> tuple[dict[str, Any], StepResult, dict[str, Tensor]]:
        """First half of a step: a batch, what the step makes of it, and its numbers; gradients are there after it.

        everything: compute also what the phase gives no weight, to be looked at.
        """
        batch = to_device(next(self.batches), self.here.device, self.config.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.config.amp, self.here.device):
            result = self.step(batch, self.progress.iteration, everything)
        result.loss.backward()
        numbers = {name: getattr(result, name) for name in self.numbers if getattr(result, name) is not None}
        norm = nn.utils.get_total_norm([p.grad for p in self.learning if p.grad is not None])
        return batch, result, {**numbers, "grad_norm": norm}

    def update(self, grad_norm: Tensor) -> float:
        """Second half: change the weights -> the learning rate it was done with."""
        optim, schedule = self.config.optim, self.config.schedule
        rate = learning_rate(
            self.progress.iteration,
            schedule.max_iters,
            optim.lr,
            schedule.warmup_iters,
            schedule.warmup_ratio,
            schedule.power,
        )
        set_learning_rate(self.optimizer, rate)
        if optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.learning, optim.clip_norm, grad_norm)
        self.optimizer.step()
        self.progress.iteration += 1
        return rate

    def evaluate(self, stop: Callable[[], bool]) -> tuple[dict[str, float], dict[str, float]] | None:
        """On the validation images mIoU of every kind of label map; F1 and mAP of the classifier; all in percent.
        None if in some process ``stop`` said so before the end.
        """
        # Where batch norm is not synchronised each process has statistics of its own; a checkpoint has the first one's.
        same_as_first(self.model.buffers())
        with checkpoint.kept_random_state():
            settings = self.config.eval.by("training")
            result = evaluate(self.model, self.validation, settings, self.config.labels, stop)
        if result is None:
            return None
        miou = {kind: 100 * scores.miou for kind, scores in result.scores.items()}
        return miou, {name: 100 * value for name, value in result.image_level.items()}


def open_data(config: Config) -> tuple[TrainingSet, EvaluationSet | ImageLevelSet | None, str]:
    """Both splits, and what is to be told of them; what is wrong with either is told in one go.

    Raises:
        DataError: naming every file that is missing or broken.
    """
    data, every = config.data, config.eval.every
    if every and without_masks(data):
        training, scored, which = held_out(data, TrainingSet(data, config.augment))
        note = f"{data.root} has no masks to score against, as if eval.every were 0"
        if scored is not None:
            note += f"; every {every} steps the classifier is scored on {which}"
        return training, scored, note
    errors: list[DataError] = []
    opened: list[Any] = [None, None]
    for number, make in enumerate((lambda: TrainingSet(data, config.augment), lambda: EvaluationSet(data))):
        if number == 1 and not every:
            continue
        try:
            opened[number] = make()
        except DataError as error:
            if str(error) not in map(str, errors):  # a root that is not there is one mistake, not two
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else DataError("\n".join(map(str, errors)))
    return opened[0], opened[1], ""


def _about_frozen(config: Config) -> list[str]:
    """What is to be told of a backbone that does not learn."""
    model, notes = config.model, []
    if model.freeze_backbone and not model.pretrained:
        notes.append(
            "warning: the backbone is frozen (model.freeze_backbone) and has no weights (model.pretrained): it stays as"
            " it was drawn, at random"
        )
    if model.freeze_backbone and model.aux_layer is not None and config.step.contrast_weight > 0:
        notes.append("the backbone is frozen: its tokens do not learn, and step.contrast_weight has no effect")
    return notes


def _scoring(section: Mapping[str, Any]) -> dict[str, Any]:
    """What of a section's settings changes the scores of an evaluation."""
    aside = ("every", "num_workers", "progress", "batch", "channels_last")
    return {name: value for name, value in section.items() if name not in aside}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Any:
    for key in new:
        if not prefix and key not in _COURSE:
            continue
        if isinstance(new[key], Mapping):
            yield from _differences(old.get(key) or {}, new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key] and prefix + key not in _SCORES_ONLY:
            yield f"{prefix}{key} {old.get(key)} -> {new[key]}"
