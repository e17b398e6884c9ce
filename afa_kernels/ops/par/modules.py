"""PAR and PAMR as modules, with the constructors, forwards, buffers and attributes the field's repositories
already use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.checks import MOST_STEPS, check_dilations, check_int
from .functional import check_factors, check_resize, refine


def _neighbour_kernel(*, difference: bool) -> Tensor:
    """[8, 1, 3, 3]: one 3x3 kernel per neighbour that picks it out, minus the centre when ``difference``."""
    picks = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]]
    if difference:
        picks = -picks
        picks[:, 4] = 1
    return picks.view(8, 1, 3, 3)


class PAR(nn.Module):
    """Drop-in for AFA's ``PAR``: ``PAR(dilations, num_iter)(imgs, masks)``, argument names, buffer and attributes
    kept.

    forward(imgs [B, 3, H, W] in 0..1, masks [B, C, h, w]) -> [B, C, H, W]; other channels and batches as
    `afa_kernels.par`. The attributes keep their published meaning and may be changed: ``w1`` (0.3) is the smoothing of
    both terms, ``w2`` (0.01) the position term's share.

    Examples:
        >>> import torch
        >>> from afa_kernels import PAR
        >>> refine = PAR(dilations=[1, 2, 4, 8, 12, 24], num_iter=10)
        >>> refine(torch.rand(1, 3, 64, 64), torch.rand(1, 21, 32, 32)).shape
        torch.Size([1, 21, 64, 64])
    """

    def __init__(self, dilations: Sequence[int], num_iter: int, *, resize: str = "mask") -> None:
        super().__init__()
        self.dilations = check_dilations(dilations)
        self.num_iter = check_int(num_iter, "num_iter", 0, MOST_STEPS)
        self.resize = check_resize(resize)
        self.register_buffer("kernel", _neighbour_kernel(difference=False))
        self.dim = 2
        self.w1 = 0.3
        self.w2 = 0.01
        self.pos = self._positions()

    def _positions(self) -> Tensor:
        """[1, 1, 8*D, 1, 1]: distance of every tap in pixels."""
        ring = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 2.0]).sqrt()
        return torch.cat([ring * dilation for dilation in self.dilations]).view(1, 1, -1, 1, 1)

    def forward(self, imgs: Tensor, masks: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        # The published class calls both smoothing factors w1 and the share of the position term w2.
        factors = check_factors(self.w1, self.w1, self.w2)
        return refine(imgs, masks, self.dilations, self.num_iter, factors, None, None, self.resize, ("imgs", "masks"))

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}, num_iter={self.num_iter}"


def _holding(kernel: Tensor) -> nn.Module:
    """A module with a buffer ``kernel``, for the published state keys; none of a class of ours, whose place a pickle of
    the whole would remember.
    """
    module = nn.Module()
    module.register_buffer("kernel", kernel)
    return module


class PAMR(nn.Module):
    """Drop-in for 1-stage-wseg's ``PAMR``: ``PAMR(num_iter=1, dilations=[1])(x, mask)``, state keys kept.

    forward(x [B, 3, H, W] in 0..1, mask [B, C, h, w]) -> [B, C, H, W]; see `afa_kernels.pamr`. Note the argument
    order of the constructor, the reverse of `PAR`'s.

    Examples:
        >>> import torch
        >>> from afa_kernels import PAMR
        >>> refine = PAMR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
        >>> refine(torch.rand(1, 3, 64, 64), torch.rand(1, 21, 32, 32)).shape
        torch.Size([1, 21, 64, 64])
    """

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] = (1,), *, resize: str = "mask") -> None:
        super().__init__()
        self.num_iter = check_int(num_iter, "num_iter", 0, MOST_STEPS)
        self.resize = check_resize(resize)
        self.dilations = check_dilations(dilations)
        self.aff_x = _holding(_neighbour_kernel(difference=True))
        self.aff_m = _holding(_neighbour_kernel(difference=False))
        self.aff_std = _holding(torch.eye(9).view(9, 1, 3, 3))

    def forward(self, x: Tensor, mask: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        return refine(x, mask, self.dilations, self.num_iter, [], None, None, self.resize, ("x", "mask"))

    def extra_repr(self) -> str:
        return f"num_iter={self.num_iter}, dilations={self.dilations}"


# Pickles of whole modules keep the public path, whatever the files are called.
PAR.__module__ = PAMR.__module__ = "afa_kernels"
