"""What a user should know and need not act upon: a line on the error stream, once per process and kind."""

from __future__ import annotations

import sys

from .processes import announced_rank

_said: set[str] = set()


def notice(kind: str, text: str) -> None:
    """Print ``afa: note: TEXT`` on the error stream unless a line of this ``kind`` was printed before.

    Of several processes only the first prints it.
    """
    if kind in _said:
        return
    _said.add(kind)
    if announced_rank() == 0:
        print(f"afa: note: {text}", file=sys.stderr, flush=True)


def forget_notices() -> None:
    """The next line of every kind is printed again."""
    _said.clear()
