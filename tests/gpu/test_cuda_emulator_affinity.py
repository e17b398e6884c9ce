"""CUDA sources of the affinity and of what takes its window, emulated on the CPU: what their tests do not name."""

from __future__ import annotations

import sys

import pytest
import torch
from support.affinity_cases import random_case
from support.common import relative_error
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated
from support.memory import reserved

from afa_kernels import (
    affinity_from_maps,
    affinity_loss,
    attention_affinity_loss,
    random_walk,
    sinkhorn,
    window_affinity,
)
from afa_kernels.core import native_module

pytestmark = ON_THE_EMULATOR


# --- races: the order of threads and blocks must not show -------------------------------------------------------------


def everything(dtype: torch.dtype, depth: int = 16) -> list[torch.Tensor]:
    """Every kernel of the affinity, the random walk and Sinkhorn's, forward and backward, on one seed's inputs."""
    generator = torch.Generator().manual_seed(0)
    height, width, radius = 9, 18, 3
    pixels = height * width

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(dtype).requires_grad_()

    query, key, cams = random(2, 3, pixels, depth), random(2, 3, pixels, depth), random(2, 5, height, width)
    maps, head = random(2, 3, pixels, pixels), (random(3), random(1))
    labels = torch.randint(-1, 3, (2, height, width), generator=generator).clamp(min=0) % 3
    window = window_affinity(query, key, *head, height, width, radius)
    results = [
        window,
        attention_affinity_loss(query, key, *head, labels, radius)[0],
        attention_affinity_loss(query, key, *head, labels, radius, recompute=True)[0],
        affinity_loss(window, labels, radius)[0],
        affinity_from_maps(maps, *head, height, width, radius),
        random_walk(window, cams, radius, num_steps=2),
        sinkhorn(window, radius, 2, symmetric=True),
    ]
    sum(result.float().square().sum() for result in results).backward()
    return [*(result.detach() for result in results), *(leaf.grad for leaf in (query, key, *head, maps, cams))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_order_of_threads_gives_the_same_bits(emulator, dtype):
    results = []
    for order in (0, 1, 2):
        with emulated(emulator, order):
            results.append(everything(dtype))
            assert len(emulator.launches()) > 15
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not allocated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_of_several_images_gives_the_same_bits_too(rng, emulator, dtype):
    """From 65536 images on the first blocks take two of them, here of two tiles and so in turns. They alone run; the
    head's part is what they leave in the workspace, behind the gradients of the scores.
    """
    native, view, nothing = emulator.native, native_module.view, (0, 0, (1, 1, 1, 1), (1, 1, 1, 1))
    batch, heads, width, depth = 65536, 2, 9, 8
    query, key = torch.randn(2, 1, heads, width, depth, generator=rng).to(dtype).expand(2, batch, -1, -1, -1).unbind()
    labels = torch.zeros(1, 1, width, dtype=torch.uint8).expand(batch, -1, -1)
    head, found = (torch.ones(heads), torch.zeros(1)), (torch.empty(heads), torch.empty(1))
    grad, count, grid = torch.ones(()), torch.ones((), dtype=torch.int64), (1, width, 0)
    slopes = grad.data_ptr(), count.data_ptr(), count.data_ptr()
    inputs = view(query), view(key), *map(view, head), grid, native_module.integer_view(labels), 255, slopes, nothing
    size = native.attention_backward_cuda_workspace(view(query), view(key), grid, 0)
    results = []
    for order in (1, 0, 2):
        scratch = reserved(size // 4 + 1)
        with emulated(emulator, order):
            emulator.set_blocks(0, 2)
            places = nothing, nothing, *map(view, found), scratch.data_ptr(), 0, 0
            native.attention_affinity_loss_backward_cuda(*inputs, *places)
        results.append(scratch[2 * batch * 64 * 64 :].clone())
        assert results[-1].count_nonzero() >= 2 * 2 * heads  # of both tiles of both images
    assert all(torch.equal(result, results[0]) for result in results)


# --- paths that the operators' tests do not name ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_code_without_tensor_cores_gives_the_same_numbers(emulator, dtype):
    """Code for 7.5, on whatever device the driver runs it, takes half precision by multiply-adds."""
    results = []
    for compiled in (90, 75):
        with emulated(emulator):
            emulator.set_device(compiled=compiled)
            results.append(everything(dtype))
    error = 2e-3 if dtype == torch.float16 else 2e-2
    for got, want in zip(*results):
        assert relative_error(got.float(), want.float()) < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_few_pairs_of_tiles_have_a_multiprocessor_each(rng, emulator, dtype):
    """No two blocks fit on one while another has none; where there are more pairs than that, two do fit."""
    half = 227 * 1024 // 2
    leaves, labels = random_case(rng, batch=1, heads=1, height=8, width=16, depth=8, dtype=dtype)  # 3 pairs
    for multiprocessors, alone in ((4, True), (3, True), (2, False)):
        with emulated(emulator):
            emulator.set_device(multiprocessors=multiprocessors)
            emulator.launches()
            attention_affinity_loss(*leaves, labels, 8)
            (launch,) = emulator.launches()
            assert (int(launch.split(" x ")[2]) > half) == alone


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not allocated")
def test_index_arithmetic_beyond_32_bits(rng, emulator):
    """Arrays of more than 2^31 elements that nobody fills; the last block alone runs, at their far end."""
    native, view, head = emulator.native, native_module.view, (torch.tensor([0.5]), torch.tensor([-0.25]))
    pixels, end = 48_000, 8
    maps, window = reserved(1, 1, pixels, pixels), torch.empty(1, 1, 1, pixels)
    assert maps.numel() > 2**31
    maps[0, 0, -end:, -end:] = torch.rand(end, end, generator=rng)
    want = affinity_from_maps(maps[..., -end:, -end:].clone(), *head, 1, end, 0, backend="reference")
    height, width = 40_000, 60_000
    affinity, cams, out = (reserved(1, 1, height, width) for _ in range(3))
    affinity[0, 0, -1, -end:], cams[0, 0, -1, -end:] = (torch.rand(end, generator=rng) for _ in range(2))
    walked = affinity[0, 0, -1, -end:] ** 2 / (affinity[0, 0, -1, -end:] ** 2 + 0.1) * cams[0, 0, -1, -end:]
    emulator.set_blocks(-1, 1)
    try:
        native.affinity_from_maps_cuda(view(maps), *map(view, head), (1, pixels, 0), view(window), 0, 0)
        torch.testing.assert_close(window[..., -end:], want)
        for shared, least in ((227 * 1024, 0), (1000, 2**33)):  # in one launch, and by way of T
            emulator.set_device(shared_bytes=shared)
            size = native.random_walk_cuda_workspace(view(affinity), view(cams), 0, 1, False, 0)
            assert size >= least
            scratch, out[0, 0, -1, -end:] = reserved(size // 4 + 1), float("nan")
            options = 0, 2.0, 0.1, 0, 1, False, (scratch.data_ptr(), scratch.nbytes), 0, 0
            native.random_walk_cuda(view(affinity), view(cams), view(out), *options)
            torch.testing.assert_close(out[0, 0, -1, -end:], walked)
    finally:
        emulator.set_blocks()
        emulator.set_device()
