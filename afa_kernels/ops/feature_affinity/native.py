"""The native kernels of the affinity of features, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import native, view, workspace

CODES = {"abs_dot": 0, "relu_dot": 1, "exp_l1": 2}  # of csrc/feature_affinity/feature_affinity.h


def feature_affinity(features: Tensor, radius: int, kind: str, keep: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = features.shape
    taps, kept = (2 * radius + 1) ** 2, keep and kind != "exp_l1"
    out = torch.empty((batch, taps, height, width), dtype=features.dtype, device=features.device)
    shape = (batch, (taps + 1) // 2, height, width) if kept else (0,)
    slopes = torch.empty(shape, dtype=features.dtype, device=features.device)
    case = view(features), radius, CODES[kind], view(out), view(slopes) if kept else None
    if native_module.on_cuda(features):
        native.feature_affinity_cuda(*case, *native_module.cuda_stream(features.device))
        return out, slopes
    threads = torch.get_num_threads()
    scratch = workspace(native.feature_affinity_cpu_workspace(*case[:3], threads), features.device)
    native.feature_affinity_cpu(*case, scratch.data_ptr(), threads)
    return out, slopes


def feature_affinity_backward(features: Tensor, slopes: Tensor, grad: Tensor, radius: int, kind: str) -> Tensor:
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    case = view(features), radius, CODES[kind]
    inputs = *case, view(slopes), view(grad), view(out)
    if native_module.on_cuda(features):
        scratch = workspace(native.feature_affinity_backward_cuda_workspace(*case), features.device)
        native.feature_affinity_backward_cuda(*inputs, scratch.data_ptr(), *native_module.cuda_stream(features.device))
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.feature_affinity_backward_cpu_workspace(*case, threads), features.device)
    native.feature_affinity_backward_cpu(*inputs, scratch.data_ptr(), threads)
    return out
