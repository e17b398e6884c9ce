"""What makes a training step faster on a GPU at the price of a slow start: compiled networks, a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CompiledNetworks:
    """Backbone and decoder of an :class:`~afa_model.networks.afa.AFA` through ``torch.compile``, where wanted.

        networks = CompiledNetworks(model)
        with networks.in_use():
            out = model(images)

    The model itself stays as it is: same parameter names, eager outside ``in_use``. That is where evaluation
    belongs, whose photographs all have sizes of their own; a training step has few (crop x CAM scales), and
    each is compiled for itself. options: for ``torch.compile``.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self._parts = []
        for part, name in ((model.encoder, "forward_pyramid"), (model.decoder, "forward")):
            if part is not None and hasattr(part, name):
                compiled = torch.compile(getattr(part, name), dynamic=False, **options)
                self._parts.append((part, name, compiled))

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

    Inputs that are not on a GPU go through the function as it is.
    """

    def __init__(self, function: Callable[..., tuple], warmup: int = 3) -> None:
        self._function, self._warmup = function, warmup
        self._graphs: dict[Any, tuple[Any, list[Tensor | None], tuple]] = {}
        self._pool: Any = None

    def __call__(self, *inputs: Tensor | None, key: Any = None, **options: Any) -> tuple:
        """``options`` are passed on; they must be the same for the same ``key``."""
        if not _on_gpu(inputs[0]):
            return self._function(*inputs, **options)
        which = key, *((x.shape, x.dtype, x.stride()) if x is not None else None for x in inputs)
        if which not in self._graphs:
            self._graphs[which] = self._capture(inputs, options)
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
