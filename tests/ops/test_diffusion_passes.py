"""Diffusion on the CPU where several iterations pass over the weights at once: never another result, whatever the
cache, the number of threads, the size, and what the taps reach.
"""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE, available, relative_error

from afa_kernels import diffuse, par
from afa_kernels.core import native_module

pytestmark = [
    pytest.mark.skipif("native" not in available("diffuse"), reason="no native backend here"),
    pytest.mark.skipif(DEVICE != "cpu", reason="passes are the CPU's"),
]
SIX = (1, 2, 4, 8, 12, 24)
ENDLESS = 1 << 50  # bytes of cache


def ring(*dilations: int) -> list[tuple[int, int]]:
    return [(dy, dx) for d in dilations for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]


EDGES = [(0, 0), (1, -2), (-40, 7), (2, 17), (-1, 16), (0, -16), (0, 15)]

# Shapes, taps, iterations, bytes of cache, threads, and how many iterations then pass at once.
CASES = {
    "PAR's taps": ((1, 3, 90, 500), ring(*SIX), 7, 1_685_212, 1, 3),
    "rows that are fewer than a pass is behind": ((1, 3, 31, 700), ring(*SIX), 4, 1_685_212, 1, 3),
    "two bands": ((2, 3, 117, 331), ring(1, 2), 7, 257_143, 2, 3),
    "four bands that do not divide the height": ((2, 3, 117, 331), ring(1, 2), 7, 257_143, 4, 2),
    "bands shorter than they wait for": ((1, 1, 23, 900), 6 * ring(1), 9, 257_143, 5, 2),
    "one row": ((1, 2, 1, 3000), ring(1), 9, 115_715, 1, 8),
    "fewer rows than threads": ((1, 1, 2, 4000), [(0, 1), (0, -2), (0, 3)], 9, 25_715, 3, 8),
    "one channel": ((1, 1, 64, 257), ring(1, 3), 5, 144_643, 1, 4),
    "thirty channels": ((1, 30, 20, 225), 16 * ring(1), 3, 282_858, 1, 2),
    "past the edges": ((1, 3, 9, 400), 8 * EDGES, 6, 642_858, 1, 2),
}


def schedule(masks, offsets, num_iter: int, threads: int) -> tuple[int, int]:
    taps = [value for offset in offsets for value in offset]
    return native_module.native.diffuse_cpu_schedule(native_module.view(masks), taps, num_iter, False, threads)


@pytest.fixture
def machine(monkeypatch):
    """Sets the bytes of cache and the number of threads."""
    before = torch.get_num_threads()

    def become(cache: int, threads: int = 1) -> None:
        monkeypatch.setenv("AFA_CPU_CACHE", str(cache))
        torch.set_num_threads(threads)

    yield become
    torch.set_num_threads(before)


@pytest.mark.parametrize("border", ["replicate", "zero"])
@pytest.mark.parametrize("case", CASES)
def test_passes_change_nothing(rng, machine, case, border):
    shape, offsets, num_iter, cache, threads, depth = CASES[case]
    weights = torch.rand(shape[0], len(offsets), *shape[2:], generator=rng) / len(offsets)
    masks = torch.rand(shape, generator=rng)
    machine(ENDLESS)
    assert schedule(masks, offsets, num_iter, threads)[0] == 1
    alone = diffuse(weights, masks, offsets, num_iter, border, backend="native")
    want = diffuse(weights.double(), masks.double(), offsets, num_iter, border, backend="reference")
    assert relative_error(alone.double(), want) < 1e-5
    machine(cache, threads)
    found, strip = schedule(masks, offsets, num_iter, threads)
    assert found == depth and strip % 32 == 0
    for _ in range(3):
        assert torch.equal(diffuse(weights, masks, offsets, num_iter, border, backend="native"), alone)


@pytest.mark.parametrize("channels", [*range(1, 12), 21])
def test_any_number_of_channels(rng, machine, channels):
    offsets = ring(1, 2, 17)
    weights, masks = torch.rand(1, 24, 30, 170, generator=rng) / 24, torch.rand(1, channels, 30, 170, generator=rng)
    machine(ENDLESS)
    alone = diffuse(weights, masks, offsets, 3, backend="native")
    assert relative_error(alone, diffuse(weights, masks, offsets, 3, backend="reference")) < 1e-5
    machine(1)
    assert torch.equal(diffuse(weights, masks, offsets, 3, backend="native"), alone)


