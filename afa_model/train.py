"""The training loop, one for every data set: `afa train`; on several GPUs `torchrun -m afa_model.train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import afa_kernels

from . import checkpoint
from .config import Config, parse, to_dict, to_yaml
from .errors import ConfigError
from .evaluate import evaluate
from .guards import FiniteGuard, Interrupt, TrainingError
from .logs import RunLog, Window
from .memory import keep_freed_memory
from .processes import Here, autocast, data_parallel, gather_from_all, processes, seed_everything, to_device
from .restore import build_model
from .schedule import build_optimizer, learning_rate, set_learning_rate
from .step import StepResult, TrainingStep
from .voc import EvaluationSet, TrainingSet, training_loader
from .voc_files import DataError

# What decides the course of a run: changed at a resume, the losses differ from an uninterrupted run's.
_COURSE = ("seed", "amp", "augment", "loader", "model", "step", "optim", "schedule")

_NUMBERS = ("loss", "cls_loss", "seg_loss", "aff_loss", "pos_count", "neg_count")


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


class _StepModule(nn.Module):
    """The training step as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, step: TrainingStep):
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, batch: Mapping[str, Any], iteration: int, everything: bool | None) -> StepResult:
        return self.step(batch, iteration, everything)


class Trainer:
    """Everything a run is made of: data, model, step, optimizer, and where it stands."""

    def __init__(self, config: Config, here: Here):
        self.config, self.here = config, here
        self.folder = Path(config.out)
        _prepare_folder(config, here)
        found = checkpoint.find(self.folder, config.resume)

        self.data, self.validation = _open_data(config)

        seed_everything(config.seed)  # the same starting weights in every process
        model = build_model(config, self.data.num_classes)
        if here.world_size > 1 and here.device.type == "cuda":  # torch has no synchronised batch norm on the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(here.device, memory_format=memory_format).train()
        self.optimizer = build_optimizer(
            self.model,
            config.optim.lr,
            config.optim.weight_decay,
            config.optim.betas,
            config.optim.head_multiplier,
        )
        groups = self.optimizer.param_groups
        self.learning = [p for group in groups if group["lr_scale"] > 0 for p in group["params"]]
        step = TrainingStep(
            self.model,
            config.step,
            max_classes=int(self.data.labels.sum(1).max()),
            compile=config.compile,
            cuda_graph=config.cuda_graph,
        )
        self.step = data_parallel(_StepModule(self.model, step), here)

        self.progress = checkpoint.Progress()
        self.keeper = checkpoint.CheckpointKeeper(self.folder, config.checkpoint.keep_last)
        self.newest: Path | None = None
        self.notes: list[str] = []
        seed_everything(config.seed + here.rank)  # dropout differs between processes
        if found is not None:
            self._resume(*found)
        places = gather_from_all(self.progress.iteration)
        if len(set(places)) > 1:
            raise checkpoint.CheckpointError(
                f"the processes found checkpoints of different steps ({places}): out must be a shared folder"
            )

        loader = training_loader(
            self.data,
            config.loader.batch_size,
            config.seed,
            rank=here.rank,
            world_size=here.world_size,
            start_iteration=self.progress.iteration,
            pin_memory=here.device.type == "cuda",
        )
        with checkpoint.kept_random_state():
            self.batches = iter(loader)

    def _resume(self, path: Path, state: dict[str, Any]) -> None:
        self.progress = checkpoint.unpack(state, self.model, self.optimizer)
        self.newest = path
        self.notes.append(f"resumed from {path}: {self.progress.iteration} steps are done")
        states = state["random"]
        if len(states) == self.here.world_size:
            checkpoint.set_random_state(states[self.here.rank])
        else:
            self.notes.append(
                f"warning: the checkpoint is from {len(states)} process(es), this run has"
                f" {self.here.world_size}: it goes on, but not to the same losses"
            )
        changed = list(_differences(state["config"], to_dict(self.config)))
        if changed:
            self.notes.append("warning: changed since the checkpoint: " + ", ".join(changed))

    def train_step(self, window: Window, guard: FiniteGuard) -> tuple[dict[str, Any], StepResult]:
        """One step: batch, losses, gradients, weights.

        A step that is drawn computes all there is to see, also what its phase gives no weight.
        """
        config, iteration = self.config, self.progress.iteration
        drawn = bool(config.log.pictures_every) and (iteration + 1) % config.log.pictures_every == 0
        batch = to_device(next(self.batches), self.here.device, config.channels_last)
        schedule = config.schedule
        lr = learning_rate(
            iteration,
            schedule.max_iters,
            config.optim.lr,
            schedule.warmup_iters,
            schedule.warmup_ratio,
            schedule.power,
        )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(config.amp, self.here.device):
            result = self.step(batch, iteration, True if drawn else None)
        result.loss.backward()
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.learning if p.grad is not None])
        if config.optim.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.learning, config.optim.clip_norm, grad_norm)
        computed = {name: getattr(result, name) for name in _NUMBERS if getattr(result, name) is not None}
        guard.watch(iteration, batch, computed, grad_norm)
        self.optimizer.step()
        self.progress.iteration += 1
        absent = torch.full((), torch.nan, device=self.here.device)  # an empty field in the table
        values = {name: computed.get(name, absent) for name in _NUMBERS}
        window.add(self.progress.iteration, lr, {**values, "grad_norm": grad_norm})
        return batch, result

    def evaluate(self) -> dict[str, float]:
        """mIoU (percent) of every kind of label map on the validation images."""
        with checkpoint.kept_random_state():
            result = evaluate(self.model, self.validation, self.config.eval)
        return {kind: 100 * scores.miou for kind, scores in result.scores.items()}

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint (the first process does; all of them must call this)."""
        states = gather_from_all(checkpoint.random_state())
        if self.here.first:
            state = checkpoint.pack(
                self.model, self.optimizer, self.progress, states, to_dict(self.config), self.data.class_names
            )
            self.newest = self.keeper.save(state, is_best)

    def picture(self, batch: Mapping[str, Any], result: StepResult) -> Any:
        """CAM, pseudo-labels, affinity and prediction of a step, as uint8 [H, W, 3]."""
        from . import pictures  # matplotlib: a second of every process's start, and only the first one draws

        figure = pictures.training_panel(
            batch["image"],
            batch["name"],
            batch["cls_labels"],
            self.data.class_names,
            cam=result.cam,
            affinity=result.affinity,
            refined_label=result.refined_label,
            aff_label=result.aff_label,
            seg_logits=result.seg_logits,
            title=f"step {self.progress.iteration}",
        )
        return pictures.to_array(figure)


def _open_data(config: Config) -> tuple[TrainingSet, EvaluationSet | None]:
    """Both splits; what is wrong with either is told in one go.

    Raises:
        DataError: naming every file that is missing or broken.
    """
    errors: list[DataError] = []
    opened: list[Any] = [None, None]
    for number, make in enumerate(
        (lambda: TrainingSet(config.data, config.augment), lambda: EvaluationSet(config.data))
    ):
        if number == 1 and not config.eval.every:
            continue
        try:
            opened[number] = make()
        except DataError as error:
            if str(error) not in map(str, errors):  # a root that is not there is one mistake, not two
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else DataError("\n".join(map(str, errors)))
    return opened[0], opened[1]


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


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Any:
    for key in new:
        if not prefix and key not in _COURSE:
            continue
        if isinstance(new[key], Mapping):
            yield from _differences(old.get(key) or {}, new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            yield f"{prefix}{key} {old.get(key)} -> {new[key]}"


def train(config: Config) -> Summary:
    """Train as ``config`` says, afresh or from a checkpoint; checkpoints, logs and pictures go to ``out``.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step, naming all that is wrong.
        TrainingError: the loss became NaN or infinite; the batch is saved.
    """
    with processes(config.device) as here:
        if here.device.type == "cpu":
            keep_freed_memory()
        trainer = Trainer(config, here)
        if here.device.type == "cuda":
            _prove_kernels(config, here)
        log = RunLog(
            config.out,
            config.schedule.max_iters,
            trainer.progress.iteration,
            here.first,
            config.log.tensorboard,
        )
        with log, Interrupt(active=here.world_size == 1) as interrupt:
            return _run(trainer, log, interrupt)


def _prove_kernels(config: Config, here: Here) -> None:
    """Those of a step prove themselves now: a check has no place in a graph's capture, and delays no step."""
    with autocast(config.amp, here.device):
        half = [torch.get_autocast_dtype(here.device.type)] * torch.is_autocast_enabled(here.device.type)
    operators = ("par", "random_walk", "window_affinity", "attention_affinity_loss")
    afa_kernels.self_check(here.device, operators, [torch.float32, *half], as_needed=True)


