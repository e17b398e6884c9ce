"""What else than a backward PyTorch may ask of an operator, and the context that a reference runs in.

The kernels have a backward and no more. Forward-mode differentiation passes a custom operator without a word, as if its
result depended on nothing, and torch.func cannot differentiate one. The references are plain PyTorch, which all of that
goes through.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

REASON = "the kernels have no gradients of torch.func and no forward-mode differentiation, which the reference has"


def beyond_backward(*tensors: Tensor) -> bool:
    """Whether torch.func differentiates by one of these tensors, or one of them carries a tangent."""
    if torch._C._are_functorch_transforms_active() and any(map(_differentiated, tensors)):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors if tensor.is_floating_point())


def _differentiated(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):  # vmap wraps tensors too
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "meta":  # of which autocast knows nothing
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
