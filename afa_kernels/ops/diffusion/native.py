"""The native kernels of the diffusion, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.checks import FARTHEST
from ...core.native_module import address, native, view, workspace
from . import plans


def diffuse(
    weights: Tensor,
    masks: Tensor,
    offsets: Tensor,
    num_iter: int,
    border: str,
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    out = torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)
    taps = offsets.flatten().clamp(-FARTHEST, FARTHEST).tolist()
    tensors = view(weights), view(masks)
    if native_module.on_cuda(masks):
        place = native_module.cuda_stream(masks.device)
        kept = None if class_mask is None else class_mask.contiguous()
        options = address(kept), num_iter, border == "zero", transpose
        plans.run(
            "diffuse",
            masks.device,
            lambda: native.diffuse_cuda_workspace(*tensors, taps, num_iter, transpose, place[0]),
            lambda scratch: native.diffuse_cuda(*tensors, view(out), taps, *options, scratch, *place),
        )
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.diffuse_cpu_workspace(*tensors, taps, threads), masks.device)
    present = [] if class_mask is None else class_mask.flatten().tolist()
    options = num_iter, border == "zero", transpose
    native.diffuse_cpu(*tensors, view(out), taps, present, *options, scratch.data_ptr(), threads)
    return out
