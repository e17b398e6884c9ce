"""Scratch memory of the native kernels, which each thread keeps between calls on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICE

from afa_kernels import _native_module, par, random_walk

pytestmark = [
    pytest.mark.skipif(_native_module.native is None, reason="no native module"),
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU scratch memory is PyTorch's"),
]


@pytest.fixture(autouse=True)
def kept(poisoned_allocations, monkeypatch):
    """Ordinary allocations, and nothing kept yet."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(_native_module, "_scratch", type(_native_module._scratch)())


def test_what_an_earlier_call_left_plays_no_part(rng):
    def walk(side: int) -> torch.Tensor:
        affinity, cams = torch.rand(1, 49, side, side, generator=rng), torch.rand(1, 5, side, side, generator=rng)
        got = random_walk(affinity, cams, 3, backend="native")
        torch.testing.assert_close(got, random_walk(affinity, cams, 3, backend="reference"))
        return got

    walk(60)
    kept = _native_module._scratch.kept
    kept.fill_(255)  # NaN in every type
    walk(7)
    images, masks = torch.rand(1, 3, 9, 11, generator=rng), torch.rand(1, 2, 9, 11, generator=rng)
    torch.testing.assert_close(par(images, masks, backend="native"), par(images, masks, backend="reference"))
    assert _native_module._scratch.kept is kept


def test_large_scratch_is_not_kept():
    device = torch.device("cpu")
    large = _native_module.workspace(_native_module.KEPT_SCRATCH + 1, device)
    assert large.numel() == _native_module.KEPT_SCRATCH + 1
    assert not hasattr(_native_module._scratch, "kept")
    assert _native_module.workspace(0, device).numel() >= 1


def test_threads_do_not_share_it():
    with ThreadPoolExecutor(2) as pool:
        places = [pool.submit(lambda: _native_module.workspace(100, torch.device("cpu"))) for _ in range(2)]
        own = _native_module.workspace(100, torch.device("cpu"))
        assert all(place.result().data_ptr() != own.data_ptr() for place in places)
