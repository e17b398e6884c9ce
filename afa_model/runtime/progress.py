"""Long work on the terminal: a bar with what is done, what there is, and the time that is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .processes import place

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def in_threads(work: Callable[[Item], Outcome], items: Sequence[Item], title: str) -> list[Outcome]:
    """``[work(item) for item in items]`` on several threads (decoders release the GIL), with a bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(progress(pool.map(work, items), title, len(items)))


class _Rate(ProgressColumn):
    """How many are done in a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2g}/s")


def progress(
    items: Iterable[Item], title: str, total: int | None = None, show: bool = True, rate: bool = False
) -> Iterable[Item]:
    """Go through ``items`` with a bar on the terminal's error stream: done, total, the time that is left, and if asked
    for the rate.

    Of several processes only the first draws it.
    """
    show = show and place()[0] == 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    columns = (*columns, _Rate()) if rate else columns
    with Progress(
        *columns, console=console, transient=True, disable=not (show and console.is_terminal)
    ) as bar:
        yield from bar.track(items, total=total, description=title)
