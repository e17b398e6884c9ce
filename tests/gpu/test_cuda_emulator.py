"""The CUDA sources, run thread by thread on the CPU: faults that must not pass unseen, orders of threads, and what the
operators' tests do not name. Those have the emulated backend among theirs.
"""

from __future__ import annotations

import sys

import pytest
import torch
from support.common import ROOT, relative_error
from support.cuda_emulator import build
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated
from support.memory import reserved
from support.running import CHIPS

from afa_kernels import diffuse, pamr, par, par_weights
from afa_kernels.core import native_module

pytestmark = ON_THE_EMULATOR
SIX = (1, 2, 4, 8, 12, 24)


@pytest.fixture(params=CHIPS)
def device(request, either):
    """The native backend is the emulated CUDA one for as long as the test runs."""
    with emulated(either):
        either.set_device(*CHIPS[request.param])
        yield request.param


def test_the_emulator_leaves_with_its_block(emulator):
    """Every operator's calls have it within, and none after: what one first imported within would keep it."""
    operators = sorted(path.parent.name for path in (ROOT / "afa_kernels" / "ops").glob("*/native.py"))
    names = [*(f"afa_kernels.ops.{name}.native" for name in operators), "afa_kernels.ops.bilateral.native_cuda"]
    with emulated(emulator):
        assert all(sys.modules[name].native is emulator.native for name in names)
    assert all(sys.modules[name].native is native_module.native for name in names)


# --- races: the order of threads and blocks must not show -------------------------------------------------------------


@pytest.mark.parametrize("kind", CHIPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_threads_gives_the_same_bits(rng, emulator, kind, dtype):
    images, masks, grad = (torch.rand(2, channels, 18, 37, generator=rng).to(dtype) for channels in (3, 5, 5))
    weights = torch.rand(2, 9, 18, 37, generator=rng).to(dtype)
    present = torch.rand(2, 5, generator=rng) > 0.3

    def everything() -> list[torch.Tensor]:
        leaf = masks.clone().requires_grad_()
        par(images, leaf, (1, 5), 3, class_mask=present).backward(grad)
        taps = [(0, 0), (1, -2), (-3, 1), (0, 5), (2, 0), (-40, 7), (3, 60), (-1, -1), (0, 9)]
        return [
            par(images, masks, SIX, 3, class_mask=present),
            pamr(images, masks, (2, 1), 3),
            par_weights(images, SIX),
            diffuse(weights, masks, taps, 3, "zero"),
            leaf.grad,
        ]

    results = []
    for order in (0, 1, 2):
        with emulated(emulator, order):
            emulator.set_device(*CHIPS[kind])
            emulator.launches()
            results.append(everything())
            assert any(launch.startswith("cooperative") for launch in emulator.launches()) == (kind == "resident")
    for result in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(result, results[0]))


# --- the paths that the operators' tests do not name ------------------------------------------------------------------


@pytest.mark.parametrize("operator", [par, pamr])
def test_half_weights_keep_to_their_budget(rng, device, either, operator):
    """Half-precision weights, which bfloat16 masks get: at most 2^-11 an iteration, in practice a third of that."""
    images, masks = torch.rand(1, 3, 25, 31, generator=rng), torch.rand(1, 4, 25, 31, generator=rng).bfloat16()
    want = operator(images, masks.float(), SIX, 10, backend="reference")
    out = torch.empty(masks.shape)  # float32, so that only the weights are rounded
    view, native = native_module.view, either.native
    dilations, factors = list(SIX), [0.3, 0.3, 0.01] if operator is par else []
    size = native.par_cuda_workspace(view(images), view(masks), dilations, 10, False, True, 0)
    scratch = torch.empty(max(1, size), dtype=torch.uint8)
    options = 0, 10, False, True, (scratch.data_ptr(), scratch.numel()), 0, 0
    native.par_cuda(view(images), view(masks), view(out), dilations, factors, *options)
    assert relative_error(out, want) < 2e-3
    assert ((out - want).abs() <= 10 * 2**-11 * want + 1e-6).all()


def test_the_bound_of_residence_is_the_stated_one(emulator):
    """On an H100 PAR keeps its weights on chip, out of the workspace, up to 352 x 352 in float, 416 x 416 in half."""
    emulator.set_device(132, 227 * 1024)
    try:
        for half, largest in ((False, 352), (True, 416)):
            for size, resident in ((largest, True), (largest + 32, False)):
                images, masks = (
                    torch.empty(2, 3, size, size, device="meta"),
                    torch.empty(2, 3, size, size, device="meta"),
                )
                views = [(0, 0, tuple(tensor.shape), tensor.stride()) for tensor in (images, masks)]
                needed = emulator.native.par_cuda_workspace(*views, list(SIX), 10, False, half, 0)
                assert (needed < 48 * 2 * size * size) == resident
    finally:
        emulator.set_device()


