"""The pixel correlation module, forward and backward, on inputs nobody chose, against the reference; and the sizes its
entry points compute. See `fuzzing`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE
from support.fuzzing import DTYPES, Draw, agree, backends, fuzz, running, without_limit

import afa_kernels
from afa_kernels.core import native_module

pytestmark = [without_limit]


def units(features: torch.Tensor) -> torch.Tensor:
    features = features.double()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-5)


def sizes(cams: torch.Tensor, features: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """How large in float64 what is summed for the gradients is, nothing cancelling: by how much they err."""
    likeness = torch.relu(units(features).flatten(2).transpose(1, 2) @ units(features).flatten(2))
    total = likeness.sum(1, keepdim=True) + 1e-5
    values, weighted = cams.double().abs().flatten(2), grad.double().abs().flatten(2) / total
    out = values @ likeness / total
    of_cams = weighted @ likeness
    pairs = weighted.transpose(1, 2) @ values + (weighted * out).sum(1)[:, :, None]
    pairs = pairs + pairs.transpose(1, 2)
    # A unit vector's own errors in float32, and those of the norm it is divided by.
    of_units = pairs.sum(1)[:, None].view(-1, 1, *features.shape[2:])
    norm = torch.linalg.vector_norm(features.double(), dim=1, keepdim=True) + 1e-5
    return [of_cams.view_as(cams), (of_units / norm).expand(features.shape)]


@pytest.mark.parametrize("backend", backends("pcm"))
@fuzz
@given(st.data())
def test_pcm(backend, data):
    draw = Draw(data)
    few = backend == "emulated"
    batch, classes, depth = draw.integer("B", 1, 2), draw.integer("K", 1, 40), draw.integer("C", 1, 80)
    height, width = draw.integer("h", 1, 9 if few else 14), draw.integer("w", 1, 16 if few else 20)
    cams = draw.tensor("cams", batch, classes, height, width, dtype=draw.choice("dtype of cams", DTYPES), low=-1)
    features = draw.tensor(
        "features",
        batch,
        depth,
        height,
        width,
        dtype=draw.choice("dtype of features", DTYPES),
        extremes=[0.0, 1e-6, 1e3, math.nan, math.inf],
        low=draw.choice("least feature", [-1.0, 0.0]),
    )
    grad = draw.random(*cams.shape).to(DEVICE, cams.dtype) if draw.flag("backward") else None

    def run():
        leaves = [tensor.detach().clone().requires_grad_(grad is not None) for tensor in (cams, features)]
        out = afa_kernels.pcm(*leaves)
        return out.detach(), [] if grad is None else list(torch.autograd.grad(out, leaves, grad))

    with running(backend, draw.generator):
        got, got_grads = run()
    with afa_kernels.use_backend("reference"):
        want, want_grads = run()
        bound = afa_kernels.pcm(cams.double().abs(), features.double())
    agree(got, want, bound, 2e-5, bound * height * width)
    if grad is None or not all(tensor.isfinite().all() for tensor in (cams, features)):
        return
    for mine, theirs, size in zip(got_grads, want_grads, sizes(cams, features, grad)):
        agree(mine, theirs, size, 2e-5, size.amax())


@pytest.mark.skipif(native_module.native is None, reason="no native module")
@fuzz
@given(st.data())
def test_workspace_sizes_are_64_bit(data):
    """Sizes whose products pass 2^31 and 2^32: nothing wraps, and more pixels or channels never need less."""
    draw = Draw(data)
    height, width = draw.integer("h", 1, 4_000), draw.integer("w", 1, 6_000)
    classes, depth = draw.integer("K", 1, 100), draw.integer("C", 1, 600)
    native = native_module.native

    def asked(height: int, depth: int) -> list[int]:
        def nowhere(channels: int) -> tuple:
            return 0, 0, (1, channels, height, width), (channels * height * width, height * width, width, 1)

        forward = native.pcm_cpu_workspace(nowhere(classes), nowhere(depth), nowhere(classes + 1), 2)
        tensors = nowhere(classes + 1), nowhere(classes), nowhere(depth), nowhere(depth)
        return [forward, native.pcm_features_gradient_cpu_workspace(*tensors, 2)]

    before, pixels = asked(height, depth), height * width
    # Features packed, and their sums; values packed, theirs and the sums.
    assert before[0] >= 4 * pixels * (depth + 2 * classes) and before[1] >= 4 * pixels * (2 * depth + 2 * classes)
    for after in (asked(height + 1, depth), asked(height, depth + 1)):
        assert all(more >= less for more, less in zip(after, before))
