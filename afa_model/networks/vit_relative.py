"""Relative positions at any size of image, for models whose scores have a bias by distance (BEiT, timm's relpos ViTs).

Such a model is made for one grid of patches: it keeps a table (or a small network) that gives a bias for each distance
on that grid, and which entry each pair of tokens takes. Here both are those of the grid of each pass: which entry a pair
takes comes from timm's ``set_window_size``, and tables are resampled to its distances (bicubic).

The bias is added to the scores inside fused attention. It is no part of queries and keys, nor of the affinity.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from .vit_attention import Taker, captured

MOST_SIZES = 8  # of images; what is kept for one grows with the square of its patches
_TABLE = "relative_position_bias_table"
_ENTRIES = "entries"  # how many a table has on a grid
_BY_SIZE = ("window_size", "window_area", "bias_shape")
_METHODS = ("_get_rel_pos_bias", "get_bias", "forward")  # that give a bias, the first that a module has


def any_size(model: nn.Module, taker: Taker) -> bool:
    """Make relative positions those of the grid of ``taker``'s pass -> whether the model has any; else it stays as it is.
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
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how timm resamples the table, of which only the length is taken
            sized = copy.deepcopy(self.template)
            sized.set_window_size(grid)
            values = {name: getattr(sized, name) for name in _BY_SIZE if hasattr(sized, name)}
            values |= {name: value.to(device) for name, value in sized.named_buffers()}
        table = getattr(sized, _TABLE, None)
        return values if table is None else values | {_ENTRIES: len(table)}


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
        return method(_AtSize(self.module, grid, values))


class _AtSize:
    """A module as its own method sees it where images have the size that it was made for."""

    def __init__(self, module: nn.Module, grid: tuple[int, int], values: dict[str, Any]) -> None:
        self.module, self.values = module, values
        table = getattr(module, _TABLE, None)
        if table is not None:
            shape = (values[_ENTRIES], table.shape[1])
            self.values = values | {_TABLE: resize_rel_pos_bias_table_simple(table, grid, shape)}

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__["values"]
        return values[name] if name in values else getattr(self.__dict__["module"], name)
