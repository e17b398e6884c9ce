"""The first call on a device proves itself: a backend runs a small case there, which is compared with the reference.

`verdict` answers, for the backends that `backends.choose` is about to take, from a set of what has been proven; what
has not is run now. A deviation or an exception rules the backend out on that device, for all dtypes, with one warning.

The check has a thread of its own. Grad mode, inference mode, autocast, the default device, fake tensors, what
torch.compile traces, the current stream and `use_backend` belong to the caller's thread, so none of them reaches it,
and neither do the inputs of the call. The reference runs on the CPU in float64, from the same rounded inputs: TF32 and
other settings of a process would spoil it in float32, and cuBLAS and cuDNN take longer to load than all of this.

``AFA_SELF_CHECK=0`` turns it off: backends are then taken at their word.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tracing import constant_when_traced

# What a result may be off, as the norm of the difference over the norm of the reference. float32: sums of a hundred
# terms stay under 1e-5, a wrong tap, a race or TF32 (5e-4) does not. Half precision: the reference is not rounded at
# the end, which alone is up to the unit roundoff 2^-11 or 2^-8, and a kernel may hold one factor (weights, gradients of
# scores) in half precision, for as much again.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DTYPES = tuple(TOLERANCES)
PASSING = ("out of memory", "captur", "busy or unavailable")  # what an error says that may be gone at the next call
WISHES = ("AFA_PLAN",)  # what is asked for of the user's calls need not be possible at the samples' sizes
COUNTS = 1e-12  # of results that are integers
LOSS_SCALE = 4096

Draw = Callable[..., Tensor]  # draw(*shape): float32 on the CPU, uniform in 0..1, the same in every process


@dataclass(frozen=True)
class Sample:
    """A small call of an operator: ``function(**tensors, **options, backend=...)``.

    Attributes:
        tensors: those whose dtypes decide on the kernel, in the order in which `choose` is given them; float32 on the
            CPU, rounded to the dtypes in question.
        options: all other arguments; tensors among them keep their dtype.
        gradients: names of the arguments whose gradients are compared.
    """

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()


def odd_image(draw: Draw, height: int, width: int) -> Tensor:
    """[2, 3, height, width] with what kernels have stumbled over: a flat image but for one pixel, around which nothing
    deviates; and one with a flat and a saturated region and a pixel that stands out of each.
    """
    images = draw(2, 3, height, width)
    images[0] = draw(3, 1, 1)
    images[0, :, height // 2, width // 2] = draw(3)
    images[1, :, : height // 2, : width // 2] = 0.3
    images[1, :, height // 2 :, width // 2 :] = 1.0
    images[1, :, height // 4, width // 4] = 0.8
    images[1, :, 3 * height // 4, 3 * width // 4] = 0.0
    return images


class CheckRow(NamedTuple):
    """One row of `self_check`: ``backend`` against the reference on a small case of ``operator``.

    ``error`` is that of the result or gradient that comes closest to its ``tolerance`` or exceeds it most; NaN where
    it is not finite or an exception came instead. ``milliseconds`` are those of the whole check.
    """

    operator: str
    backend: str
    device: str
    dtype: str
    direction: str
    error: float
    tolerance: float
    milliseconds: float
    ok: bool
    reason: str


class CheckTable(list[CheckRow]):
    """The rows of `self_check`; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing to check: only the reference can run"
        titles = ("operator", "backend", "device", "dtype", "direction", "error", "allowed", "ms", "agrees")
        cells = [
            (*row[:5], f"{row.error:.1e}", f"{row.tolerance:.1e}", f"{row.milliseconds:.0f}", "yes" if row.ok else "no")
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(titles, *cells)]
        lines = []
        for line, reason in zip([titles, *cells], ["", *(row.reason for row in self)]):
            said = f"{line[-1]}: {reason}" if reason else line[-1]
            parts = [text.rjust(width) if 5 <= at < 8 else text.ljust(width) for at, (text, width) in
                     enumerate(zip(line[:-1], widths))]  # fmt: skip
            lines.append("  ".join([*parts, said]))
        return "\n".join(lines)


CheckRow.__module__ = CheckTable.__module__ = "afa_kernels"  # where they are public

# --- what is known ----------------------------------------------------------------------------------------------------

# operator -> its samples
samples: dict[str, Callable[[Draw], list[Sample]]] = {}

