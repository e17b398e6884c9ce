"""The radix sort of the CUDA sources, run on the CPU, beside numpy's stable one."""

from __future__ import annotations

import numpy as np
import pytest
from support.cuda_emulator import build
from support.cuda_emulator.marks import ON_THE_EMULATOR

pytestmark = ON_THE_EMULATOR
POISON = 0xABABABAB


@pytest.fixture(scope="module")
def emulator():
    loaded = build.load()
    yield loaded
    loaded.set_order(0)


def sort(native, keys: np.ndarray, bits: int, payload: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    out, moved = (np.full(len(keys) + 8, POISON, np.uint32) for _ in range(2))
    scratch = np.full(native.radix_sort_cuda_workspace(len(keys)) + 64, 0xAB, np.uint8)
    arrays = keys, payload, out, moved
    addresses = [0 if array is None else array.ctypes.data for array in arrays]
    native.radix_sort_cuda(addresses, len(keys), bits, scratch.ctypes.data, 0, 0)
    assert (out[len(keys) :] == POISON).all() and (moved[len(keys) :] == POISON).all() and (scratch[-64:] == 0xAB).all()
    return out[: len(keys)], moved[: len(keys)].view(np.int32)


@pytest.mark.parametrize("count", [0, 1, 31, 257, 4096, 4097, 13001])
@pytest.mark.parametrize("bits", [5, 8, 21, 32])
def test_equal_keys_keep_their_order(emulator, count, bits):
    random = np.random.default_rng(count + bits)
    keys = random.integers(0, 1 << bits, count, dtype=np.uint32)
    keys[count // 3 : count // 2] = keys[: count // 2 - count // 3]  # many of them twice
    before, order = keys.copy(), np.argsort(keys, kind="stable")
    got, moved = sort(emulator.native, keys, bits)
    assert np.array_equal(got, keys[order]) and np.array_equal(moved, order)
    assert np.array_equal(keys, before)


@pytest.mark.parametrize("value", [0, 255, 0xFFFFFFFF])
def test_all_keys_are_equal(emulator, value):
    keys, payload = np.full(9001, value, np.uint32), np.arange(9001, 0, -1, dtype=np.int32)
    got, moved = sort(emulator.native, keys, 32, payload)
    assert np.array_equal(got, keys) and np.array_equal(moved, payload)


def test_any_order_of_threads_gives_the_same_bits(emulator):
    random = np.random.default_rng(0)
    keys, payload = random.integers(0, 999, 8500, dtype=np.uint32), random.integers(-9, 9, 8500, dtype=np.int32)
    order = np.argsort(keys, kind="stable")
    for threads in (0, 1, 2):
        emulator.set_order(threads)
        got, moved = sort(emulator.native, keys, 10, payload)
        assert np.array_equal(got, keys[order]) and np.array_equal(moved, payload[order])
    emulator.set_order(0)


def test_bad_sizes_are_refused(emulator):
    keys = np.zeros(4, np.uint32)
    for count, bits in ((-1, 8), (1 << 31, 8), (4, 33), (4, -1)):
        with pytest.raises(RuntimeError, match="sizes or strides contradict"):
            emulator.native.radix_sort_cuda([keys.ctypes.data] * 4, count, bits, 0, 0, 0)
