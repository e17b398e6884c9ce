"""Layers of the networks through oneDNN in float32 on the CPU.

PyTorch multiplies float32 matrices on the CPU with MKL, which leaves AVX-512 unused on processors that are not
Intel's: on a Zen 5 core oneDNN, which comes with PyTorch too, is twice as fast (200 against 95 GFLOP/s at the
sizes of MiT-B1). On a GPU, in other dtypes, under autocast and wherever oneDNN cannot run, all of this is what
PyTorch itself would do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed -> [..., N]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _can_run(x: Tensor, weight: Tensor) -> bool:
    return (
        _AVAILABLE
        and not torch.compiler.is_compiling()  # Inductor has a choice of its own
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim >= 2
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _product(grad, weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        rows, grad_weight = grad.flatten(0, -2), None
        if ctx.needs_input_grad[1]:
            tokens = x.flatten(0, -2)
            outputs, inputs = weight.shape
            # Both factors must be transposed first, which is worth it where each of their values is used often.
            if outputs * inputs >= 100 * (outputs + inputs):
                grad_weight = _product(rows.t().contiguous(), tokens.t().contiguous())
            else:
                grad_weight = rows.t() @ tokens
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``."""
    if not _can_run(x, weight):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    return _Product.apply(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` in arguments, parameters and result (within float32 rounding)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution: x [B, K, h, w], weight [N, K], bias [N] -> [B, N, h, w]."""
    if not _can_run(x, weight):
        return F.conv2d(x, weight[:, :, None, None], bias)
    return linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """GELU of a depthwise convolution, in one go where no gradient is wanted: x [B, C, h, w] -> [B, C, h, w]."""
    if torch.is_grad_enabled() or not _can_run(x, conv.weight):
        return F.gelu(conv(x))
    how = conv.padding, conv.stride, conv.dilation, conv.groups
    return torch.ops.mkldnn._convolution_pointwise(x, conv.weight, conv.bias, *how, "gelu", [], "none")
