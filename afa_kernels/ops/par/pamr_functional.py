"""Pixel-adaptive mask refinement, of 1-stage-wseg: PAR without its position term, with another smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from .functional import refine, weights_of


@overload
def pamr(
    images: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = ...,
    num_iter: int = ...,
    *,
    class_mask: Tensor | None = ...,
    resize: str = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def pamr(
    images: Tensor,
    masks: Sequence[Tensor],
    dilations: Sequence[int] = ...,
    num_iter: int = ...,
    *,
    class_mask: Sequence[Tensor | None] | None = ...,
    resize: str = ...,
    backend: str | None = ...,
) -> list[Tensor]: ...
def pamr(
    images: Tensor,
    masks: Tensor | Sequence[Tensor],
    dilations: Sequence[int] = (1,),
    num_iter: int = 1,
    *,
    class_mask: Tensor | Sequence[Tensor | None] | None = None,
    resize: str = "mask",
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020, Eq. 5-6). Arguments, result and errors as
    `par`.

    Examples:
        >>> import torch
        >>> from afa_kernels import pamr
        >>> pamr(torch.rand(1, 3, 64, 64), torch.rand(1, 21, 64, 64), dilations=(1, 2, 4), num_iter=5).shape
        torch.Size([1, 21, 64, 64])
    """
    return refine(images, masks, dilations, num_iter, [], class_mask, backend, resize)


def pamr_weights(images: Tensor, dilations: Sequence[int] = (1,), *, backend: str | None = None) -> Tensor:
    """The weights of `pamr`: images [B, 3, H, W] in 0..1 -> [B, 8*len(dilations), H, W], positive, sum 1. Channels
    as `par_weights`.

    Examples:
        >>> import torch
        >>> from afa_kernels import pamr_weights
        >>> weights = pamr_weights(torch.rand(1, 3, 32, 32), dilations=(1, 2))
        >>> weights.shape, round(weights.sum(1).mean().item(), 4)
        (torch.Size([1, 16, 32, 32]), 1.0)
    """
    return weights_of(images, dilations, [], backend)