def test_every_shift_of_a_row(rng):
    """Vectors that are shifted in registers and those that are loaded where they lie, one by one and in any order."""
    shifts = [*range(-70, 71), *torch.randint(-20, 21, (50,), generator=rng).tolist()]
    offsets = [(y, x) for y in (0, 1) for x in shifts]
    weights = torch.rand(1, len(offsets), 4, 101, generator=rng) / len(offsets)
    for channels in (1, 2, 3, 4, 7):
        masks = torch.rand(1, channels, 4, 101, generator=rng)
        got, want = (diffuse(weights, masks, offsets, 2, "zero", backend=name) for name in ("native", "reference"))
        assert relative_error(got, want) < 1e-5


def test_the_schedule_follows_the_cache(rng, machine):
    """Where a thread's weights stay in its cache, or nothing of them can, every iteration goes over the whole image; in
    between the more pass at once the more there is room for.
    """
    masks, offsets = torch.rand(1, 3, 1024, 2048, generator=rng), ring(*SIX)
    depths = []
    for cache in (100_000, 1_310_720, 2 << 20, 4 << 20, ENDLESS):
        machine(cache)
        depths.append(schedule(masks, offsets, 20, 1)[0])
    assert depths[0] == depths[-1] == 1 and depths[1] >= 2 and depths[1:-1] == sorted(depths[1:-1])
    machine(1_310_720)
    assert schedule(masks, offsets, 1, 1)[0] == 1, "a single iteration"
    assert schedule(masks[:, :, :64, :64], offsets, 20, 1) == (1, 64), "weights that stay in the cache"
    assert schedule(masks, offsets, 20, 64)[0] == 1, "bands that would only wait"


def test_a_cache_that_is_no_number_is_the_machines(machine, monkeypatch):
    masks = torch.rand(1, 3, 64, 2048)
    monkeypatch.delenv("AFA_CPU_CACHE", raising=False)
    own = schedule(masks, ring(*SIX), 20, 1)
    for value in ("", "large", "-5", "0"):
        monkeypatch.setenv("AFA_CPU_CACHE", value)
        assert schedule(masks, ring(*SIX), 20, 1) == own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_strides_and_absent_classes(rng, machine, dtype):
    offsets = 4 * ring(1, 5)
    weights = (torch.rand(2, 40, 150, 64, generator=rng) / 64).to(dtype).permute(0, 3, 1, 2)
    masks = torch.rand(2, 40, 6, 150, generator=rng).to(dtype).transpose(1, 2)
    present = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    machine(ENDLESS)
    alone = diffuse(weights, masks, offsets, 5, "replicate", present, backend="native")
    want = diffuse(weights.float(), masks.float(), offsets, 5, "replicate", present, backend="reference")
    assert relative_error(alone.float(), want) <= 2 * relative_error(want.to(dtype).float(), want)
    for threads in (1, 2, 3):
        machine(450_001, threads)
        if threads == 1:
            assert schedule(masks, offsets, 5, threads)[0] > 1
        assert torch.equal(diffuse(weights, masks, offsets, 5, "replicate", present, backend="native"), alone)


def test_gradients_where_the_forward_passes(rng, machine):
    offsets = ring(1, 4)
    machine(192_858, 2)
    weights, masks = torch.rand(1, 16, 60, 130, generator=rng) / 16, torch.rand(1, 2, 60, 130, generator=rng)
    assert schedule(masks, offsets, 4, 2)[0] > 1
    grads = []
    for name in ("native", "reference"):
        leaves = weights.clone().requires_grad_(), masks.clone().requires_grad_()
        diffuse(*leaves, offsets, 4, backend=name).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 64, 200), (2, 3, 33, 417)])
def test_par_makes_its_weights_on_the_way(rng, machine, shape):
    images, masks = (torch.rand(shape, generator=rng) for _ in range(2))
    machine(ENDLESS)
    alone = par(images, masks, SIX, 5, backend="native")
    want = par(images.double(), masks.double(), SIX, 5, backend="reference")
    assert relative_error(alone.double(), want) < 1e-5
    for threads in (1, 2, 3):
        machine(1_685_212, threads)
        assert torch.equal(par(images, masks, SIX, 5, backend="native"), alone)
