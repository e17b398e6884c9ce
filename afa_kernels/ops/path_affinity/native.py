"""The native kernels of the path affinity, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import native, view, workspace


def path_affinity(edge: Tensor, radius: int, reach: int) -> Tensor:
    height, width = edge.shape[2:]
    # The kernels write the taps that some pixel of the image has.
    make = torch.zeros if reach >= min(height, width) else torch.empty
    out = make((edge.shape[0], (2 * reach + 1) ** 2, height, width), dtype=edge.dtype, device=edge.device)
    inputs = view(edge), view(out), radius, reach
    if native_module.on_cuda(edge):
        native.path_affinity_cuda(*inputs, *native_module.cuda_stream(edge.device))
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.path_affinity_cpu_workspace(*inputs, threads), edge.device)
    native.path_affinity_cpu(*inputs, scratch.data_ptr(), threads)
    return out


def path_affinity_gradient(edge: Tensor, grad: Tensor, radius: int, reach: int) -> Tensor:
    out = torch.empty(edge.shape, dtype=edge.dtype, device=edge.device)
    inputs = view(edge), view(grad), radius, reach
    if native_module.on_cuda(edge):
        place = native_module.cuda_stream(edge.device)
        scratch = workspace(native.path_affinity_gradient_cuda_workspace(*inputs), edge.device)
        native.path_affinity_gradient_cuda(*inputs, view(out), scratch.data_ptr(), *place)
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.path_affinity_gradient_cpu_workspace(*inputs, threads), edge.device)
    native.path_affinity_gradient_cpu(*inputs, view(out), scratch.data_ptr(), threads)
    return out
