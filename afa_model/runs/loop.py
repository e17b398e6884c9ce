"""The training loop, one for every data set: when a run logs, draws, evaluates, saves and stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import afa_kernels

from ..config import Config, to_yaml
from ..errors import CheckpointError, ConfigError
from ..runtime.processes import Here, autocast, processes
from ..training.step import StepResult
from . import checkpoint
from .guards import FiniteGuard, Interrupt
from .logs import RunLog, Window
from .memory import keep_freed_memory
from .trainer import NUMBERS, Trainer


@dataclass(frozen=True)
class Summary:
    """What :func:`train` leaves behind.

    Attributes:
        iteration: steps done in all.
        folder: where everything was written.
        checkpoint: the newest checkpoint.
        scores: mIoU (percent) per kind of label of the last evaluation; empty without one.
        interrupted: stopped by a signal before the end.
    """

    iteration: int
    folder: Path
    checkpoint: Path | None
    scores: dict[str, float]
    interrupted: bool = False


def train(config: Config) -> Summary:
    """Train as ``config`` says, afresh or from a checkpoint; checkpoints, logs and pictures go to ``out``.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, naming all that is wrong.
        TrainingError: the loss became NaN or infinite; the batch is saved.
    """
    with processes(config.device) as here:
        if here.device.type == "cpu":
            keep_freed_memory()
        folder = Path(config.out)
        _prepare_folder(config, here)
        found = checkpoint.find(folder, config.resume)
        trainer = Trainer(config, here)
        if found is not None:
            trainer.restore(found[1])
            trainer.notes.insert(0, f"resumed from {found[0]}: {trainer.progress.iteration} steps are done")
        trainer.start()
        if here.device.type == "cuda":
            _prove_kernels(config, here)
        log = RunLog(
            config.out, config.schedule.max_iters, trainer.progress.iteration, here.first, config.log.tensorboard
        )
        with log, Interrupt(active=here.world_size == 1) as interrupt:
            return _Loop(trainer, log, interrupt, found[0] if found else None).run()


def _prepare_folder(config: Config, here: Here) -> None:
    """Refuse to mix two runs in one folder; find out now, not after an hour, that nothing can be written."""
    folder = Path(config.out)
    there = checkpoint.checkpoints(folder)
    if there and config.resume == "never":
        raise ConfigError(
            f"out: {folder} holds a run already ({there[0].name}): --resume auto goes on with it;"
            " or choose another folder"
        )
    if here.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be written: {error}") from error


def _prove_kernels(config: Config, here: Here) -> None:
    """Those of a step prove themselves now: a check has no place in a graph's capture, and delays no step."""
    with autocast(config.amp, here.device):
        half = [torch.get_autocast_dtype(here.device.type)] * torch.is_autocast_enabled(here.device.type)
    operators = ("par", "random_walk", "window_affinity", "attention_affinity_loss")
    afa_kernels.self_check(here.device, operators, [torch.float32, *half], as_needed=True)


