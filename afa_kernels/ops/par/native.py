"""The native kernels of PAR and PAMR, called: the ``native`` backend. Factors are three for PAR, none for PAMR."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import address, native, view, workspace
from ..diffusion import plans


def par(
    images: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    factors: list[float],
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    out = torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)
    tensors = view(images), view(masks)
    if native_module.on_cuda(masks):
        place = native_module.cuda_stream(masks.device)
        kept = None if class_mask is None else class_mask.contiguous()
        # bfloat16 masks lose four times more in their own rounding than half-precision weights cost; float16 masks
        # do not.
        options = num_iter, transpose, masks.dtype == torch.bfloat16
        plans.run(
            "par",
            masks.device,
            lambda: native.par_cuda_workspace(*tensors, dilations, *options, place[0]),
            lambda scratch: native.par_cuda(
                *tensors, view(out), dilations, factors, address(kept), *options, scratch, *place
            ),
        )
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.par_cpu_workspace(*tensors, dilations, threads), masks.device)
    present = [] if class_mask is None else class_mask.flatten().tolist()
    options = num_iter, transpose, scratch.data_ptr(), threads
    native.par_cpu(*tensors, view(out), dilations, factors, present, *options)
    return out


def par_weights(images: Tensor, dilations: list[int], factors: list[float]) -> Tensor:
    shape = (images.shape[0], 8 * len(dilations), *images.shape[2:])
    out = torch.empty(shape, dtype=images.dtype, device=images.device)
    if native_module.on_cuda(images):
        native.par_weights_cuda(view(images), view(out), dilations, factors, *native_module.cuda_stream(images.device))
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.par_weights_cpu_workspace(view(images), dilations, threads), images.device)
    native.par_weights_cpu(view(images), view(out), dilations, factors, scratch.data_ptr(), threads)
    return out
