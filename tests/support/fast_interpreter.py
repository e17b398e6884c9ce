"""Triton's interpreter without work whose result it drops; a third to a half of its time."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import inspect
from types import ModuleType

import numpy as np


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
        names = builtins_of(where)
        if names and not is_builtin(getattr(where, names[0])):
            return  # changed when the kernel started that now calls a function
        for name in names:
            member = getattr(where, name)
            if is_builtin(member):
                patch(where, name, member, builder, scope)

    if list(inspect.signature(interpreter._patch_builtin).parameters) == ["pkg", "builder", "scope"]:
        interpreter._patch_builtin = patch_builtins
    remember_types(interpreter)
    take_alike(interpreter)
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


def take_alike(interpreter: ModuleType) -> None:
    """Operands of one type and shape, or a block and a number that it takes without a change of type, need not be asked
    what they become together. Shapes that are equal are one object, see `remember_types`.
    """
    core, handle = interpreter.tl.core, interpreter.TensorHandle
    semantic, tensor = interpreter.interpreter_semantic.__class__, core.tensor
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    floats, integers = {"fp32": np.float32, "fp64": np.float64}, {"int32": np.int32, "int64": np.int64}
    plain = floats | integers

    def number(value: object, beside: object) -> object:
        """``value`` as a block like ``beside``; None where asking is needed."""
        name, kind = beside.dtype.name, builtins.type(value)
        if not beside.type.is_block():
            return None
        if name in floats and (kind is float or kind is int):
            return tensor(handle(np.full(beside.handle.data.shape, value, floats[name]), beside.dtype), beside.type)
        if name in integers and kind is int and -(2**31) <= value < 2**31:
            return tensor(handle(np.full(beside.handle.data.shape, value, integers[name]), beside.dtype), beside.type)
        return None

    def checked(self: object, lhs: object, rhs: object, *more: object, **options: object) -> tuple:
        if builtins.type(lhs) is tensor:
            if builtins.type(rhs) is tensor:
                name = lhs.dtype.name
                if name in plain and rhs.dtype.name == name:
                    return broadcasted(self, lhs, rhs)
            elif (block := number(rhs, lhs)) is not None:
                return lhs, block
        elif builtins.type(rhs) is tensor and (block := number(lhs, rhs)) is not None:
            return block, rhs
        return check(self, lhs, rhs, *more, **options)

    def broadcasted(self: object, lhs: object, rhs: object) -> tuple:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    taken = ["self", "lhs", "rhs", "allow_lhs_ptr", "allow_rhs_ptr", "arithmetic_check", "div_or_mod"]
    if list(inspect.signature(check).parameters) == taken:
        semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = checked, broadcasted


with contextlib.suppress(ImportError, AttributeError, TypeError):  # without Triton, or one of another make: as it is
    quicken()
