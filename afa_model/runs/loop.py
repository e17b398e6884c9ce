"""The training loop, one for every data set: when a run logs, draws, evaluates, saves and stops."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import afa_kernels

from ..config import Config
from ..data.order import death_told
from ..errors import CheckpointError
from ..runtime.collectives import agreeing, gather_from_all
from ..runtime.precision import autocast
from ..runtime.processes import Here, processes
from ..training.step import StepResult
from . import checkpoint
from .folder import RunFolder
from .guards import FiniteGuard, Interrupt, same_in_all
from .logs import RunLog, Window
from .memory import keep_freed_memory
from .trainer import Trainer


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


def train(config: Config, until: int | None = None) -> Summary:
    """Train as ``config`` says, afresh or from a checkpoint; checkpoints, logs and pictures go to ``out``. Where the
    data set was prepared without masks nothing is evaluated.

    Args:
        config: of the run.
        until: end after so many steps of the schedule, with a checkpoint from which runs that differ only later
            branch off; None: all of them.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, naming all that is wrong (InUse: another run is
            at work in ``out``).
        TrainingError: the loss became NaN or infinite; the batch is saved.
        ProcessError: another process ended, or did not answer in time.
    """
    with processes(config.device, config.process_timeout) as here:
        if here.device.type == "cpu":
            keep_freed_memory()
        same_in_all(config)
        with agreeing():
            folder = RunFolder(config, here.first)
        with folder, death_told():
            return _train_in(folder, here, until)


def _train_in(folder: RunFolder, here: Here, until: int | None) -> Summary:
    config = folder.config
    with agreeing():
        found = checkpoint.find(folder.path, config.resume)
    trainer = Trainer(config, here)
    trainer.notes.extend(folder.notes)
    if found is not None:
        with agreeing():
            trainer.restore(found.state)
        trainer.notes.insert(0, f"resumed from {found.path}: {trainer.progress.iteration} steps are done")
        trainer.notes.extend(f"warning: passed over, {problem}" for problem in found.unreadable.values())
    with Interrupt(here) as interrupt, contextlib.closing(trainer):
        trainer.start()
        if here.device.type == "cuda":
            _prove_kernels(config, here)
        total = config.schedule.max_iters if until is None else min(until, config.schedule.max_iters)
        begins = trainer.progress.iteration < total or found is None
        with agreeing():
            folder.accept(writes=here.first and begins)
        with RunLog(config.out, total, trainer.progress.iteration, here.first, config.log.tensorboard) as log:
            return _Loop(trainer, log, interrupt, found, total).run()


def _prove_kernels(config: Config, here: Here) -> None:
    """Those of a step prove themselves now: a check has no place in a graph's capture, and delays no step."""
    with autocast(config.amp, here.device):
        half = [torch.get_autocast_dtype(here.device.type)] * torch.is_autocast_enabled(here.device.type)
    operators = ("par", "random_walk", "window_affinity", "attention_affinity_loss")
    afa_kernels.self_check(here.device, operators, [torch.float32, *half], as_needed=True)


