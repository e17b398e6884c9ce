"""What torch.compile is told of functions that it need not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_traced(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``: the result is a constant to a compiled graph.

    That function does no more than set this mark, but imports the whole of torch._dynamo for it: three seconds of every
    program that imports this package, also of those that compile nothing.
    """
    function._dynamo_marked_constant = True
    return function
