"""Position embeddings of a Vision Transformer at the sizes that images have.

timm resamples them (bicubic, antialiased: ``resample_abs_pos_embed``) and makes rotary ones anew in every pass. Where
they cannot change they are made once for a size, and kept: rotary ones that nothing learns always; what learns in eval
mode without gradients on the CPU, as long as its values are what they were. (Fused optimisers and writes through
``.data`` leave a tensor's version as it is; and a look at the values would wait for any other device, where what learns
is made in every pass.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from .vit_attention import captured, is_program

MOST_SIZES = 16  # of images, whose positions are kept


def keep_positions(model: nn.Module) -> None:
    """Make a timm model that takes any size of image keep its position embeddings by size."""
    if getattr(model, "dynamic_img_size", False) and hasattr(model, "_pos_embed"):
        model._pos_embed = Positions(model).add


class Positions:
    """What a model's ``_pos_embed`` does, with embeddings that are kept. A program makes its own.

    timm makes rotary embeddings on the host, where no CUDA graph can: that finds those of the passes before it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[Any, tuple[Any, Tensor, list[Tensor]]] = {}  # of what, the result, what learns as it was
        self.held: list[Tensor] = []  # in memory that CUDA graphs read

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "kept": {}, "held": []}

    def add(self, x: Tensor) -> Any:
        """Patches [B, h, w, C] -> tokens, and what else the model's own method gives."""
        model, add = self.model, type(self.model)._pos_embed
        if is_program():
            return add(model, x)
        grid, own, rope = (x.shape[1], x.shape[2]), getattr(model, "pos_embed", None), getattr(model, "rope", None)
        settled: dict[str, Any] = {}
        if own is not None and _constant(model, [own], learns=True):
            settled["pos_embed"] = self._keep(("own", grid, x), [own], lambda: self._resampled(own, grid))
            settled["patch_embed"] = _Grid(grid)
        if rope is not None:
            sources = [*rope.parameters(), *rope.buffers()]
            if _constant(rope, sources, learns=bool(list(rope.parameters()))):
                made = self._keep(("rotary", grid, x), sources, lambda: rope.get_embed(shape=grid))
                settled["rope"] = _Rotary(made)
        return add(_Settled(model, settled) if settled else model, x)

    def _resampled(self, own: Tensor, grid: tuple[int, int]) -> Tensor:
        prefix = 0 if getattr(self.model, "no_embed_class", False) else self.model.num_prefix_tokens
        return resample_abs_pos_embed(own, grid, self.model.patch_embed.grid_size, prefix)

    def _keep(self, what: tuple[str, tuple[int, int], Tensor], sources: Sequence[Tensor], make: Callable) -> Tensor:
        name, grid, like = what
        key = (name, grid, like.device, like.dtype)
        state = tuple((source.data_ptr(), source._version) for source in sources)
        learned = [source for source in sources if isinstance(source, nn.Parameter)]
        found = self.kept.pop(key, None)
        if found is None or found[0] != state or not all(map(torch.equal, found[2], learned)):
            with torch.inference_mode(False), torch.no_grad():  # the next pass may want a gradient of what uses it
                found = (state, make(), [source.clone() for source in learned])
        self.kept[key] = found  # the last used is the last to go
        if captured():
            self.held.append(found[1])
        while len(self.kept) > 2 * MOST_SIZES:
            self.kept.pop(next(iter(self.kept)), None)
        return found[1]


def _constant(module: nn.Module, sources: Sequence[Tensor], learns: bool) -> bool:
    """Whether what a module makes of ``sources`` is the same until they change."""
    if any(source.is_meta or source.is_inference() for source in sources):
        return False
    if module.training and getattr(module, "aug_active", False):  # noise of DINOv3's coordinates
        return False
    if learns and any(source.device.type != "cpu" for source in sources):
        return False
    wants_gradient = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    return not learns or not (module.training or wants_gradient or captured())


class _Settled:
    """A model as its own ``_pos_embed`` sees it where images have just the size that its positions are for."""

    def __init__(self, model: nn.Module, settled: dict[str, Any]) -> None:
        self.__dict__.update(settled)
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Grid:
    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid_size = grid


class _Rotary:
    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        return self.embedding