class _Loop:
    """What happens around the steps of a run."""

    def __init__(
        self, trainer: Trainer, log: RunLog, interrupt: Interrupt, found: checkpoint.Found | None, total: int
    ):
        config = trainer.config
        self.trainer, self.log, self.interrupt = trainer, log, interrupt
        self.newest = found.path if found else None
        self.folder, self.total = Path(config.out), total
        self.begun, self.saved = trainer.progress.iteration, trainer.progress.iteration
        unreadable = found.unreadable if found else ()
        self.keeper = checkpoint.CheckpointKeeper(self.folder, config.checkpoint.keep_last, unreadable)
        self.guard, self.window = FiniteGuard(self.folder, trainer.here.rank), Window()
        self.scores: dict[str, float] = {}
        self.cause = 0

    def run(self) -> Summary:
        """All steps that are left."""
        self._introduce()
        progress = self.trainer.progress
        if self.trainer.owes_evaluation:
            self._save(self._evaluate(), must=False)
        while progress.iteration < self.total and not self._stop():
            self._after(*self._step())
        if progress.iteration < self.total or self.trainer.owes_evaluation:
            return self._stopped()
        self.log.say(f"done: {self.newest}; logs, pictures and config.yaml are in {self.folder}")
        return Summary(progress.iteration, self.folder, self.newest, self.scores)

    def _stop(self) -> bool:
        """Whether the run is to stop before its next step; the same in all processes."""
        self.cause = self.interrupt.agreed()
        return bool(self.cause) or self.trainer.owes_evaluation

    def _stopped(self) -> Summary:
        """Save what there is."""
        self.interrupt.obeyed = True
        done = self.trainer.progress.iteration
        cause = max(gather_from_all(self.cause or self.interrupt.cause))
        if done > self.begun:
            self.guard.settle()
            self.log.train(self.window.flush())
            self._save(False, must=True)
        why = "as its launcher is gone" if cause == Interrupt.LAUNCHER_GONE else f"by signal {cause}"
        self.log.say(f"stopped {why} after step {done}; `--resume auto` goes on from here")
        return Summary(done, self.folder, self.newest, self.scores, interrupted=True)

    def _introduce(self) -> None:
        trainer, config, here = self.trainer, self.trainer.config, self.trainer.here
        count = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
        done = trainer.progress.iteration
        with autocast(config.amp, here.device):
            half = torch.is_autocast_enabled(here.device.type)
        fast = (("bf16", half), ("compiled", trainer.compiles), ("CUDA graph", trainer.graphs))
        ways = ", ".join(name for name, used in fast if used)
        how = f" ({ways})" if ways else ""
        self.log.say(
            f"{config.model.backbone} ({count:.1f} M parameters), {len(trainer.data)} training images,"
            f" labels from {trainer.data.label_source}, {trainer.data.num_classes} classes,"
            f" crop {config.augment.crop}, batch {config.loader.batch_size} x {here.world_size} on {here.device}{how},"
            f" steps {done + 1}..{self.total}"
        )
        for note in trainer.notes:
            self.log.say(note)
        if done >= self.total:
            self.log.say(f"nothing is left to do: the run has {self.total} steps")

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
        values = {name: numbers.get(name, absent) for name in (*trainer.numbers, "grad_norm")}
        self.window.add(trainer.progress.iteration, rate, values)
        return batch, result

    def _after(self, batch: Mapping[str, Any], result: StepResult) -> None:
        """Log, picture, evaluation and checkpoint, as far as they are due after a step."""
        trainer, config, log = self.trainer, self.trainer.config, self.log
        done = trainer.progress.iteration
        last = done == self.total
        log.advance(done)
        evaluating = trainer.validation is not None and (_every(config.eval.every, done) or last)
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
        """Whether the model is the best so far. A signal ends it, and the run owes it then."""
        trainer, progress = self.trainer, self.trainer.progress
        with self.log.aside():
            found = trainer.evaluate(self.interrupt.asked)
        trainer.owes_evaluation = found is None
        if found is None:
            return False
        self.scores, image_level = found
        self.log.evaluation(progress.iteration, self.scores, trainer.config.labels.refinement, image_level)
        headline = _headline(self.scores or {"classifier": image_level["map"]})
        better = headline >= progress.best
        progress.best = max(progress.best, headline)
        return better

    def _save(self, is_best: bool, must: bool) -> None:
        """A full disk in the middle of a run is no reason to throw the run away; at its end it is an error.

        Then no process leaves before the first has written: launchers take one that ends for a sign to end the others.
        """
        state = self.trainer.state()
        with agreeing() if must else contextlib.nullcontext():
            if self.trainer.here.first:
                self._write(state, is_best, must)

    def _write(self, state: dict[str, Any], is_best: bool, must: bool) -> None:
        done = self.trainer.progress.iteration
        if must and done == self.saved and not is_best:
            return
        try:
            self.newest = self.keeper.save(state, is_best)
            self.saved = done
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
