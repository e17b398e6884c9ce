"""Which backend runs an operator: ``native`` (C++ and CUDA), ``triton``, ``reference`` (plain PyTorch).

Of every operator and backend a predicate says why it cannot run, or None; `implementations` says what runs then.
Nothing is swapped at import: the choice is made at each call, from the tensors' device and dtype. On a GPU a backend
that says it can run proves it once (`self_check`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

from . import native_module
from . import self_check as proof
from .tracing import constant_when_traced
from .transforms import REASON, beyond_backward

NAMES = ("native", "triton", "reference")

Predicate = Callable[..., "str | None"]  # (device, *tensors) -> reason or None

_registry: dict[str, dict[str, Predicate]] = {}
# What `use_backend` set, by thread. A plain dict, because torch.compile guards on one: a call that was compiled outside
# the context is compiled again inside it. It neither guards on a ContextVar or a thread-local, nor traces the first in
# every version.
_defaults: dict[int, str] = {}


@constant_when_traced
def _thread() -> int:
    return threading.get_ident()


class BackendStatus(NamedTuple):
    """One row of `backends`: whether ``backend`` can run ``operator`` on ``device``, and why not."""

    operator: str
    backend: str
    device: str
    available: bool
    reason: str


class BackendTable(list[BackendStatus]):
    """The rows of `backends`; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.operator) for row in self), default=8)
        lines = [f"{'operator':{width}}  {'backend':9}  {'device':6}  can run"]
        for row in self:
            said = "yes" if row.available else f"no: {row.reason}"
            lines.append(f"{row.operator:{width}}  {row.backend:9}  {row.device:6}  {said}")
        return "\n".join(lines)


def register(
    operator: str,
    samples: Callable[[proof.Draw], list[proof.Sample]],
    backends: Sequence[str] = ("native", "triton"),
    kernels: str | None = None,
) -> None:
    """An operator and the backends that it has beside the reference, which always can.

    ``samples(draw)`` gives the small calls with which a backend proves itself: odd sizes, several of the kernels'
    tiles, all arguments that choose another kernel. ``kernels`` names another operator whose native kernels it runs on.
    """

    def native_reason(device: torch.device, *tensors: torch.Tensor) -> str | None:
        return native_module.native_can_run(kernels or operator, device, *tensors)

    predicates = {"native": native_reason, "triton": triton_reason}
    _registry[operator] = {name: predicates[name] for name in backends}
    proof.samples[operator] = samples


def _check_name(name: str, argument: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)} or None, got {name!r}")
    return name


def _forced(backend: str | None) -> tuple[str | None, str]:
    """The backend that is asked for, if any, and by what."""
    wanted, origin = backend, "backend"
    if wanted is None:
        wanted, origin = (_defaults.get(_thread()) if _defaults else None), "use_backend"
    if wanted is None:
        wanted, origin = os.environ.get("AFA_BACKEND") or None, "AFA_BACKEND"
    if wanted is not None:
        _check_name(wanted, origin)
    return wanted, origin


def choose(
    operator: str, backend: str | None, *tensors: torch.Tensor, learned: tuple[torch.Tensor, ...] = ()
) -> str:
    """The backend to use for these tensors; ``learned`` are others whose gradients may be asked for.

    ``backend`` (the caller's argument) is forced: ValueError with the reason if it cannot run. A default from
    `use_backend` or ``AFA_BACKEND`` is forced likewise where the operator has that backend at all. Otherwise the
    first that can, in the order native, triton, reference. On a GPU a backend that fails its `self_check` cannot, and
    anywhere only the reference can where more than a backward is asked for (`transforms`).
    """
    device = tensors[0].device
    predicates = _registry[operator]
    wanted, origin = _forced(backend)
    if wanted is not None:
        if wanted == "reference":
            return wanted
        if wanted not in predicates:
            if origin == "backend":
                raise ValueError(f"backend: {operator} has no {wanted} backend")
            return "reference"
        reason = _why_not(operator, wanted, tensors, learned)
        if reason is not None:
            raise ValueError(f"{origin}: {wanted} cannot run {operator} on {device}: {reason}")
        return wanted
    for name in NAMES[:2]:
        # Triton's interpreter is a debugging aid, far slower than the reference: it runs only when asked for.
        if name == "triton" and device.type == "cpu":
            continue
        if name in predicates and _why_not(operator, name, tensors, learned) is None:
            return name
    return "reference"


def _why_not(
    operator: str, backend: str, tensors: tuple[torch.Tensor, ...], learned: tuple[torch.Tensor, ...]
) -> str | None:
    """Why a backend cannot run with these tensors, or None. What has been proven is not asked again."""
    if beyond_backward(*tensors, *learned):
        return REASON
    first, last = tensors[0], tensors[-1]
    gradients = False
    if torch.is_grad_enabled():
        gradients = first.requires_grad or last.requires_grad
        for tensor in learned:
            gradients = gradients or tensor.requires_grad
    key = operator, backend, first.device, first.dtype, last.dtype, gradients
    if proof.proven(*key):
        return None
    return _registry[operator][backend](first.device, *tensors) or proof.verdict(*key)


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """``with use_backend(name):`` calls with ``backend=None`` use this backend (per thread; None restores the
    automatic choice). Called without ``with`` it changes nothing.

    Examples:
        >>> import torch
        >>> from afa_kernels import par, use_backend
        >>> with use_backend("reference"):
        ...     refined = par(torch.rand(1, 3, 32, 32), torch.rand(1, 21, 32, 32))
    """
    return _used(None if name is None else _check_name(name, "name"))