@pytest.mark.parametrize("kilobytes", [227, 96, 60, 44])
@pytest.mark.parametrize("taps", [24, 25, 48, 64])
def test_weights_in_registers_and_in_shared_memory(rng, emulator, kilobytes, taps):
    """Less and less shared memory: one wave of threads and two, weights all shared, half in registers, all streamed."""
    offsets = torch.randint(-4, 5, (taps, 2), generator=rng)
    weights, masks = torch.rand(2, taps, 24, 40, generator=rng) / taps, torch.rand(2, 5, 24, 40, generator=rng)
    want = diffuse(weights, masks, offsets, 3, backend="reference")
    results = []
    for order in (0, 1):
        with emulated(emulator, order):
            emulator.set_device(2, kilobytes * 1024)
            results.append(diffuse(weights, masks, offsets, 3))
    assert torch.equal(*results) and relative_error(results[0], want) < 1e-5


@pytest.mark.parametrize("images_in_batch", [1, 3, 7])
def test_a_batch_larger_than_the_chip_is_walked_through(rng, emulator, images_in_batch):
    images, masks = (torch.rand(images_in_batch, channels, 21, 40, generator=rng) for channels in (3, 6))
    want = par(images, masks, (1, 3), 4, backend="reference")
    with emulated(emulator):
        emulator.set_device(5, 60 * 1024)
        emulator.launches()
        got = par(images, masks, (1, 3), 4)
        assert emulator.launches()[0].startswith("cooperative")
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("taps", [64, 65, 449, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_number_of_taps(rng, device, taps, dtype):
    weights = (torch.rand(1, taps, 6, 16, generator=rng) / taps).to(dtype)
    masks = torch.rand(1, 3, 6, 16, generator=rng)
    offsets = torch.randint(-20, 20, (taps, 2), generator=rng)
    got, want = (diffuse(weights, masks, offsets, 2, backend=backend) for backend in ("native", "reference"))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("width", [36, 37])
def test_taps_are_shared_where_the_image_does_not_fill_the_device(rng, emulator, width):
    """As in the random walk: 8 threads to a pixel on a device of many multiprocessors, one on a device of one."""
    weights, masks = torch.rand(2, 81, 19, width, generator=rng) / 81, torch.rand(2, 9, 19, width, generator=rng)
    offsets = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)]
    present = torch.rand(2, 9, generator=rng) > 0.3
    want = diffuse(weights, masks, offsets, 2, "zero", class_mask=present, backend="reference")
    blocks = []
    for multiprocessors in (1, 200):
        results = []
        for order in (0, 1):
            with emulated(emulator, order):
                emulator.set_device(multiprocessors)
                emulator.launches()
                results.append(diffuse(weights, masks, offsets, 2, "zero", class_mask=present))
                blocks.append(int(emulator.launches()[-1].split(" x ")[0]))
        assert torch.equal(*results) and relative_error(results[0], want) < 1e-5
    assert max(blocks[:2]) < min(blocks[2:])