class _Loop:
    """What happens around the steps of a run."""

    def __init__(self, trainer: Trainer, log: RunLog, interrupt: Interrupt, newest: Path | None):
        config = trainer.config
        self.trainer, self.log, self.interrupt, self.newest = trainer, log, interrupt, newest
        self.folder, self.total = Path(config.out), config.schedule.max_iters
        self.keeper = checkpoint.CheckpointKeeper(self.folder, config.checkpoint.keep_last)
        self.guard, self.window = FiniteGuard(self.folder, trainer.here.rank), Window()
        self.scores: dict[str, float] = {}

    def run(self) -> Summary:
        """All steps that are left."""
        self._introduce()
        progress = self.trainer.progress
        while progress.iteration < self.total:
            batch, result = self._step()
            stop = self.interrupt.signal is not None
            self._after(batch, result, last=progress.iteration == self.total or stop)
            if stop:
                where = f"step {progress.iteration}; `--resume auto` goes on from here"
                self.log.say(f"stopped by signal {self.interrupt.signal} after {where}")
                return Summary(progress.iteration, self.folder, self.newest, self.scores, interrupted=True)
        self.log.say(f"done: {self.newest}; logs, pictures and config.yaml are in {self.folder}")
        return Summary(progress.iteration, self.folder, self.newest, self.scores)

    def _introduce(self) -> None:
        trainer, config, here = self.trainer, self.trainer.config, self.trainer.here
        count = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
        done = trainer.progress.iteration
        self.log.say(
            f"{config.model.backbone} ({count:.1f} M parameters), {len(trainer.data)} training images,"
            f" labels from {trainer.data.label_source}, {trainer.data.num_classes} classes,"
            f" crop {config.augment.crop}, batch {config.loader.batch_size} x {here.world_size} on {here.device},"
            f" steps {done + 1}..{self.total}"
        )
        for note in trainer.notes:
            self.log.say(note)
        if done >= self.total:
            self.log.say(f"nothing is left to do: schedule.max_iters is {self.total}")

    def _step(self) -> tuple[dict[str, Any], StepResult]:
        """One step, watched and noted. One that is drawn computes all there is to see, also what its phase gives no
        weight.
        """
        trainer, iteration = self.trainer, self.trainer.progress.iteration
        drawn = _every(trainer.config.log.pictures_every, iteration + 1)
        batch, result, numbers = trainer.losses(True if drawn else None)
        self.guard.watch(iteration, batch, numbers)
        rate = trainer.update(numbers["grad_norm"])
        absent = torch.full((), torch.nan, device=trainer.here.device)  # an empty field in the table
        values = {name: numbers.get(name, absent) for name in (*NUMBERS, "grad_norm")}
        self.window.add(trainer.progress.iteration, rate, values)
        return batch, result

    def _after(self, batch: Mapping[str, Any], result: StepResult, last: bool) -> None:
        """Log, picture, evaluation and checkpoint, as far as they are due after a step."""
        trainer, config, log = self.trainer, self.trainer.config, self.log
        done = trainer.progress.iteration
        log.advance(done)
        evaluating = bool(config.eval.every) and (_every(config.eval.every, done) or done == self.total)
        saving = evaluating or _every(config.checkpoint.every, done) or last
        if saving:
            self.guard.settle()
        if saving or _every(config.log.every, done):
            log.train(self.window.flush())
        with self.window.pause():
            if _every(config.log.pictures_every, done) and trainer.here.first:
                log.picture(done, "training", _picture(batch, result, trainer.data.class_names, done))
            better = self._evaluate() if evaluating else False
            if saving:
                self._save(better, must=last)

    def _evaluate(self) -> bool:
        """Whether the model is the best so far."""
        trainer, progress = self.trainer, self.trainer.progress
        with self.log.aside():
            self.scores, image_level = trainer.evaluate()
        self.log.evaluation(progress.iteration, self.scores, trainer.config.labels.refinement, image_level)
        headline = _headline(self.scores)
        better = headline >= progress.best
        progress.best = max(progress.best, headline)
        return better

    def _save(self, is_best: bool, must: bool) -> None:
        """A full disk in the middle of a run is no reason to throw the run away; at its end it is an error."""
        state = self.trainer.state()
        if not self.trainer.here.first:
            return
        try:
            self.newest = self.keeper.save(state, is_best)
        except CheckpointError as error:
            if must:
                raise
            kept = f"; the last good checkpoint is {self.newest}" if self.newest else ""
            self.log.say(f"warning: {error}{kept}; training goes on, the next try is at the next checkpoint")


def _every(steps: int, done: int) -> bool:
    """Whether something that is due every so many steps (0: never) is due after ``done`` of them."""
    return bool(steps) and done % steps == 0


def _headline(scores: Mapping[str, float]) -> float:
    """The score that decides which checkpoint is best: the segmentation's where there is one."""
    value = scores.get("segmentation", max(scores.values(), default=float("-inf")))
    return value if value == value else float("-inf")


def _picture(batch: Mapping[str, Any], result: StepResult, class_names: tuple[str, ...], done: int) -> Any:
    """CAM, pseudo-labels, affinity and prediction of a step, as uint8 [H, W, 3]."""
    from ..pictures import panels  # matplotlib: a second of every process's start, and only the first one draws

    figure = panels.training_panel(
        batch["image"],
        batch["name"],
        batch["cls_labels"],
        class_names,
        cam=result.cam,
        affinity=result.affinity,
        refined_label=result.refined_label,
        aff_label=result.aff_label,
        seg_logits=result.seg_logits,
        title=f"step {done}",
    )
    return panels.to_array(figure)
