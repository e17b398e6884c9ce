"""Scratch memory of the native kernels, which each thread keeps between calls on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.common import DEVICE

from afa_kernels import attention_affinity_loss, par, random_walk
from afa_kernels.core import native_module

pytestmark = [
    pytest.mark.skipif(native_module.native is None, reason="no native module"),
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU scratch memory is PyTorch's"),
]


@pytest.fixture(autouse=True)
def kept(poisoned_allocations, monkeypatch):
    """Ordinary allocations, and nothing kept yet."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(native_module, "_scratch", type(native_module._scratch)())


def test_what_an_earlier_call_left_plays_no_part(rng):
    def walk(side: int) -> torch.Tensor:
        affinity, cams = torch.rand(1, 49, side, side, generator=rng), torch.rand(1, 5, side, side, generator=rng)
        got = random_walk(affinity, cams, 3, backend="native")
        torch.testing.assert_close(got, random_walk(affinity, cams, 3, backend="reference"))
        return got

    walk(60)
    kept = native_module._scratch.kept
    kept.fill_(255)  # NaN in every type
    walk(7)
    images, masks = torch.rand(1, 3, 9, 11, generator=rng), torch.rand(1, 2, 9, 11, generator=rng)
    torch.testing.assert_close(par(images, masks, backend="native"), par(images, masks, backend="reference"))
    assert native_module._scratch.kept is kept


def test_what_a_loss_keeps_for_its_backward_is_no_scratch(rng):
    """Another call comes between the two, and takes the same scratch memory."""

    def loss():
        query, key = (torch.rand(1, 2, 63, 5, generator=rng).requires_grad_() for _ in range(2))
        labels = torch.randint(3, (1, 7, 9), generator=rng)
        inputs = query, key, torch.rand(2, generator=rng), torch.rand(1, generator=rng), labels, 3
        return inputs, attention_affinity_loss(*inputs, backend="native")[0]

    inputs, first = loss()
    loss()
    native_module._scratch.kept.fill_(255)
    got = torch.autograd.grad(first, inputs[:2])
    wanted = torch.autograd.grad(attention_affinity_loss(*inputs, backend="reference")[0], inputs[:2])
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs)


def test_large_scratch_is_not_kept():
    device = torch.device("cpu")
    large = native_module.workspace(native_module.KEPT_SCRATCH + 1, device)
    assert large.numel() == native_module.KEPT_SCRATCH + 1
    assert not hasattr(native_module._scratch, "kept")
    assert native_module.workspace(0, device).numel() >= 1


def test_threads_do_not_share_it():
    with ThreadPoolExecutor(2) as pool:
        places = [pool.submit(lambda: native_module.workspace(100, torch.device("cpu"))) for _ in range(2)]
        own = native_module.workspace(100, torch.device("cpu"))
        assert all(place.result().data_ptr() != own.data_ptr() for place in places)