_proven: set[tuple] = set()  # (operator, backend, device, first dtype, last dtype, with gradients)
_failures: dict[tuple, str] = {}  # (operator, backend, device) -> reason
_lock = threading.RLock()  # a signal handler may come in while its own thread waits for a check
_here = threading.local()


def concerns(backend: str, device: torch.device) -> bool:
    """Whether a backend has to prove itself on a device before its first use there."""
    return device.type == "cuda"


def off() -> bool:
    return os.environ.get("AFA_SELF_CHECK", "").lower() in ("0", "off", "false", "no")


def untimely() -> str | None:
    """Why no check can be made now, or None.

    A check waits for the device, which a capture forbids; the backward of a check would wait for the thread of
    autograd that a backward is running in.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is not None and task() != -1:
        return "a backward is running"
    return None


# torch.compile calls these two while it traces and keeps the answers: the backend is part of the compiled graph. It
# must not see the set, or it would compile anew whenever that grows.
@constant_when_traced
def proven(*key: Any) -> bool:
    """Whether ``(operator, backend, device, first dtype, last dtype, with gradients)`` needs no `verdict` any more."""
    return key in _proven


@constant_when_traced
def verdict(
    operator: str, backend: str, device: torch.device, first: torch.dtype, last: torch.dtype, gradients: bool
) -> str | None:
    """Why a backend that says it can run must not, or None; ``first`` and ``last`` are the dtypes of the tensors that
    decide.

    Within a capture or a backward nothing is checked, and the backend counts as able: both come after a call outside.
    """
    key = operator, backend, device, first, last, gradients
    if getattr(_here, "checking", False) or off():
        return None
    place = key[:3]
    if place not in _failures:
        if not concerns(backend, device):
            _proven.add(key)
            return None
        if untimely():
            return None
        with _lock:  # whoever comes second waits, and finds the answer
            new = key not in _proven and place not in _failures
            if new:
                check(*key)
        if new:
            warn(place)
    return _failures.get(place)


def with_index(device: torch.device) -> torch.device:
    """A device as its tensors name it: ``cuda`` is the current one."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def failure(operator: str, backend: str, device: torch.device) -> str | None:
    """Why a check has ruled a backend out on a device, or None."""
    return _failures.get((operator, backend, with_index(device))) if _failures and not off() else None


def needed(backend: str, device: torch.device) -> bool:
    """Whether calls check a backend on a device."""
    return concerns(backend, device) and not off()


def warn(place: tuple[str, str, torch.device]) -> None:
    operator, backend, device = place
    if place in _failures:
        warnings.warn(
            f"the {backend} backend of {operator} is not used on {device}: {_failures[place]}"
            " (`afa doctor --check` compares all of them; AFA_SELF_CHECK=0 takes them unchecked)",
            RuntimeWarning,
            stacklevel=3,
        )


def forget(operator: str, backend: str, device: torch.device) -> None:
    """What was found out about a backend on a device."""
    place = operator, backend, device
    _failures.pop(place, None)
    _proven.difference_update([key for key in list(_proven) if key[:3] == place])


# --- the check --------------------------------------------------------------------------------------------------------


def check(
    operator: str, backend: str, device: torch.device, first: torch.dtype, last: torch.dtype, gradients: bool
) -> CheckRow:
    """Runs a check in a thread of its own and keeps what comes out."""
    place, begun, found = (operator, backend, device), time.perf_counter(), []
    thread = threading.Thread(
        target=_compare, args=(found, *place, (first, last), gradients), name=f"afa self check of {operator}"
    )
    with _lock:
        with _without(WISHES):
            thread.start()
            thread.join()
        error, tolerance, reason, final = found
        if reason is None and place not in _failures:
            # A backward comes after its forward.
            _proven.update((*place, first, last, way) for way in {False, gradients})
        elif reason is not None and final:
            first_reason = _failures.get(place, f"self check failed: {reason}")
            forget(*place)
            _failures[place] = first_reason
    names = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in (first, last))
    return CheckRow(
        operator,
        backend,
        str(device),
        ", ".join(names),
        "backward" if gradients else "forward",
        error,
        tolerance,
        1e3 * (time.perf_counter() - begun),
        reason is None,
        "" if reason is None else f"self check failed: {reason}",
    )