@contextmanager
def _used(name: str | None) -> Iterator[None]:
    thread, before = threading.get_ident(), _defaults.get(threading.get_ident())

    def set_to(value: str | None) -> None:
        if value is None:
            _defaults.pop(thread, None)
        else:
            _defaults[thread] = value

    set_to(name)
    try:
        yield
    finally:
        set_to(before)


def triton_reason(device: torch.device, *tensors: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on a device and with these tensors, or None."""
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
    """For every operator, backend and device (cpu, cuda): can it run here, and if not, why.

    A backend that has failed its `self_check` on the current device says so.

    Examples:
        >>> from afa_kernels import backends
        >>> [row.backend for row in backends() if (row.operator, row.device) == ("par", "cpu")]
        ['native', 'triton', 'reference']
        >>> print(backends())  # doctest: +ELLIPSIS
        operator ... can run
        ...
    """
    table = BackendTable()
    for operator, predicates in sorted(_registry.items()):
        for device in (torch.device("cpu"), torch.device("cuda")):
            for name in NAMES:
                if name == "reference":
                    no_gpu = device.type == "cuda" and not torch.cuda.is_available()
                    reason = "torch sees no CUDA device" if no_gpu else None
                elif name in predicates:
                    reason = predicates[name](device) or proof.failure(operator, name, device)
                else:
                    reason = f"{operator} has no {name} backend"
                table.append(BackendStatus(operator, name, device.type, reason is None, reason or ""))
    return table


def self_check(
    device: torch.device | str | None = None,
    operators: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] | None = None,
    *,
    as_needed: bool = False,
) -> proof.CheckTable:
    """Run backends on small cases and compare them with the reference: now, rather than at their first calls.

    On a GPU the first call of an operator checks the backend that it is about to take, for its dtype, and with
    gradients if they are asked for. A backend that deviates from the reference or raises is not used on that device
    from then on (a RuntimeWarning says so, `backends` says why); where it was asked for, that is a ValueError. It takes
    some milliseconds, to which comes what Triton has to compile (kept on disk by Triton). ``AFA_SELF_CHECK=0`` turns
    it off. What is checked here is not checked again by calls.

    Args:
        device: the device, ``"cpu"`` or ``"cuda:0"``; None checks the CPU and every GPU.
        operators: names as in `backends`; None checks all of them.
        dtypes: some of float32, float16, bfloat16; None checks all three.
        backends: ``"native"``, ``"triton"``; None checks both.
        as_needed: check only what first calls would: of each operator the backend that they would take, the next one
            where that fails, nothing that is proven already, nothing on the CPU or with ``AFA_SELF_CHECK=0``.

    Returns:
        A row for each operator, backend that can run, dtype and direction (forward, backward): error, tolerance,
        milliseconds, and what is wrong, if anything. It prints as a table.

    Raises:
        ValueError: a device, operator, dtype or backend that there is none of.
        RuntimeError: within the capture of a CUDA graph or a backward.

    Examples:
        >>> from afa_kernels import self_check
        >>> all(row.ok for row in self_check("cpu", operators=["random_walk"], backends=["native"]))
        True
    """
    everywhere = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    places = everywhere if device is None else [_place(device)]
    names = sorted(_registry) if operators is None else _several(operators)
    kinds = proof.DTYPES if dtypes is None else _several(dtypes)
    kernels = NAMES[:2] if backends is None else _several(backends)
    for argument, values, known in (
        ("device", places, everywhere),
        ("operators", names, list(_registry)),
        ("dtypes", kinds, proof.DTYPES),
        ("backends", kernels, NAMES[:2]),
    ):
        for value in values:
            if value not in known:
                raise ValueError(f"{argument} must be among {', '.join(map(str, known))}, got {value}")
    if proof.untimely():
        raise RuntimeError(f"self_check cannot run now: {proof.untimely()}")
    table = proof.CheckTable()
    for place in places:
        for operator in names:
            table.extend(_check_operator(operator, place, kinds, kernels, as_needed))
    return table


def _place(device: torch.device | str) -> torch.device | str:
    """A device as its tensors name it; what is none as it is."""
    try:
        place = torch.device(device)
    except RuntimeError:
        return device
    return torch.device("cpu") if place.type == "cpu" else proof.with_index(place)


def _several(values: object) -> tuple:
    """One name or dtype alone is taken for a sequence of one."""
    return (values,) if isinstance(values, (str, torch.dtype)) else tuple(values)


def _check_operator(
    operator: str, device: torch.device, dtypes: Sequence[torch.dtype], backends: Sequence[str], as_needed: bool
) -> Iterator[proof.CheckRow]:
    predicates, left = _registry[operator], list(dtypes)
    candidates = [name for name in NAMES[:2] if name in predicates and name in backends]
    if as_needed:
        wanted = _forced(None)[0]
        candidates = [name for name in candidates if wanted in (None, name) and proof.needed(name, device)]
    for name in candidates:
        place = operator, name, device
        if not as_needed:
            proof.forget(*place)
        able = [dtype for dtype in left if predicates[name](device, torch.empty(0, dtype=dtype, device="cpu")) is None]
        known = proof.failure(*place)
        if known is None:
            for dtype in able:
                for gradients in (False, True):
                    key = *place, dtype, dtype, gradients
                    if not (as_needed and proof.proven(*key)):
                        yield proof.check(*key)
            if proof.failure(*place) is not None:
                proof.warn(place)
        if as_needed and proof.failure(*place) is None:
            left = [dtype for dtype in left if dtype not in able]
