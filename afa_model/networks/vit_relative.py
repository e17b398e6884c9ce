"""Relative positions at any size of image, for models whose scores have a bias by distance (BEiT, timm's relpos ViTs).

Such a model is made for one grid of patches: it keeps a table (or a small network) that gives a bias for each distance
on that grid, and which entry each pair of tokens takes. Here both are those of the grid of each pass: which entry a
pair takes comes from timm's ``set_window_size``, and tables are resampled by its rule, in which near distances keep
their entries and far ones move together or apart. The rule is linear in the table and takes rows and columns in turn:
here it is two small matrices, through which the table learns at any size.

The bias is added to the scores inside fused attention. It is no part of queries and keys, nor of the affinity.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from .vit_attention import Taker, captured

MOST_SIZES = 8  # of images; what is kept for one grows with the square of its patches
_TABLE = "relative_position_bias_table"
_ROWS, _COLUMNS = "rows", "columns"  # what resamples a table: matrices [distances on the grid, in the table]
_BY_SIZE = ("window_size", "window_area", "bias_shape")
_METHODS = ("_get_rel_pos_bias", "get_bias", "forward")  # that give a bias, the first that a module has


def any_size(model: nn.Module, taker: Taker) -> bool:
    """Make relative positions those of the grid of ``taker``'s pass -> whether it has any; else it stays as it is.
    """
    sizes: dict[type, _Sizes] = {}
    modules = [module for module in model.modules() if _is_relative(module)]
    for module in modules:
        of_class = sizes.setdefault(type(module), _Sizes(module))
        name = next(name for name in _METHODS if hasattr(module, name))
        setattr(module, name, _Bias(module, name, taker, of_class).at_size)
    if modules:
        model.patch_embed.strict_img_size = False
    return bool(modules)


def _is_relative(module: nn.Module) -> bool:
    return hasattr(module, "set_window_size") and getattr(module, "relative_position_index", None) is not None


class _Sizes:
    """Which entry each pair of tokens takes, for all modules of a class."""

    def __init__(self, module: nn.Module) -> None:
        self.template = copy.deepcopy(module)
        self.template._modules.clear()
        if getattr(module, _TABLE, None) is not None:  # one head tells how many distances there are
            self.template._parameters[_TABLE] = nn.Parameter(getattr(module, _TABLE).detach()[:, :1].clone())
        self.made: dict[Any, dict[str, Any]] = {}
        self.held: list[dict[str, Any]] = []  # in memory that CUDA graphs read

    def at(self, grid: tuple[int, int], like: Tensor) -> dict[str, Any]:
        """What differs from the template on a grid, by attribute, on the device of ``like``."""
        key = (grid, like.device)
        found = self.made.pop(key, None)
        if found is None:
            found = self._make(grid, like.device)
        self.made[key] = found
        if captured():
            self.held.append(found)
        while len(self.made) > MOST_SIZES:
            self.made.pop(next(iter(self.made)))
        return found

    @torch.compiler.disable
    def _make(self, grid: tuple[int, int], device: torch.device) -> dict[str, Any]:
        # The next pass may want a gradient, and whoever asks for sizes first may not.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how timm resamples the table
            sized = copy.deepcopy(self.template)
            sized.set_window_size(grid)
            values = {name: getattr(sized, name) for name in _BY_SIZE if hasattr(sized, name)}
            values |= {name: value.to(device) for name, value in sized.named_buffers()}
            if getattr(sized, _TABLE, None) is not None:
                for name, ours, theirs in zip((_ROWS, _COLUMNS), self.template.window_size, grid):
                    values[name] = _resampling(ours, theirs, device)
        return values


def _resampling(ours: int, theirs: int, device: torch.device) -> Tensor:
    """What timm makes of a table's distances along one side, from a grid of ``ours`` cells to one of ``theirs``:
    [2 theirs - 1, 2 ours - 1] float32, whose rows sum to 1. A side that stays is resampled with one that does not.
    """
    count, across = 2 * ours - 1, 5  # constant across, where another size makes timm resample
    each = torch.eye(count, device="meta" if device.type == "meta" else "cpu")[:, :, None].repeat(1, 1, across)
    shape = (count, 2 * theirs - 1, 3)
    return resize_rel_pos_bias_table(each, (theirs, 2), shape)[:, :, 0].T.contiguous().to(device)


class _Bias:
    """What gives a module's bias, on the grid of the pass that is under way."""

    def __init__(self, module: nn.Module, method: str, taker: Taker, sizes: _Sizes) -> None:
        self.module, self.method, self.taker, self.sizes = module, method, taker, sizes

    def at_size(self) -> Tensor:
        method = getattr(type(self.module), self.method)
        grid = self.taker.grid()
        if grid is None or grid == tuple(self.module.window_size):
            return method(self.module)
        values = self.sizes.at(grid, self.module.relative_position_index)
        return method(_AtSize(self.module, values))


class _AtSize:
    """A module as its own method sees it where images have the size that it was made for."""

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        own = dict(module.named_buffers())
        # Made in single precision; the module may have another.
        self.module, self.values = module, {
            name: value.to(own[name].dtype) if name in own else value for name, value in values.items()
        }
        table = getattr(module, _TABLE, None)
        if table is not None:
            self.values[_TABLE] = _resampled(table, module.window_size, values[_ROWS], values[_COLUMNS])

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__["values"]
        return values[name] if name in values else getattr(self.__dict__["module"], name)


def _resampled(table: Tensor, window: tuple[int, int], rows: Tensor, columns: Tensor) -> Tensor:
    """Table [distances of ``window`` (and the prefix tokens' entries), heads] -> likewise, of another grid. In single
    precision at least, as timm does it, also under autocast.
    """
    down, across = (2 * side - 1 for side in window)
    kept = table[down * across :]
    kind = table.device.type
    single = torch.promote_types(table.dtype, torch.float32)
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if casts else nullcontext():
        distances = table[: down * across].T.unflatten(1, (down, across)).to(single)
        distances = rows.to(single) @ distances @ columns.to(single).T
    return torch.cat([distances.flatten(1).T.to(table.dtype), kept])
