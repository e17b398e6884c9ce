"""The native kernels of the Sinkhorn normalisation, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import native, view, workspace


def sinkhorn(affinity: Tensor, radius: int, num_iter: int, eps: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = affinity.shape
    out = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    scales = torch.empty(batch, 2 * num_iter, height, width, dtype=torch.float64, device=affinity.device)
    inputs = view(affinity), view(out), scales.data_ptr(), radius, num_iter, eps, symmetric
    if native_module.on_cuda(affinity):
        native.sinkhorn_cuda(*inputs, *native_module.cuda_stream(affinity.device))
        return out, scales
    threads = torch.get_num_threads()
    scratch = workspace(native.sinkhorn_cpu_workspace(view(affinity), radius, threads), affinity.device)
    native.sinkhorn_cpu(*inputs, scratch.data_ptr(), threads)
    return out, scales


def sinkhorn_gradient(
    affinity: Tensor, scales: Tensor, grad: Tensor, radius: int, eps: float, symmetric: bool
) -> Tensor:
    out = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)
    scales, num_iter = scales.contiguous(), scales.shape[1] // 2
    inputs = view(affinity), scales.data_ptr(), view(grad), view(out), radius, num_iter, eps, symmetric
    if native_module.on_cuda(affinity):
        size = native.sinkhorn_gradient_cuda_workspace(view(affinity), radius, num_iter)
        scratch = workspace(size, affinity.device)
        native.sinkhorn_gradient_cuda(*inputs, scratch.data_ptr(), *native_module.cuda_stream(affinity.device))
        return out
    threads = torch.get_num_threads()
    size = native.sinkhorn_gradient_cpu_workspace(view(affinity), radius, num_iter, threads)
    scratch = workspace(size, affinity.device)
    native.sinkhorn_gradient_cpu(*inputs, scratch.data_ptr(), threads)
    return out
