"""The native kernels of the random walk, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import address, native, view, workspace
from ..diffusion import plans


def random_walk(
    affinity: Tensor,
    cams: Tensor,
    radius: int,
    power: float,
    num_steps: int,
    eps: float,
    class_mask: Tensor | None,
    transpose: bool,
) -> Tensor:
    out = torch.empty(cams.shape, dtype=cams.dtype, device=cams.device)
    tensors = view(affinity), view(cams)
    if native_module.on_cuda(cams):
        place = native_module.cuda_stream(cams.device)
        kept = None if class_mask is None else class_mask.contiguous()
        options = radius, power, eps, address(kept), num_steps, transpose
        plans.run(
            "random_walk",
            cams.device,
            lambda: native.random_walk_cuda_workspace(*tensors, radius, num_steps, transpose, place[0]),
            lambda scratch: native.random_walk_cuda(*tensors, view(out), *options, scratch, *place),
        )
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.random_walk_cpu_workspace(*tensors, radius, power, threads), cams.device)
    present = [] if class_mask is None else class_mask.flatten().tolist()
    options = radius, power, eps, present, num_steps, transpose
    native.random_walk_cpu(*tensors, view(out), *options, scratch.data_ptr(), threads)
    return out


def random_walk_affinity_gradient(
    affinity: Tensor, states: Tensor, grads: Tensor, radius: int, power: float, eps: float
) -> Tensor:
    out = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    tensors = view(affinity), view(states)
    if native_module.on_cuda(affinity):
        place = native_module.cuda_stream(affinity.device)
        size = native.random_walk_affinity_gradient_cuda_workspace(view(affinity), radius)
        scratch = workspace(size, affinity.device)
        options = radius, power, eps, scratch.data_ptr()
        native.random_walk_affinity_gradient_cuda(*tensors, view(grads), view(out), *options, *place)
        return out
    threads = torch.get_num_threads()
    size = native.random_walk_affinity_gradient_cpu_workspace(*tensors, radius, threads)
    scratch = workspace(size, affinity.device)
    options = radius, power, eps, scratch.data_ptr(), threads
    native.random_walk_affinity_gradient_cpu(*tensors, view(grads), view(out), *options)
    return out
