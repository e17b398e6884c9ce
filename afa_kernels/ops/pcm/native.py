"""The native kernels of the pixel correlation module, called: the ``native`` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import native, view, workspace


def pcm(values: Tensor, features: Tensor, ones: bool) -> Tensor:
    batch, channels, height, width = values.shape
    out = torch.empty(batch, channels + ones, height, width, dtype=torch.float32, device=values.device)
    tensors = view(values), view(features), view(out)
    if native_module.on_cuda(values):
        place = native_module.cuda_stream(values.device)
        scratch = workspace(native.pcm_cuda_workspace(*tensors, place[0]), values.device)
        native.pcm_cuda(*tensors, scratch.data_ptr(), *place)
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.pcm_cpu_workspace(*tensors, threads), values.device)
    native.pcm_cpu(*tensors, scratch.data_ptr(), threads)
    return out


def pcm_features_gradient(grad: Tensor, values: Tensor, features: Tensor) -> Tensor:
    out = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    tensors = view(grad), view(values), view(features), view(out)
    if native_module.on_cuda(features):
        place = native_module.cuda_stream(features.device)
        scratch = workspace(native.pcm_features_gradient_cuda_workspace(*tensors, place[0]), features.device)
        native.pcm_features_gradient_cuda(*tensors, scratch.data_ptr(), *place)
        return out
    threads = torch.get_num_threads()
    scratch = workspace(native.pcm_features_gradient_cpu_workspace(*tensors, threads), features.device)
    native.pcm_features_gradient_cpu(*tensors, scratch.data_ptr(), threads)
    return out
