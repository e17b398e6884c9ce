"""Triton's interpreter without work whose result it drops; a third to a half of its time."""

from __future__ import annotations

import contextlib
import dataclasses


def quicken() -> None:
    """Integer sums are made a second time in 64 bits, to be compared by an assertion that only `debug` looks at."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


with contextlib.suppress(ImportError, AttributeError, TypeError):  # without Triton, or one of another make: as it is
    quicken()
