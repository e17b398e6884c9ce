"""Triton's interpreter without work whose result it drops; a third to a half of its time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from types import ModuleType


def quicken() -> None:
    """Integer sums are made a second time in 64 bits, to be compared by an assertion that only `debug` looks at. And at
    every call of a function within a kernel all members of Triton's language are looked at, sorted, for those that it
    changes before a kernel runs.
    """
    from triton.runtime import interpreter

    is_builtin, patch = interpreter.tl.core.is_builtin, interpreter._patch_attr

    @functools.cache
    def builtins_of(where: ModuleType | type) -> list[str]:
        """Asked first by a kernel that starts, when nothing is changed."""
        return [name for name, member in inspect.getmembers(where) if is_builtin(member)]

    def patch_builtins(where: ModuleType | type, builder: object, scope: object) -> None:
        for name in builtins_of(where):
            member = getattr(where, name)
            if is_builtin(member):
                patch(where, name, member, builder, scope)

    if list(inspect.signature(interpreter._patch_builtin).parameters) == ["pkg", "builder", "scope"]:
        interpreter._patch_builtin = patch_builtins
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


with contextlib.suppress(ImportError, AttributeError, TypeError):  # without Triton, or one of another make: as it is
    quicken()
