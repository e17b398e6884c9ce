"""Which backend runs an operator: ``native`` (C++ and CUDA), ``triton``, ``reference`` (plain PyTorch).

An operator registers a predicate for each backend it has; the predicate returns why it cannot run, or None.
Nothing is swapped at import: the choice is made at each call, from the tensors' device and dtype.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

NAMES = ("native", "triton", "reference")

Predicate = Callable[..., "str | None"]  # (device, *tensors) -> reason or None

_registry: dict[str, dict[str, Predicate]] = {}
# What `use_backend` set, by thread. A plain dict, because torch.compile guards on one: a call that was compiled outside
# the context is compiled again inside it. It neither guards on a ContextVar or a thread-local, nor traces the first in
# every version.
_defaults: dict[int, str] = {}


@torch.compiler.assume_constant_result
def _thread() -> int:
    return threading.get_ident()


class BackendStatus(NamedTuple):
    """One row of `backends`: whether ``backend`` can run ``operator`` on ``device``, and why not."""

    operator: str
    backend: str
    device: str
    available: bool
    reason: str


class BackendTable(list):
    """The rows of `backends`; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.operator) for row in self), default=8)
        lines = [f"{'operator':{width}}  {'backend':9}  {'device':6}  can run"]
        for row in self:
            said = "yes" if row.available else f"no: {row.reason}"
            lines.append(f"{row.operator:{width}}  {row.backend:9}  {row.device:6}  {said}")
        return "\n".join(lines)


def register(operator: str, **predicates: Predicate) -> None:
    """``register("par", native=why_not, triton=why_not)``; the reference path always can."""
    _registry[operator] = predicates


def _check_name(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)} or None, got {name!r}")
    return name


def choose(operator: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """The backend to use for these tensors.

    ``backend`` (the caller's argument) is forced: ValueError with the reason if it cannot run. A default from
    `use_backend` or ``AFA_BACKEND`` is forced likewise where the operator has that backend at all. Otherwise the
    first that can, in the order native, triton, reference.
    """
    device = tensors[0].device
    predicates = _registry[operator]
    wanted, origin = backend, "backend"
    if wanted is None:
        wanted, origin = (_defaults.get(_thread()) if _defaults else None), "use_backend"
    if wanted is None:
        wanted, origin = os.environ.get("AFA_BACKEND") or None, "AFA_BACKEND"
    if wanted is not None:
        _check_name(wanted, origin)
        if wanted == "reference":
            return wanted
        if wanted not in predicates:
            if origin == "backend":
                raise ValueError(f"backend: {operator} has no {wanted} backend")
            return "reference"
        reason = predicates[wanted](device, *tensors)
        if reason is not None:
            raise ValueError(f"{origin}: {wanted} cannot run {operator} on {device}: {reason}")
        return wanted
    for name in NAMES[:2]:
        # Triton's interpreter is a debugging aid, far slower than the reference: it runs only when asked for.
        if name == "triton" and device.type == "cpu":
            continue
        if name in predicates and predicates[name](device, *tensors) is None:
            return name
    return "reference"


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, calls with ``backend=None`` use this backend (per thread; None restores the
    automatic choice).
    """
    thread, before = threading.get_ident(), _defaults.get(threading.get_ident())

    def set_to(value: str | None) -> None:
        if value is None:
            _defaults.pop(thread, None)
        else:
            _defaults[thread] = value

    set_to(None if name is None else _check_name(name, "name"))
    try:
        yield
    finally:
        set_to(before)


def triton_reason(device: torch.device, *tensors: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on a device and with these tensors, or None: the predicate most operators
    register.
    """
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return "the Triton kernels take float32, float16 and bfloat16, not torch.float64"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device.type == "cuda":
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return (
            None
            if interpreted
            else "the CPU has only Triton's interpreter (set TRITON_INTERPRET=1 before importing)"
        )
    return f"no Triton kernels for {device.type}"


def backends() -> BackendTable:
    """For every operator, backend and device (cpu, cuda): can it run here, and if not, why."""
    table = BackendTable()
    for operator, predicates in sorted(_registry.items()):
        for device in (torch.device("cpu"), torch.device("cuda")):
            for name in NAMES:
                if name == "reference":
                    no_gpu = device.type == "cuda" and not torch.cuda.is_available()
                    reason = "torch sees no CUDA device" if no_gpu else None
                elif name in predicates:
                    reason = predicates[name](device)
                else:
                    reason = f"{operator} has no {name} backend"
                table.append(BackendStatus(operator, name, device.type, reason is None, reason or ""))
    return table
