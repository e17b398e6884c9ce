"""The path affinity, forward and backward, on inputs nobody chose, against the reference. See `fuzzing`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE
from support.fuzzing import DTYPES, EMULATED, Draw, agree, backends, fuzz, running, without_limit

import afa_kernels
from afa_kernels.core import native_module

pytestmark = [without_limit]


@pytest.mark.parametrize("backend", backends("path_affinity"))
@fuzz
@given(st.data())
def test_path_affinity(backend, data):
    draw = Draw(data)
    few = backend in EMULATED.values()
    radius, height, width = draw.integer("radius", 1, 9), draw.integer("h", 1, 19), draw.integer("w", 1, 37)
    batch, dtype = draw.integer("B", 1, 1 if few else 3), draw.choice("dtype", DTYPES)
    edge = draw.tensor("edge", batch, 1, height, width, dtype=dtype, low=-1)
    if draw.flag("ties"):
        edge = draw.layout("edge of few values", (2 * edge).round())
    shape = batch, (2 * radius + 1) ** 2, height, width
    grad = draw.layout("grad", draw.random(*shape).to(DEVICE, dtype))

    def run():
        leaf = edge.detach().clone().requires_grad_()
        out = afa_kernels.path_affinity(leaf, radius)
        return out.detach(), torch.autograd.grad(out, leaf, grad)[0]

    with running(backend, draw.generator):
        got, got_grad = run()
    with afa_kernels.use_backend("reference"):
        want, want_grad = run()
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    agree(got_grad, want_grad, want_grad.abs(), 1e-5)  # the gradients of the affinities are positive: nothing cancels


@pytest.mark.skipif("native" not in backends("path_affinity") or DEVICE != "cpu", reason="no native backend here")
@fuzz
@given(st.data())
def test_workspace_sizes_are_64_bit(data):
    """Sizes whose products pass 2^31 and 2^32: nothing wraps, and more pixels never need less."""
    draw = Draw(data)
    height, width, radius = draw.integer("h", 1, 40_000), draw.integer("w", 1, 60_000), draw.integer("radius", 1, 16)
    native = native_module.native

    def sizes(height: int, width: int) -> list[int]:
        plane = (height * width, width, 1)
        edge = 0, 0, (1, 1, height, width), (height * width, *plane)
        window = 0, 0, (1, (2 * radius + 1) ** 2, height, width), ((2 * radius + 1) ** 2 * height * width, *plane)
        inputs = edge, window, radius, radius, 2
        return [native.path_affinity_cpu_workspace(*inputs), native.path_affinity_gradient_cpu_workspace(*inputs)]

    before = sizes(height, width)
    side = range(-radius, radius + 1)
    disc = sum(0 < dy * dy + dx * dx < radius**2 for dy in side for dx in side)
    reached = disc // 2 if min(height, width) > radius else 0
    assert before[0] >= 4 * height * width and before[1] >= (4 + 5 * reached) * height * width
    for after in (sizes(height + 1, width), sizes(height, width + 1)):
        assert all(more >= less for more, less in zip(after, before))
