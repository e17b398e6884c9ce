"""Triton kernels read and write nothing but the tensors they were given."""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE
from support.every_operator import everything, smallest

import afa_kernels

pytest.importorskip("triton", reason="no Triton")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compute-sanitizer watches compiled kernels")

if DEVICE == "cpu":
    import triton
    import triton.language as tl
    from support.triton_bounds import bounds_checked

    @triton.jit
    def copy_at(source, target, at, last):
        tl.store(target + at, tl.load(source + at, mask=at < last, other=0.0))


def test_every_operator_stays_within_its_tensors():
    with bounds_checked() as memory, afa_kernels.use_backend("triton"):
        smallest()
        small = memory.accesses
        everything(0)
    assert memory.accesses > small + 1_000_000


def test_an_address_outside_is_seen():
    memory = torch.zeros(8)
    source, target = memory[2:5], torch.zeros(8)[1:6]
    with bounds_checked():
        copy_at[(1,)](source, target, 2, 8)
        copy_at[(1,)](source, target, 4, 3)  # the read is masked
        for at, last in ((3, 8), (5, 3), (-1, 0)):
            with pytest.raises(Exception, match="1 of 1 addresses are outside the kernel's tensors"):
                copy_at[(1,)](source, target, at, last)