def _compare(
    found: list, operator: str, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], gradients: bool
) -> None:
    """Leaves error, tolerance, reason and whether that is final in ``found``."""
    _here.checking = True  # the operator that is called below must not be checked again
    worst = (-1.0, 0.0, max(TOLERANCES[dtype] for dtype in dtypes), None)
    wanted = "backward" if gradients else "forward"
    try:
        generator = torch.Generator("cpu").manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

        with _on(device):
            for sample in samples[operator](draw):
                both = gradients and bool(sample.gradients)
                for direction, name, error, tolerance in _deviations(sample, backend, device, dtypes, both, draw):
                    excess = error / tolerance if math.isfinite(error) else math.inf
                    # The row of a backward shows its gradients, unless its forward is wrong.
                    if excess > worst[0] and (excess > 1 or direction == wanted):
                        worst = (excess, error, tolerance, (direction, name))
        excess, error, tolerance, where = worst
        reason = None
        if excess > 1:
            kind = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
            differs = "is not finite"
            if math.isfinite(error):
                differs = f"differs from the reference by {error:.2g} (allowed {tolerance:.2g})"
            reason = f"{kind} {where[0]} {differs}, {where[1]}"
        found[:] = error, tolerance, reason, True
    except BaseException as error:
        said = " ".join(str(error).split())[:300]
        # Neither a full device nor the capture of another thread's graph says anything about the kernel. Torch, Triton
        # and our module each have their own exception for them.
        final = not isinstance(error, MemoryError) and not any(words in said.lower() for words in PASSING)
        found[:] = math.nan, worst[2], f"{type(error).__name__}: {said}", final


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Environment variables as if they were not set."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On a stream of its own, which waits for nothing that the caller has queued."""
    if device.type != "cuda":
        yield
        return
    # A debugging mode of the whole process, which would take the check's own waiting for the caller's.
    watched = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(watched)


def _call(
    sample: Sample, tensors: dict[str, Tensor], place: Callable[[Tensor], Tensor], backend: str, gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the arguments whose gradients are asked for."""
    arguments = {name: place(value) if isinstance(value, Tensor) else value for name, value in sample.options.items()}
    arguments.update((name, place(value)) for name, value in tensors.items())
    leaves = [arguments[name].requires_grad_() for name in sample.gradients] if gradients else []
    with torch.set_grad_enabled(gradients):
        results = sample.function(**arguments, backend=backend)
    return (list(results) if isinstance(results, tuple) else [results]), leaves


def _deviations(
    sample: Sample, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], gradients: bool, draw: Draw
) -> Iterator[tuple[str, str, float, float]]:
    """Direction, which result or gradient, error and tolerance of everything a sample gives."""
    tensors = {name: value.to(dtype) for (name, value), dtype in zip(sample.tensors.items(), dtypes)}
    got, leaves = _call(sample, tensors, lambda tensor: tensor.detach().to(device, copy=True), backend, gradients)
    want, wide_leaves = _call(
        sample,
        tensors,
        lambda tensor: tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True),
        "reference",
        gradients,
    )
    allowed = max(TOLERANCES[dtype] for dtype in dtypes)
    operator = sample.function.__name__
    for number, (mine, true) in enumerate(zip(got, want, strict=True)):
        which = f"result {number} of {operator}" if len(got) > 1 else f"the result of {operator}"
        yield "forward", which, _error(mine, true), allowed if true.is_floating_point() else COUNTS
    if not gradients:
        return
    # The gradients handed in are rounded to the dtypes of the results, on both sides. That of a mean over many pairs is
    # scaled up, as a loss in half precision is, whose gradients lie below its range.
    kept = [number for number, result in enumerate(got) if result.is_floating_point()]
    scales = [1 if got[number].dim() else LOSS_SCALE for number in kept]
    ends = [(scale * (draw(*got[number].shape) + 0.5)).to(got[number].dtype) for number, scale in zip(kept, scales)]
    mine = torch.autograd.grad([got[number] for number in kept], leaves, [end.to(device) for end in ends])
    true = torch.autograd.grad([want[number] for number in kept], wide_leaves, [end.double() for end in ends])
    for name, my_gradient, true_gradient in zip(sample.gradients, mine, true, strict=True):
        yield "backward", f"the gradient of {name} in {operator}", _error(my_gradient, true_gradient), allowed


def _error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN where that is not finite."""
    got, want = got.detach().cpu().double(), want.detach().double()
    if got.shape != want.shape:
        raise ValueError(f"the result has shape {tuple(got.shape)}, the reference {tuple(want.shape)}")
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.nan
