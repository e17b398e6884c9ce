"""Sinkhorn normalisation, forward and backward, on inputs nobody chose, against the reference. See `fuzzing`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.common import DEVICE
from support.fuzzing import DTYPES, EXTREMES, Draw, agree, backends, fuzz, running, without_limit

from afa_kernels import sinkhorn, use_backend

pytestmark = [without_limit]


@pytest.mark.parametrize("backend", backends("sinkhorn"))
@fuzz
@given(st.data())
def test_sinkhorn(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 6), draw.integer("h", 1, 12), draw.integer("w", 1, 20)
    shape = draw.integer("B", 1, 2), (2 * radius + 1) ** 2, height, width
    extremes = [*(value for value in EXTREMES if not value < 0), 1.0]
    affinity = draw.tensor("affinity", *shape, dtype=draw.choice("affinity", DTYPES), extremes=extremes)
    options = draw.integer("num_iter", 0, 4), draw.choice("eps", [0.0, 1e-4, 0.1])
    symmetric = draw.flag("symmetric")
    grad = draw.layout("grad", draw.random(*shape).to(DEVICE, affinity.dtype)) if draw.flag("backward") else None

    def run(affinity):
        leaf = affinity.detach().requires_grad_(grad is not None)
        out = sinkhorn(leaf, radius, *options, symmetric=symmetric)
        return [out.detach(), *([] if grad is None else torch.autograd.grad(out, leaf, grad.to(out.dtype)))]

    with running(backend, draw.generator):
        got = run(affinity)
    with use_backend("reference"):
        want, wide = run(affinity), run(affinity.double())
    agree(got[0], want[0], want[0].abs(), 1e-6)
    if grad is not None and wide[1].isfinite().all() and wide[0].isfinite().all():
        # Terms of the size of result / affinity cancel: where all of them do, what is left is their rounding.
        terms = (grad.double().abs() * wide[0].abs() / affinity.double()).nan_to_num(0, 0, 0)
        size = wide[1].abs().maximum(terms).flatten(1).amax(1).view(-1, 1, 1, 1).expand(shape)
        agree(got[1], want[1], size, 1e-6)