@pytest.mark.parametrize("shape", [(70_000, 1, 1, 1), (1, 1, 65535 * 128 + 100, 1)])
def test_more_images_or_rows_than_a_grid_has_blocks(rng, emulator, shape):
    """Grid dimensions y and z end at 65535: the first block walks on to what would be the 65536th's."""
    masks, weights = torch.rand(shape, generator=rng), torch.rand(shape, generator=rng)
    with emulated(emulator):
        emulator.set_blocks(0, 1)
        got = diffuse(weights, masks, [(0, 0)], 1).flatten()
    written = ~got.isnan()
    assert torch.equal(got[written], (weights * masks).flatten()[written])
    assert written[0] and written[-1 if shape[0] == 1 else 65535]


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is reserved but not allocated")
def test_index_arithmetic_beyond_32_bits(rng, emulator):
    """1 x 1 x 40000 x 60000: the last block alone runs, at the far end of reserved memory that nobody fills."""
    height, width, native, view = 40_000, 60_000, emulator.native, native_module.view
    shape = 1, 1, height, width
    weights, masks, out = reserved(1, 2, height, width), reserved(*shape), reserved(*shape)
    corner = slice(height - 64, height), slice(width - 256, width)
    weights[(0, slice(None), *corner)] = torch.rand(2, 64, 256, generator=rng)
    masks[(0, 0, *corner)] = torch.rand(64, 256, generator=rng)
    emulator.set_blocks(-1, 1)
    try:
        scratch = torch.zeros(4096, dtype=torch.uint8)
        for transpose in (False, True):
            out[(0, 0, *corner)] = float("nan")
            options = [-1, -4, 0, 0], 0, 1, False, transpose, (scratch.data_ptr(), scratch.numel()), 0, 0
            native.diffuse_cuda(view(weights), view(masks), view(out), *options)
            small = weights[(..., *corner)].clone(), masks[(..., *corner)].clone().requires_grad_()
            end = out[(0, 0, *corner)]
            want = diffuse(*small, [(-1, -4), (0, 0)], 1, backend="reference")
            if transpose:
                (want,) = torch.autograd.grad(want, small[1], small[1].detach())
            written = ~end.isnan()
            assert written.sum() >= 4 * 32 and written[-1, -1]
            torch.testing.assert_close(end[written], want[0, 0].detach()[written], rtol=1e-5, atol=1e-6)

        images, result = reserved(1, 3, height, width), reserved(1, 8, height, width)
        images[(0, slice(None), *corner)] = torch.rand(3, 64, 256, generator=rng)
        result[(0, slice(None), *corner)] = float("nan")
        native.par_weights_cuda(view(images), view(result), [3], [0.3, 0.3, 0.01], 0, 0)
        want = par_weights(images[(..., *corner)].clone(), (3,), backend="reference")
        end = result[(..., *corner)]
        written = ~end.isnan()
        assert written.sum() == 8 * 16 * 32 and written[..., -1, -1].all()
        torch.testing.assert_close(end[written], want[written], rtol=1e-4, atol=1e-6)
    finally:
        emulator.set_blocks()
    # Two buffers of float32, rows padded to 16 bytes, and the weights of 8 taps; nothing is rounded down to 32 bits.
    needed = native.par_cuda_workspace(view(images), view(masks), [3], 3, False, False, 0)
    assert needed >= 4 * (8 + 2) * height * width > 2**33


# --- faults: the emulator must notice ---------------------------------------------------------------------------------

FAULTS = {
    "shared_overrun": "shared memory: index 64 is outside [0, 64)",
    "raw_overrun": "shared memory: byte 256 was written, the block has 256",
    "divergent": "divergent barrier: thread (0,0,0) of block (0,0,0) is at a block barrier",
    "half_warp": "divergent barrier: thread (0,0,0) of block (0,0,0) is in a warp collective",
    "early_exit": "divergent barrier:",
    "too_much_shared": "more shared memory than the device has",
    "too_many_blocks": "a cooperative grid of 4096 blocks is not resident at once",
    "not_cooperative": "grid barrier in a launch that is not cooperative",
}


def faulty(emulator, name: str, order: int = 0) -> tuple[torch.Tensor, str]:
    out = torch.full((80,), float("nan"))
    emulator.set_order(order)
    try:
        return out, emulator.fault(name, out.data_ptr())
    finally:
        emulator.set_order(0)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_refused(emulator, name):
    assert FAULTS[name] in faulty(emulator, name)[1]


@pytest.mark.parametrize("name", ["missing_barrier", "missing_grid_barrier"])
def test_missing_barrier_shows_in_another_order(emulator, name):
    results = [faulty(emulator, name, order) for order in (0, 1)]
    assert not any(complaint for _, complaint in results)
    assert not torch.equal(results[0][0].nan_to_num(-1), results[1][0].nan_to_num(-1))


def test_wrong_index_and_unwritten_element_show_in_the_result(emulator):
    want = 2 * ((torch.arange(64) + 1) % 64).float()
    assert torch.equal(faulty(emulator, "sound")[0][:64], want)
    assert not torch.equal(faulty(emulator, "wrong_index")[0][:64], want)
    assert faulty(emulator, "unwritten")[0][:64].isnan().sum() == 1
    assert not faulty(emulator, "global_overrun")[0][64:].isnan().all()


def test_copy_under_way_is_no_number_until_it_is_waited_for(emulator):
    want = torch.arange(64).add(1.0)
    want[60:] = 0
    assert torch.equal(faulty(emulator, "copied")[0][:64], want)
    early = faulty(emulator, "missing_wait")[0][:64]
    assert torch.equal(early[:32], want[:32]) and early[32:].isnan().all()


def test_one_build_fuses_products_and_the_other_does_not(either):
    """Where both are tried they are loaded side by side, each as itself."""
    fuses = "contracted" in build.kinds() and either is build.load("contracted")
    assert faulty(either, "fused")[0][:64].any() == fuses
    assert not faulty(either, "spelled_out")[0][:64].any()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", ["sound", "sound_grid"])
def test_sound_kernels_pass_in_every_order(emulator, name, order):
    out, complaint = faulty(emulator, name, order)
    assert complaint == "" and out[:64].isfinite().all() and out[64:].isnan().all()
    assert torch.equal(out.nan_to_num(-1), faulty(emulator, name)[0].nan_to_num(-1))