def _run(trainer: Trainer, log: RunLog, interrupt: Interrupt) -> Summary:
    config, here, progress = trainer.config, trainer.here, trainer.progress
    total = config.schedule.max_iters
    count = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    log.say(
        f"{config.model.backbone} ({count:.1f} M parameters), {len(trainer.data)} training images,"
        f" labels from {trainer.data.label_source}, {trainer.data.num_classes} classes,"
        f" crop {config.augment.crop}, batch {config.loader.batch_size} x {here.world_size} on {here.device},"
        f" steps {progress.iteration + 1}..{total}"
    )
    for note in trainer.notes:
        log.say(note)
    if progress.iteration >= total:
        log.say(f"nothing is left to do: schedule.max_iters is {total}")
    guard, window = FiniteGuard(trainer.folder, here.rank), Window()
    scores: dict[str, float] = {}
    while progress.iteration < total:
        batch, result = trainer.train_step(window, guard)
        done, stop = progress.iteration, interrupt.signal is not None
        last = done == total or stop

        def due(every: int) -> bool:
            return bool(every) and done % every == 0  # noqa: B023 (called in this iteration only)

        log.advance(done)
        evaluating = bool(config.eval.every) and (due(config.eval.every) or done == total)
        saving = evaluating or due(config.checkpoint.every) or last
        if saving:
            guard.settle()
        if saving or due(config.log.every):
            log.train(window.flush())
        with window.pause():
            if due(config.log.pictures_every) and here.first:
                log.picture(done, "training", trainer.picture(batch, result))
            better = False
            if evaluating:
                with log.aside():
                    scores = trainer.evaluate()
                log.evaluation(done, scores)
                better = _headline(scores) >= progress.best
                progress.best = max(progress.best, _headline(scores))
            if saving:
                _save(trainer, log, better, must=last)
        if stop:
            log.say(f"stopped by signal {interrupt.signal} after step {done}; `--resume auto` goes on from here")
            return Summary(done, trainer.folder, trainer.newest, scores, interrupted=True)
    log.say(f"done: {trainer.newest}; logs, pictures and config.yaml are in {trainer.folder}")
    return Summary(progress.iteration, trainer.folder, trainer.newest, scores)


def _headline(scores: Mapping[str, float]) -> float:
    """The score that decides which checkpoint is best: the segmentation's where there is one."""
    value = scores.get("segmentation", max(scores.values(), default=float("-inf")))
    return value if value == value else float("-inf")


def _save(trainer: Trainer, log: RunLog, is_best: bool, must: bool) -> None:
    """A full disk in the middle of a run is no reason to throw the run away; at its end it is an error."""
    try:
        trainer.save(is_best)
    except checkpoint.CheckpointError as error:
        if must:
            raise
        kept = f"; the last good checkpoint is {trainer.newest}" if trainer.newest else ""
        log.say(f"warning: {error}{kept}; training goes on, the next try is at the next checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """`afa train`: returns 0 when done, 2 if settings or data are wrong, 1 if it broke, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        summary = train(parse(argv, "afa train", "Train AFA from image-level labels on a data set in VOC layout."))
    except (ConfigError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":  # all processes find the same
            print(f"afa train: error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, checkpoint.CheckpointError) as error:
        print(f"afa train: error: {error}", file=sys.stderr)
        return 1
    return 130 if summary.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
