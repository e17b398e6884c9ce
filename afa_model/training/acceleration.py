"""What makes a training step faster on a GPU at the price of a slow start: compiled networks, a CUDA graph."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from ..runtime.notices import notice

Wanted = bool | Literal["auto"]
WORTH_COMPILING = 1000  # steps: compiling takes a minute or two, and saves a fraction of each step
ALIKE = 0.05  # relative difference, or share of pixels of another label, that a graph may have from the eager run


def compiles(wanted: Wanted, device: torch.device, steps: int) -> bool:
    """Whether the networks are compiled in a run of ``steps``: ``auto`` does where Triton compiles for ``device``, a
    GPU, where there is a C compiler for its launchers, and where the run is long enough.
    """
    if wanted != "auto":
        return wanted
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang") or shutil.which("cc")
    return device.type == "cuda" and steps >= WORTH_COMPILING and bool(compiler) and has_triton()


def graphs(wanted: Wanted, device: torch.device, cam_mode: str, refinement: str) -> bool:
    """Whether pseudo-labels are made in a CUDA graph: ``auto`` does on a GPU where a graph can hold them, which noise
    (cam_mode train) and sizes that vary (refinement crf) rule out.
    """
    if wanted != "auto":
        return wanted
    return device.type == "cuda" and cam_mode != "train" and refinement != "crf"


class CompiledNetworks:
    """Backbone and decoder of an :class:`~afa_model.networks.afa.AFA` through ``torch.compile``, where wanted.

        networks = CompiledNetworks(model)
        with networks.in_use():
            out = model(images)

    The model itself stays as it is: same parameter names, eager outside ``in_use``. That is where evaluation
    belongs, whose photographs all have sizes of their own; a training step has few (crop x CAM scales), and
    each is compiled for itself. falls_back: a network that cannot be compiled runs as it is, with a line that says
    so, instead of ending the run. options: for ``torch.compile``.
    """

    def __init__(self, model: nn.Module, *, falls_back: bool = False, **options: Any) -> None:
        self._parts = []
        for part, name in ((model.encoder, "forward_pyramid"), (model.decoder, "forward")):
            if part is not None and hasattr(part, name):
                eager = getattr(part, name)
                compiled = torch.compile(eager, dynamic=False, **options)
                self._parts.append((part, name, _OrEager(compiled, eager) if falls_back else compiled))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model runs its compiled networks inside."""
        for part, name, compiled in self._parts:
            setattr(part, name, compiled)
        try:
            yield
        finally:
            for part, name, _ in self._parts:
                delattr(part, name)


class _OrEager:
    """A compiled function, or from the first time on that it cannot be compiled, the function itself."""

    def __init__(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> None:
        self._run, self._eager = compiled, eager

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        try:
            return self._run(*inputs, **options)
        except Exception as error:
            if not _of_compiling(error):
                raise
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            notice("compile", f"torch.compile failed, the networks run without it ({why}); `compile: false` is silent")
        self._run = self._eager
        return self._run(*inputs, **options)


def _of_compiling(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    return isinstance(error, TorchDynamoException)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


class GraphedFunction:
    """A function of tensors as a CUDA graph: launched in one go, without the host's time for each kernel.

        labels = GraphedFunction(make_labels)
        refined, cam = labels(images, cls_labels)

    The function gives a tuple of tensors (or None), depends on nothing but its inputs and tensors that keep
    their place in memory (weights that an optimizer updates in place do), and never waits for the device. It
    is captured once for each combination of shapes, dtypes and ``key``, after ``warmup`` ordinary runs on a
    side stream. Results are copies: the next call does not change them.

    Inputs that are not on a GPU go through the function as it is. falls_back: so do all others from then on, with a
    line that says so, where a graph cannot be captured, or differs from the function when it is first replayed.
    """

    def __init__(self, function: Callable[..., tuple], warmup: int = 3, *, falls_back: bool = False) -> None:
        self._function, self._warmup, self._falls_back = function, warmup, falls_back
        self._graphs: dict[Any, tuple[Any, list[Tensor | None], tuple]] = {}
        self._pool: Any = None
        self._given_up = False

    def __call__(self, *inputs: Tensor | None, key: Any = None, **options: Any) -> tuple:
        """``options`` are passed on; they must be the same for the same ``key``."""
        if self._given_up or not _on_gpu(inputs[0]):
            return self._function(*inputs, **options)
        which = key, *((x.shape, x.dtype, x.stride()) if x is not None else None for x in inputs)
        if which in self._graphs:
            return self._replay(which, inputs)
        if not self._falls_back:
            self._graphs[which] = self._capture(inputs, options)
            return self._replay(which, inputs)
        return self._tried(which, inputs, options)

    def _tried(self, which: Any, inputs: tuple, options: dict[str, Any]) -> tuple:
        """What the function gives, and a graph for the next time if one can be had that gives the same."""
        wanted = self._function(*inputs, **options)
        try:
            self._graphs[which] = self._capture(inputs, options)
            alike = all(map(_alike, self._replay(which, inputs), wanted))
            why = "" if alike else "its results differ"
        except RuntimeError as error:  # memory that a graph needs for itself is among them
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if why:
            notice("graph", f"no CUDA graph for the pseudo-labels ({why}); `cuda_graph: false` is silent")
            self._given_up, self._pool = True, None
            self._graphs.clear()
            torch.cuda.empty_cache()
        return wanted

    def _replay(self, which: Any, inputs: tuple) -> tuple:
        graph, places, outputs = self._graphs[which]
        for place, value in zip(places, inputs):
            if place is not None:
                place.copy_(value, non_blocking=True)
        graph.replay()
        copies = [None if out is None else out.clone() for out in outputs]
        return type(outputs)(*copies) if hasattr(outputs, "_fields") else tuple(copies)

    def _capture(self, inputs: tuple, options: dict[str, Any]) -> tuple[Any, list[Tensor | None], tuple]:
        places = [None if x is None else x.detach().clone() for x in inputs]
        # Autocast would keep half-precision copies of weights from outside the capture, or from one replay for
        # the next; without its cache every replay casts the weights of its day.
        precision = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), precision:
            for _ in range(self._warmup):
                self._function(*places, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what the threads of a data loader or of NCCL do meanwhile is their own affair.
        with precision, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._function(*places, **options)
        self._pool = self._pool or graph.pool()
        return graph, places, outputs


def _alike(got: Tensor | None, wanted: Tensor | None) -> bool:
    """Whether two results are the same but for rounding: numbers by their norm, labels by the share that differs."""
    if got is None or wanted is None:
        return got is wanted
    if not got.is_floating_point():
        return got.shape == wanted.shape and float((got != wanted).double().mean().nan_to_num(0.0)) <= ALIKE
    error = (got.double() - wanted.double()).norm()
    return bool(error <= ALIKE * wanted.double().norm())
