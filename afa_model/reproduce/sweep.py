"""A sweep: what there is to do for some tables, shared out between processes, each piece done once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..config import Config
from ..conventions import require
from ..data.classes import VOC_CLASSES, class_names
from ..data.lists import list_file
from ..errors import CheckpointError, ConfigError, TrainingError
from ..runs.folder import InUse
from ..runs.logs import clock
from ..runs.restore import checkpoint_of
from ..runtime.processes import share_of
from .paper import PaperTable, Row
from .runs import Run, data_of, run_of
from .scores import about, digest_of, keep, kept, refinement_scores, segmentation_scores, split_of

WAIT = 2.0  # seconds between looks at what others are doing


@dataclass
class SweepSettings:
    """What is reproduced, and how much of it here.

    Args:
        quick: small networks, from scratch, on generated pictures: minutes of a CPU for each row. Without it the full
            reproduction on VOC.
        seeds: number of runs of each row, with seeds from seed on.
        shard: I/N: do only the I-th of N shares of the rows, I in 1..N; under torchrun each process takes its own.
        cam_checkpoint: --checkpoint for short: network whose CAM tables 2 and 3 refine, a run's folder or a checkpoint;
            null: the full method's of each seed.
        report: write tables, plots and what holds of the paper's order into this Markdown file; what is between its
            marks is replaced, all else stays.
    """

    quick: bool = False
    seeds: int = 1
    shard: str | None = None
    cam_checkpoint: str | None = None
    report: str | None = None

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        index, count = self.share()
        alone = self.report is None or count == 1
        require(alone, "report", "null for a share of the rows: write it when all shares are done", self.report)

    def share(self) -> tuple[int, int]:
        """Which share of the rows, from 0, of how many."""
        return share_of(self.shard)


@dataclass
class Scoring:
    """A file of scores: what decides them, and what finds them."""

    path: Path
    settings: Mapping[str, Any]
    find: Callable[[], Mapping[str, Any]]

    @property
    def done(self) -> bool:
        """Whether the scores are there."""
        return kept(self.path, self.settings) is not None


@dataclass
class Piece:
    """A network, or the CAM of one, and what is scored of it."""

    title: str
    scorings: list[Scoring] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(scoring.done for scoring in self.scorings)

    def work(self) -> None:
        """Do what is left.

        Raises:
            InUse: another process is at the network.
        """
        for scoring in self.scorings:
            if not scoring.done:
                keep(scoring.path, scoring.settings, scoring.find())


@dataclass
class Sweep:
    """Some tables for some seeds.

    Attributes:
        base: the configuration that rows start from; ``out`` is the folder of all runs.
        tables: of the paper.
        seeds: of each row.
        checkpoint: of the network whose CAM is refined; None: the full method's.
    """

    base: Config
    tables: list[PaperTable]
    seeds: list[int]
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint = checkpoint_of(self.checkpoint)
            if not self.checkpoint.is_file():
                raise CheckpointError(f"checkpoint: no file {self.checkpoint}")

    def run(self, row: Row, seed: int) -> Run:
        """The network of a row."""
        return run_of(self.base, row.settings, seed)

    def full(self, seed: int) -> Run:
        """The network of the full method."""
        return run_of(self.base, {}, seed)

    def seeds_of(self, table: PaperTable) -> list[int]:
        """A checkpoint that is given has one CAM."""
        return self.seeds[:1] if table.refines and self.checkpoint is not None else self.seeds

    def scored(self, table: PaperTable, row: Row, seed: int) -> tuple[Path, Mapping[str, Any]]:
        """The file of scores that a row of a table is in, and what decides them."""
        run = self.full(seed) if table.refines else self.run(row, seed)
        folder, settings = run.folder, about(run.config, table)
        if table.refines and self.checkpoint is not None:
            folder, settings = self._folder_of_cam(), {**settings, **self._given}
        return folder / f"scores-{table.protocol or table.name}.json", settings

    @cached_property
    def _given(self) -> Mapping[str, Any]:
        """What decides the scores of a network that is given, and is no part of a folder's name here: what is in the
        file, for more may have been trained since, and the data.
        """
        return {"checkpoint": digest_of(self.checkpoint), "data": data_of(self.base)}

    def _folder_of_cam(self) -> Path:
        """For the scores of a network that is given, of which there is no folder here."""
        said = f"{self.checkpoint.resolve()} {Path(self.base.data.root).resolve()}"
        return Path(self.base.out, f"cam-{hashlib.sha256(said.encode()).hexdigest()[:8]}")

    def pieces(self) -> list[Piece]:
        """All there is to do, networks first, those of one row beside each other; what several tables ask for once."""
        networks = {self.full(seed).folder: Piece(f"full method, seed {seed}") for seed in self.seeds}
        for table in [table for table in self.tables if not table.refines]:
            for row in table.rows:
                for seed in self.seeds:
                    run, (path, settings) = self.run(row, seed), self.scored(table, row, seed)
                    piece = networks.setdefault(run.folder, Piece(f"{run.name}, seed {seed}"))
                    if path not in [scoring.path for scoring in piece.scorings]:
                        piece.scorings.append(Scoring(path, settings, partial(_of_network, run, table)))
        pieces = [piece for piece in networks.values() if piece.scorings]
        for table in [table for table in self.tables if table.refines]:
            for seed in self.seeds_of(table):
                path, settings = self.scored(table, table.rows[0], seed)
                find = partial(_of_cam, self.full(seed), table, self.checkpoint)
                title = f"{table.number}, refinements of the CAM, seed {seed}"
                pieces.append(Piece(title, [Scoring(path, settings, find)]))
        return pieces

    def check_lists(self) -> None:
        """
        Raises:
            DataError: a list of images that a table is scored on is not there: now, not when the networks are trained.
        """
        data = self.base.data
        for split in dict.fromkeys(split_of(self.base, table) for table in self.tables):
            list_file(data.root, split, data.list_dir)

    def check_classes(self) -> None:
        """
        Raises:
            ConfigError: a table asks for VOC's classes, and the data have others.
        """
        names = class_names(self.base.data.root)
        for table in self.tables:
            if table.per_class is not None and names != VOC_CLASSES:
                raise ConfigError(
                    f"{table.name}: the paper's classes are the {len(VOC_CLASSES)} of VOC, {self.base.data.root} has"
                    f" {len(names)}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''} (--quick shows them"
                    " without the paper's; or ask for the other tables)"
                )


def _of_network(run: Run, table: PaperTable) -> Mapping[str, Any]:
    if not run.finished:
        run.make()
    return segmentation_scores(checkpoint_of(run.folder), run.config, table)


def _of_cam(run: Run, table: PaperTable, given: Path | None) -> Mapping[str, Any]:
    if given is None and not run.finished:
        run.make()
    return refinement_scores(given or checkpoint_of(run.folder), run.config, table)


def work_off(pieces: list[Piece], told: Callable[[str], None]) -> list[str]:
    """Do what is left of the pieces; what another process is at is left for later, and waited for at the end.

    -> why some could not be done, a line for each: one network whose training fails stops no others.
    """
    begin, problems, known = time.monotonic(), [], set()
    waiting = [(number, piece) for number, piece in enumerate(pieces, 1) if not piece.done]
    if len(waiting) < len(pieces):
        told(f"{len(pieces) - len(waiting)} of {len(pieces)} are done already")
    while waiting:
        busy = []
        for number, piece in waiting:
            if piece.done:  # by another process, in the meantime
                continue
            if number not in known:
                told(f"[{number} of {len(pieces)}] {piece.title}; {clock(time.monotonic() - begin)} so far")
            try:
                piece.work()
            except InUse:
                if number not in known:
                    told("left for later: another process is at it, or at the start that it shares")
                busy.append((number, piece))
                known.add(number)
            except TrainingError as error:
                problems.append(f"{piece.title}: {error}")
        if len(busy) == len(waiting):
            time.sleep(WAIT)
        waiting = busy
    return problems


@contextlib.contextmanager
def each_alone() -> Iterator[None]:
    """Under ``torchrun`` every process trains networks of its own inside: none joins a process group, each has a GPU of
    its own still (``LOCAL_RANK``).
    """
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ.update(RANK="0", WORLD_SIZE="1")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
