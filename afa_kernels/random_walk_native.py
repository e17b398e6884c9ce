"""The native kernels of the random walk, called: what `random_walk` registers as its ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ._native_module import native, view, workspace


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
    threads = torch.get_num_threads()
    tensors = view(affinity), view(cams)
    scratch = workspace(native.random_walk_cpu_workspace(*tensors, radius, power, threads), cams.device)
    present = [] if class_mask is None else class_mask.flatten().tolist()
    options = radius, power, eps, present, num_steps, transpose
    native.random_walk_cpu(*tensors, view(out), *options, scratch.data_ptr(), threads)
    return out


def random_walk_affinity_gradient(
    affinity: Tensor, states: Tensor, grads: Tensor, radius: int, power: float, eps: float
) -> Tensor:
    out = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    threads = torch.get_num_threads()
    tensors = view(affinity), view(states)
    size = native.random_walk_affinity_gradient_cpu_workspace(*tensors, radius, threads)
    scratch = workspace(size, affinity.device)
    options = radius, power, eps, scratch.data_ptr(), threads
    native.random_walk_affinity_gradient_cpu(*tensors, view(grads), view(out), *options)
    return out
