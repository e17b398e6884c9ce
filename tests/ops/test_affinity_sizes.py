"""Where the kernels of the fused affinity loss change their ways: many heads, deep ones, rows of different lengths."""

from __future__ import annotations

import pytest
import torch
from support.affinity_cases import random_case
from support.common import available, relative_error
from support.running import EMULATED, running

from afa_kernels import attention_affinity_loss

NATIVE = [name for name in available("attention_affinity_loss") if name == "native"]
# Of gradients that are rounded to the dtype, and sums of such factors.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6}

pytestmark = pytest.mark.skipif(not (NATIVE or EMULATED), reason="no native kernels")


@pytest.fixture(autouse=True, params=[*NATIVE, *EMULATED])
def kernels(request):
    """The native ones are at work, of this device or emulated."""
    with running(request.param):
        yield


def gradients(leaves, labels, radius, **options):
    """Of leaves with the strides of these."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(attention_affinity_loss(*leaves, labels, radius, **options)[0], leaves)


def check(leaves, labels, radius, dtype):
    wide = [leaf.detach().double() for leaf in leaves]
    for mine, theirs in zip(gradients(leaves, labels, radius), gradients(wide, labels, radius, backend="reference")):
        assert mine.dtype == dtype and float(theirs.norm()) > 0
        assert relative_error(mine, theirs) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads, width, depth", [(259, 8, 3), (3, 10, 136)])
def test_many_heads_and_deep_ones(rng, dtype, heads, width, depth):
    """A GPU takes the weights of 256 heads at a time, and 16 or 64 channels of one: here the second of each begins."""
    leaves, labels = random_case(rng, batch=1, heads=heads, height=2, width=width, depth=depth, dtype=dtype)
    with torch.no_grad():
        leaves[2] /= heads**0.5
    check(leaves, labels, 2, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("wider", [0, 1])
def test_queries_and_keys_of_different_strides(rng, dtype, wider):
    """One of them in rows that are longer, as a part of a larger tensor; read 16 bytes at a time all the same."""
    leaves, labels = random_case(rng, batch=2, height=9, width=10, depth=16, dtype=dtype)
    rows = leaves[wider].detach()
    leaves[wider] = torch.cat((rows, torch.full_like(rows, 100.0)), 3)[..., :16]
    assert leaves[wider].stride(2) == 32
    check(leaves, labels, 3, dtype)
