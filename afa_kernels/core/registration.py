"""Operators of PyTorch's dispatcher, ``torch.ops.afa``: opaque to torch.compile, with fakes and gradients in Python.

An eager call goes past the dispatcher where nothing but autograd would hear of it: an operator in Python costs the
dispatcher several times what its kernels need of the host, and with gradients as much as all of a small operator.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import _C
from torch._library.autograd import Info, make_autograd_impl

NAMESPACE = "afa"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# What is asked here is no public part of PyTorch: where one of it is missing, every call goes by the dispatcher.
_ASKED = (
    "_len_torch_dispatch_stack",
    "_is_torch_function_mode_enabled",
    "_get_tracing_state",
    "_are_functorch_transforms_active",
    "_any_requires_grad",
    "_autograd._profiler_enabled",
)
_libraries: dict[str, torch.library.Library] = {}


def _can_ask(module: object = _C) -> bool:
    try:
        return all(callable(attrgetter(name)(module)) for name in _ASKED)
    except AttributeError:
        return False


_CAN_ASK = _can_ask()


def _unheard(arguments: list[torch.Tensor | None]) -> bool:
    """Whether of a call with these tensors only autograd need know: no mode, transform or trace is about, and no
    tensor is one of another class, without data, or other than its memory says.
    """
    if not _CAN_ASK:
        return False
    if _C._len_torch_dispatch_stack() or _C._is_torch_function_mode_enabled() or _C._get_tracing_state() is not None:
        return False
    if _C._are_functorch_transforms_active():
        return False
    for value in arguments:
        if value is not None and (
            type(value) not in _PLAIN or value.is_meta or value.is_neg() or value._is_zerotensor()
        ):
            return False
    return True


class Operator:
    """An operator that writes into none of its inputs; what ``operator`` makes of its implementation.

    Called with all of its arguments, by position, numbers as the annotations have them: nothing converts an int to a
    float. As ``torch.library.custom_op``, whose operators import the whole of torch._dynamo when one is first called:
    three seconds of every process, also of those that compile nothing.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self._short, self._function = f"{NAMESPACE}::{name}", name, function
        self._recorded: type[torch.autograd.Function] | None = None
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., None] | None = None
        if name in _libraries:  # its module was loaded again
            _libraries.pop(name)._destroy()
        self._library = _libraries[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        arguments = schema[1 : schema.index(") ->")].split(", ")
        self._tensors = [at for at, argument in enumerate(arguments) if argument.startswith("Tensor")]
        self._library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(name, function, "CompositeExplicitAutograd")
        # Also without a formula: to go on without a gradient in silence would be wrong.
        self._autograd: Callable[..., Any] | None = None
        self._library.impl(name, self._at_autograd, "Autograd", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _unheard([arguments[at] for at in self._tensors]):
            return getattr(torch.ops.afa, self._short)(*arguments)
        if _C._autograd._profiler_enabled():
            with torch.profiler.record_function(self.name):
                return self._directly(arguments)
        return self._directly(arguments)

    def _directly(self, arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and _C._any_requires_grad(*arguments):
            if self._recorded is None:
                self._recorded = self._as_function()
            return self._recorded.apply(*arguments)
        return self._function(*arguments)

    def _as_function(self) -> type[torch.autograd.Function]:
        def forward(ctx, *arguments):
            output = self._function(*arguments)
            self._save(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(self._gradient)}
        return type(f"{NAMESPACE}_{self._short}", (torch.autograd.Function,), methods)

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
            overload = getattr(torch.ops.afa, self._short).default
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
