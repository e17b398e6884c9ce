"""What a run tells: CSV tables, TensorBoard, pictures in a folder, and a progress bar with the time left."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..labels.kinds import title
from ..runtime.collectives import process_count, sum_over_processes


class Table:
    """A CSV file that grows by rows and at a resume forgets what lies beyond the iteration it goes on from.

    The first row fixes the columns. Values are written with every digit they have, so that two runs can be
    compared bit for bit.
    """

    def __init__(self, path: str | os.PathLike, resume_at: int):
        self.path = Path(path)
        self.columns: list[str] | None = None
        if resume_at > 0 and self.path.is_file():
            self._keep_up_to(resume_at)
        else:
            self.path.unlink(missing_ok=True)

    def _keep_up_to(self, iteration: int) -> None:
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            # A row cut short by the kill has fields missing; it lies beyond the checkpoint in any case.
            rows = [row for row in reader if None not in row.values() and int(row["iteration"]) <= iteration]
        if not columns:  # killed before anything was written
            self.path.unlink()
            return
        self.columns = columns
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (each with the key ``iteration``); NaN becomes an empty field.

        A column that the first row did not have is left out.
        """
        if not rows:
            return
        fresh = self.columns is None
        if fresh:
            self.columns = list(rows[0])
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)


class Window:
    """Per-step numbers kept on the device until someone looks, so that a step never waits for the host."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self._started = time.perf_counter()
        self._paused = 0.0

    def add(self, iteration: int, lr: float, values: Mapping[str, torch.Tensor]) -> None:
        """Remember the (scalar) values of a step; NaN: not computed. Every step must bring the same keys."""
        self.rows.append((iteration, lr, {name: value.detach().float() for name, value in values.items()}))

    @contextlib.contextmanager
    def pause(self):
        """Time spent inside (evaluation, pictures, checkpoints) does not count as step time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def flush(self) -> list[dict[str, float]]:
        """The rows so far as plain numbers, averaged over the processes, and the mean seconds a step took."""
        rows, self.rows = self.rows, []
        if not rows:
            return []
        names = list(rows[0][2])
        values = torch.stack([torch.stack([row[name] for name in names]) for _, _, row in rows])
        if process_count() > 1:
            values = sum_over_processes(values) / process_count()
        table = values.cpu().tolist()  # waits for the device: the clock is read after it
        now = time.perf_counter()
        seconds = (now - self._started - self._paused) / len(rows)
        self._started, self._paused = now, 0.0
        return [
            {"iteration": iteration, "lr": lr, **dict(zip(names, line)), "seconds": round(seconds, 4)}
            for (iteration, lr, _), line in zip(rows, table)
        ]


class RunLog:
    """Writes a run's numbers and pictures; with ``writes=False`` (all processes but the first) it is silent.

    In ``folder``: ``train.csv`` (a row per step), ``eval.csv`` (a row per evaluation), ``tensorboard/``,
    ``pictures/*.png``.
    A log that cannot be written (disk full) warns once and lets the training go on.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        total: int,
        resume_at: int = 0,
        writes: bool = True,
        tensorboard: bool = True,
    ):
        self.folder = Path(folder)
        self.total = total
        self.writes = writes
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not writes)
        self._seconds: float | None = None
        self._warned = False
        self._board = None
        self._bar: Progress | None = None
        if not writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._train = Table(self.folder / "train.csv", resume_at)
        self._eval = Table(self.folder / "eval.csv", resume_at)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only here

            self._board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=resume_at + 1 if resume_at else None
            )
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(12),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total, completed=resume_at, note="")
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line (above the progress bar if there is one)."""
        self.console.print(text, markup=False, emoji=False)

    @contextlib.contextmanager
    def aside(self):
        """The bar is taken off the screen, where something else (an evaluation) draws one of its own."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    @contextlib.contextmanager
    def _survive(self):
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.say(f"warning: logs in {self.folder} cannot be written ({error}); training goes on without")

    def advance(self, iteration: int) -> None:
        """A step is done: move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration)

    def train(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Steps since the last call: each goes to the CSV, their mean to TensorBoard and to the screen."""
        if not self.writes or not rows:
            return
        iteration = int(rows[-1]["iteration"])
        known = {name: [row[name] for row in rows if row[name] == row[name]] for name in rows[0] if name != "iteration"}
        mean = {name: sum(values) / len(values) for name, values in known.items() if values}
        mean["lr"] = rows[-1]["lr"]
        with self._survive():
            self._train.add(rows)
            if self._board is not None:
                for name, value in mean.items():
                    self._board.add_scalar(f"train/{name}", value, iteration)
        # half of what was before: the first window holds start-up costs (threads, caches, compilation)
        self._seconds = mean["seconds"] if self._seconds is None else 0.5 * (self._seconds + mean["seconds"])
        losses = "  ".join(
            f"{name.removesuffix('_loss')} {value:.4f}" for name, value in mean.items() if "loss" in name
        )
        left = clock(self._seconds * (self.total - iteration))
        pace = f"{mean['seconds']:.2f} s/it  ETA {left}"
        losses = f"{losses}  lr {mean['lr']:.2e}"
        if self._bar is not None:
            # left to itself, the screen's lack of room takes the other columns' numbers
            room = self.console.width - len("training") - 12 - len(f"{self.total}/{self.total}") - len("0:00:00") - 4
            self._bar.update(self._task, completed=iteration, note=f"{pace}  {losses}"[: max(room, 0)])
        else:
            self.say(f"iter {iteration:>{len(str(self.total))}}/{self.total}  {losses}  {pace}")

    def evaluation(
        self,
        iteration: int,
        scores: Mapping[str, float],
        refinement: str = "par",
        image_level: Mapping[str, float] | None = None,
    ) -> None:
        """Scores of an evaluation (percent) by kind of label map; ``refinement`` is the one of the labels;
        ``image_level`` those of the classifier.
        """
        classifier = {f"classifier_{name}": value for name, value in (image_level or {}).items()}
        if not self.writes:
            return
        with self._survive():
            self._eval.add([{"iteration": iteration, **scores, **classifier}])
            if self._board is not None:
                for name, value in (scores | classifier).items():
                    self._board.add_scalar(f"eval/{name}", value, iteration)
        told = []
        if scores:
            maps = (f"{title(name, refinement)} {value:.1f}" for name, value in scores.items())
            told.append("mIoU in percent: " + ", ".join(maps))
        if image_level:
            told.append("classifier F1 {f1:.1f}, mAP {map:.1f}".format(**image_level))
        self.say(f"evaluation after step {iteration}, {'; '.join(told)}")

    def picture(self, iteration: int, name: str, image: np.ndarray) -> None:
        """Write ``image`` ([H, W, 3] uint8) to ``pictures/`` and to TensorBoard."""
        if not self.writes:
            return
        with self._survive():
            path = self.folder / "pictures" / f"iter_{iteration:08d}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            if self._board is not None:
                self._board.add_image(name, image, iteration, dataformats="HWC")

    def close(self) -> None:
        """Stop the bar and write out what is buffered."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._board is not None:
            with self._survive():
                self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def clock(seconds: float) -> str:
    """``h:mm:ss`` of a duration in seconds."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
