"""Long work on the terminal: a bar with what is done, what there is, and the time that is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
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

_TOLD_EVERY = 60.0  # seconds between lines where there is no terminal to draw a bar on


def in_threads(work: Callable[[Item], Outcome], items: Sequence[Item], title: str) -> list[Outcome]:
    """``[work(item) for item in items]`` on several threads (decoders release the GIL), with a bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(progress(pool.map(work, items), title, len(items)))


def several(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """``items`` in their order, ``count`` at a time; at the end what is left. Those to come are not asked for before.
    """
    left = iter(items)
    while some := list(islice(left, count)):
        yield some


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


def told(items: Sequence[Item], title: str, done: Callable[[], int], show: bool = True) -> Iterator[Item]:
    """The photographs of long work one by one, with a bar and the rate on a terminal, elsewhere a line each minute.

    done: how many were worked on, rather than skipped.
    """
    start = last = time.monotonic()
    for number, item in enumerate(progress(items, title, show=show, rate=True)):
        now = time.monotonic()
        if show and not sys.stderr.isatty() and now - last >= _TOLD_EVERY:
            last = now
            rate = done() / (now - start)
            print(f"{title}: {number} of {len(items)}, {rate:.2g} images a second", file=sys.stderr, flush=True)
        yield item
