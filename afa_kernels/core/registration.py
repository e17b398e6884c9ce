"""Operators of PyTorch's dispatcher, ``torch.ops.afa``: opaque to torch.compile, with fakes and gradients in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl

NAMESPACE = "afa"
_libraries: dict[str, torch.library.Library] = {}


class Operator:
    """An operator that writes into none of its inputs; what ``operator`` makes of its implementation.

    As ``torch.library.custom_op``, whose operators import the whole of torch._dynamo when one is first called: three
    seconds of every process, also of those that compile nothing.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = f"{NAMESPACE}::{name}"
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., None] | None = None
        if name in _libraries:  # its module was loaded again
            _libraries.pop(name)._destroy()
        self._library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        self._library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(name, function, "CompositeExplicitAutograd")
        # Also without a formula: to go on without a gradient in silence would be wrong.
        self._autograd: Callable[..., Any] | None = None
        self._library.impl(name, self._at_autograd, "Autograd", with_keyset=True)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes, dtypes and devices of what is returned, for tensors without data."""
        torch.library.register_fake(self.name, function, lib=self._library)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """See torch.library.register_autograd."""
        self._backward, self._setup_context = backward, setup_context

    def _at_autograd(self, keyset, *arguments):
        """What ``torch.library.register_autograd`` would have put here, made when it is first called: it takes 1.5 ms,
        and of some thirty operators a program calls a few.
        """
        if self._autograd is None:
            overload = getattr(torch.ops.afa, self.name.removeprefix(f"{NAMESPACE}::")).default
            self._autograd = make_autograd_impl(overload, Info(self._gradient, self._save))
        return self._autograd(keyset, *arguments)

    def _save(self, ctx, inputs, output) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _gradient(self, ctx, *gradients):
        if self._backward is None:
            raise RuntimeError(f"{self.name} has no autograd formula: the kernels have no gradient of a gradient")
        return self._backward(ctx, *gradients)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function is ``torch.ops.afa.<name>``, by its annotations, for tensors of every device."""
    return lambda function: Operator(name, function)
