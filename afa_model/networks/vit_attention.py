"""Queries and keys of a transformer's last blocks, taken where the model itself computes them.

A block of timm's ends in one call of ``scaled_dot_product_attention``: what that call is given are the queries and keys
after their norms and rotary positions, unscaled. Seeing the call takes no second product with the weights, knows no
block by its class, and leaves attention fused; a relative position's bias, which is added to the scores, is no part of
them.

The blocks keep their class, their parameters and the names of these; only their ``forward`` is another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Taken = list[tuple[Tensor, Tensor]]  # query and key of each call
Grid = tuple[int, int]


def _query_and_key(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query, key


class _Seeing(TorchFunctionMode):
    """Inside, what fused attention is called with goes into a list as well."""

    def __init__(self, taken: Taken) -> None:
        super().__init__()
        self.taken = taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.taken.append(_query_and_key(*args, **kwargs))
        return func(*args, **kwargs)


def captured() -> bool:
    """Whether a CUDA graph is being made of what runs."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_program() -> bool:
    """Whether what runs becomes a program, compiled or exported, which may be for images of other sizes too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _pass() -> int:
    """Which pass a block is run by: one a thread, and one while it is compiled."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Taker:
    """Takes the queries and keys of blocks while a pass is under way.

        taker = Taker(model.blocks[-2:])
        taken = taker.start(grid)
        try: model(images)
        finally: taker.stop()

    What recomputes a block in a backward pass is none of it: nothing is kept then.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.under_way: dict[int, tuple[Taken, Grid]] = {}
        for block in blocks:
            for module in block.modules():  # timm can be told not to fuse; then there would be nothing to see
                if hasattr(module, "fused_attn"):
                    module.fused_attn = True
            block.forward = _Tap(block, self).forward

    def start(self, grid: Grid) -> Taken:
        """A pass on a grid of patches begins -> the list that its queries and keys go into."""
        taken: Taken = []
        self.under_way[_pass()] = (taken, grid)
        return taken

    def stop(self) -> None:
        self.under_way.pop(_pass(), None)

    def taken(self) -> Taken | None:
        """The list of the pass under way, if there is one."""
        return self.under_way.get(_pass(), (None, None))[0]

    def grid(self) -> Grid | None:
        """Its grid."""
        return self.under_way.get(_pass(), (None, None))[1]


class _Tap:
    """The ``forward`` of a block whose attention is seen."""

    def __init__(self, block: nn.Module, taker: Taker) -> None:
        self.block, self.taker = block, taker

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        taken = self.taker.taken()
        if taken is None:
            return forward(self.block, *args, **kwargs)
        with _Seeing(taken):
            return forward(self.block, *args, **kwargs)
