"""Sinkhorn normalisation: against dense matrices, what doubly stochastic means, extremes, bad input, gradients."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.common import DEVICE, available, relative_error
from support.running import EMULATED, running

import afa_kernels
from afa_kernels import sinkhorn

RADIUS = 1  # where a test does not say another
KERNELS = [name for name in available("sinkhorn") if name != "reference"]


@pytest.fixture(params=[*available("sinkhorn"), *EMULATED])
def backend(request):
    with running(request.param) as name:
        yield name


def random_window(rng, batch=1, height=6, width=9, radius=RADIUS, dtype=torch.float32):
    return torch.rand(batch, (2 * radius + 1) ** 2, height, width, generator=rng).to(DEVICE, dtype)


def window_of(dense, like, radius):
    return afa_kernels.dense_to_window(dense, *like.shape[2:], radius)


def dense_sinkhorn(affinity, radius, num_iter=3, eps=0.0, symmetric=False):
    """The procedure on the N x N matrix as it is written, in float64: [B, N, N]."""
    matrix = afa_kernels.window_to_dense(affinity.double(), radius)
    for _ in range(num_iter):
        matrix = matrix / (matrix.sum(dim=1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(dim=2, keepdim=True) + eps)
    return (matrix + matrix.transpose(1, 2)) / 2 if symmetric else matrix


def inside(height, width, radius):
    """[taps, h, w]: whether a tap stays in the image, counted here."""
    dy, dx = (torch.arange(-radius, radius + 1) for _ in range(2))
    y, x = torch.arange(height)[None, :] + dy[:, None], torch.arange(width)[None, :] + dx[:, None]
    rows, columns = (y >= 0) & (y < height), (x >= 0) & (x < width)
    both = rows[:, None, :, None] & columns[None, :, None, :]
    return both.reshape(len(dy) * len(dx), height, width).to(DEVICE)


# --- against matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, radius",
    [(1, 1, 0), (1, 1, 2), (4, 5, 0), (3, 9, 4), (7, 3, 8), (1, 17, 3), (19, 1, 2), (13, 37, 2), (40, 70, 1)],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_window_against_matrices(rng, backend, height, width, radius, symmetric):
    if DEVICE == "cpu" and backend == "triton" and radius > 4:
        pytest.skip("Triton's interpreter takes too long for it; smaller windows take the same path")
    affinity = random_window(rng, 1 + (height * width < 50), height, width, radius)
    if height * width > 1000:  # as dense it would be large
        wanted = sinkhorn(affinity.double(), radius, symmetric=symmetric, backend="reference")
    else:
        wanted = window_of(dense_sinkhorn(affinity, radius, symmetric=symmetric), affinity, radius)
    assert relative_error(sinkhorn(affinity, radius, symmetric=symmetric), wanted) < 2e-7


@pytest.mark.parametrize("num_iter", [1, 2, 5])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 3.0])
def test_iterations_and_eps(rng, backend, num_iter, eps):
    affinity = random_window(rng, height=4, width=7)
    wanted = window_of(dense_sinkhorn(affinity, RADIUS, num_iter, eps), affinity, RADIUS)
    assert relative_error(sinkhorn(affinity, RADIUS, num_iter, eps), wanted) < 2e-7


def test_no_iteration_copies_what_is_inside(rng, backend):
    affinity = random_window(rng, height=3, width=4)
    wanted = torch.where(inside(3, 4, RADIUS), affinity, 0)
    got = sinkhorn(affinity, RADIUS, 0)
    assert torch.equal(got, wanted) and got.data_ptr() != affinity.data_ptr()
    dense = afa_kernels.window_to_dense(affinity, RADIUS)
    averaged = window_of((dense + dense.mT) / 2, affinity, RADIUS)
    assert relative_error(sinkhorn(affinity, RADIUS, 0, symmetric=True), averaged) < 1e-7


def test_the_published_walk(rng, backend):
    """CLIP-ES: three iterations, made symmetric, squared, times the CAM."""
    affinity, cams = random_window(rng, 1, 5, 8, 2), torch.rand(1, 3, 5, 8, generator=rng).to(DEVICE)
    matrix = dense_sinkhorn(affinity, 2, 3, symmetric=True)[0]
    wanted = (matrix @ matrix @ cams.double().flatten(2)[0].t()).t().view(cams.shape)
    offsets = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    weights = sinkhorn(affinity, 2, symmetric=True)
    assert relative_error(afa_kernels.diffuse(weights, cams, offsets, 2, "zero"), wanted) < 1e-6
    once = afa_kernels.diffuse(weights, cams, offsets, 1, "zero")
    assert relative_error(afa_kernels.diffuse(weights, once, offsets, 1, "zero"), wanted) < 1e-6


# --- what it is for -----------------------------------------------------------------------------------------


def test_rows_sum_to_one_and_columns_come_to_it(rng, backend):
    affinity = random_window(rng, 1, 4, 5, 2) + 0.05
    off = []
    for num_iter in (1, 3, 6, 12):
        dense = afa_kernels.window_to_dense(sinkhorn(affinity, 2, num_iter).double(), 2)
        assert float((dense.sum(2) - 1).abs().max()) < 1e-6
        off.append(float((dense.sum(1) - 1).abs().max()))
    assert off[0] > 1e-2 and off[1] < off[0] / 2 and off[2] < off[1] / 2 and off[3] < off[2] / 2 and off[3] < 1e-3


def test_a_doubly_stochastic_window_is_left_as_it_is(backend):
    """Half of each pixel goes to itself and half to its neighbour in a pair."""
    affinity = torch.zeros(1, 9, 2, 6, device=DEVICE)
    affinity[:, 4] = 0.5
    affinity[:, 5, :, 0::2], affinity[:, 3, :, 1::2] = 0.5, 0.5
    assert torch.equal(sinkhorn(affinity, 1, 7), affinity)
    assert torch.equal(sinkhorn(affinity, 1, 7, symmetric=True), affinity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_iter", [0, 3])
def test_symmetric_to_the_bit(rng, backend, dtype, num_iter):
    affinity = random_window(rng, height=7, width=13, dtype=dtype)
    dense = afa_kernels.window_to_dense(sinkhorn(affinity, RADIUS, num_iter, 0.01, symmetric=True), RADIUS)
    assert torch.equal(dense, dense.mT) and dense.dtype == dtype
    plain = afa_kernels.window_to_dense(sinkhorn(affinity, RADIUS, num_iter, 0.01), RADIUS)
    assert not torch.equal(plain, plain.mT)


@pytest.mark.parametrize("factor", [2.0**60, 2.0**-60, 3e30, 7e-31])
def test_a_constant_factor_changes_nothing(rng, backend, factor):
    affinity = random_window(rng, height=4, width=7) + 0.1
    got, wanted = sinkhorn(affinity * factor, RADIUS), sinkhorn(affinity, RADIUS)
    if math.log2(factor).is_integer():
        assert torch.equal(got, wanted)
    assert relative_error(got, wanted) < 2e-7


# --- range --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-20])
def test_affinities_of_any_size_side_by_side(rng, backend, eps):
    """1e-38 beside 1e38: factors of either sign's exponents, which float32 does not hold."""
    affinity = random_window(rng, height=4, width=7) + 0.1
    affinity = affinity * 10.0 ** torch.linspace(-36, 36, 9).view(9, 1, 1).roll(4, 0).to(affinity)
    affinity[:, :, 1] *= 1e-2
    leaf, grad = affinity.clone().requires_grad_(), torch.rand(affinity.shape, generator=rng).to(DEVICE)
    wide = affinity.double().requires_grad_()
    got, wanted = sinkhorn(leaf, RADIUS, 3, eps), sinkhorn(wide, RADIUS, 3, eps, backend="reference")
    assert relative_error(wanted, window_of(dense_sinkhorn(affinity, RADIUS, 3, eps), affinity, RADIUS)) < 1e-12
    torch.testing.assert_close(got.double(), wanted, rtol=2e-7, atol=1e-37)
    (mine,) = torch.autograd.grad(got, leaf, grad)
    (theirs,) = torch.autograd.grad(wanted, wide, grad.double())
    held = theirs.abs() < 1e37
    assert held.any() and mine[held].isfinite().all()
    # A difference of terms of the size of result / affinity.
    size = (grad * wanted / wide).abs() + (wanted / wide).abs()
    assert bool(((mine - theirs).abs()[held] <= 1e-6 * theirs.abs()[held] + 1e-9 * size[held] + 1e-37).all())


def test_empty_rows_and_columns_stay_zero_with_eps(backend):
    affinity = torch.ones(1, 9, 4, 5, device=DEVICE)
    affinity[:, :, 1, 2] = 0  # nothing of this pixel
    for tap in range(9):  # and nothing points at that one
        y, x = 2 - (tap // 3 - 1), 1 - (tap % 3 - 1)
        affinity[:, tap, y, x] = 0
    for num_iter, eps in ((1, 1e-3), (3, 1e-3), (30, 1e-12)):  # 1e-12 ^ 30 is no double
        got = sinkhorn(affinity, 1, num_iter, eps)
        assert got.isfinite().all()
        assert relative_error(got, window_of(dense_sinkhorn(affinity, 1, num_iter, eps), affinity, 1)) < 2e-7
        assert not got[:, :, 1, 2].any()
        dense = afa_kernels.window_to_dense(got, 1)
        assert not dense[:, :, 2 * 5 + 1].any() and (dense.sum(2) > 0.9).sum() == 19
    zero = torch.zeros(1, 9, 2, 3, device=DEVICE)
    assert torch.equal(sinkhorn(zero, 1, 30, 1e-12, symmetric=True), zero)


def test_empty_ones_are_no_numbers_without_eps(backend):
    affinity = torch.ones(1, 9, 5, 6, device=DEVICE)
    affinity[:, :, 1, 2] = 0
    got, wanted = sinkhorn(affinity, 1, 1), sinkhorn(affinity, 1, 1, backend="reference")
    mask = torch.zeros(5, 6, dtype=torch.bool, device=DEVICE)
    mask[1, 2] = True
    assert torch.equal(got.isnan(), mask & inside(5, 6, 1)[None]) and torch.equal(got.isnan(), wanted.isnan())


def test_a_nan_goes_as_far_as_sums_do(rng, backend):
    affinity = random_window(rng, 1, 9, 30, 1)
    affinity[0, 4, 4, 15] = torch.nan
    leaf = affinity.clone().requires_grad_()
    got, wanted = sinkhorn(leaf, 1, 2), sinkhorn(affinity, 1, 2, backend="reference")
    assert torch.equal(got.isnan(), wanted.isnan()) and got.isnan().any() and not got.isnan().all()
    grad = torch.zeros_like(affinity)
    grad[..., :4] = 1
    (of_affinity,) = torch.autograd.grad(got, leaf, grad)
    assert of_affinity[..., :6].isfinite().all()


def test_what_taps_outside_the_image_hold_plays_no_part(rng, backend):
    affinity, grad = random_window(rng, height=4, width=5, radius=3), random_window(rng, height=4, width=5, radius=3)
    there = inside(4, 5, 3)
    results = []
    for filling in (0.0, torch.nan, torch.inf):
        leaf = torch.where(there, affinity, filling).requires_grad_()
        for symmetric in (False, True):
            out = sinkhorn(leaf, 3, symmetric=symmetric)
            results.append((out, *torch.autograd.grad(out, leaf, torch.where(there, grad, filling))))
    for number, result in enumerate(results):
        for value, wanted in zip(result, results[number % 2]):
            assert torch.equal(value, wanted) and not value[:, ~there].any()


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_iter, eps", [(0, 0.0), (1, 0.0), (1, 0.2), (2, 0.0), (3, 0.0), (3, 0.2), (5, 2.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_against_the_reference(rng, backend, num_iter, eps, symmetric):
    leaf = random_window(rng, height=5, width=7).requires_grad_()
    grad = torch.randn(leaf.shape, generator=rng).to(DEVICE)
    (got,) = torch.autograd.grad(sinkhorn(leaf, RADIUS, num_iter, eps, symmetric=symmetric), leaf, grad)
    wide = leaf.detach().double().requires_grad_()
    reference = sinkhorn(wide, RADIUS, num_iter, eps, symmetric=symmetric, backend="reference")
    assert relative_error(got, torch.autograd.grad(reference, wide, grad.double())[0]) < 5e-7
    assert not got[:, ~inside(5, 7, RADIUS)].any()


@pytest.mark.parametrize("height, width, radius", [(1, 1, 1), (3, 9, 4), (1, 17, 3), (14, 37, 2), (41, 70, 1)])
def test_gradients_of_other_shapes(rng, backend, height, width, radius):
    leaf = random_window(rng, 1 + (width == 9), height, width, radius).requires_grad_()
    grad = torch.randn(leaf.shape, generator=rng).to(DEVICE)
    (got,) = torch.autograd.grad(sinkhorn(leaf, radius, 2, 0.1, symmetric=True), leaf, grad)
    wide = leaf.detach().double().requires_grad_()
    reference = sinkhorn(wide, radius, 2, 0.1, symmetric=True, backend="reference")
    assert relative_error(got, torch.autograd.grad(reference, wide, grad.double())[0]) < 5e-7


def test_the_gradient_has_no_part_along_a_constant_factor(rng, backend):
    leaf = (random_window(rng, height=4, width=7) + 0.1).requires_grad_()
    (got,) = torch.autograd.grad(sinkhorn(leaf, RADIUS).square().sum(), leaf)
    along = got.double() * leaf.detach()
    assert abs(float(along.sum())) < 1e-6 * float(along.abs().sum())


def test_gradcheck_of_the_reference(rng):
    leaf = random_window(rng, 1, 2, 3, 1, torch.float64).add(0.1).requires_grad_()
    for options in ({"num_iter": 2}, {"eps": 0.3, "symmetric": True}):
        assert torch.autograd.gradcheck(partial(sinkhorn, radius=1, **options, backend="reference"), leaf)


# --- types, modes, bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rng, backend, dtype):
    leaf = random_window(rng, dtype=dtype).requires_grad_()
    grad = random_window(rng, dtype=dtype)
    got = sinkhorn(leaf, RADIUS, symmetric=True)
    (slope,) = torch.autograd.grad(got, leaf, grad)
    wide = leaf.detach().double().requires_grad_()
    wanted = sinkhorn(wide, RADIUS, symmetric=True, backend="reference")
    (wanted_slope,) = torch.autograd.grad(wanted, wide, grad.double())
    assert got.dtype == slope.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    for mine, theirs in ((got, wanted), (slope, wanted_slope)):
        smallest = torch.finfo(dtype).smallest_normal * unit
        assert bool(((mine.double() - theirs).abs() <= 1.001 * unit * theirs.abs() + smallest).all())


def test_any_stride_autocast_same_bits_inputs_untouched(rng, backend):
    affinity, grad = random_window(rng, height=7, width=12), random_window(rng, height=7, width=12)
    copy = affinity.clone()

    def both(affinity, grad):
        leaf = affinity.detach().requires_grad_()
        out = sinkhorn(leaf, RADIUS, eps=0.1, symmetric=True)
        return out.detach(), *torch.autograd.grad(out, leaf, grad)

    wanted = both(affinity, grad)
    swapped = [value.transpose(2, 3).contiguous().transpose(2, 3) for value in (affinity, grad)]
    last = [value.to(memory_format=torch.channels_last) for value in (affinity, grad)]
    spaced = [torch.stack([value, value], -1)[..., 0] for value in (affinity, grad)]
    for case in (swapped, last, spaced, (affinity, last[1]), (swapped[0], grad), (affinity, grad)):
        assert all(torch.equal(*pair) for pair in zip(both(*case), wanted))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(both(affinity, grad), wanted))
    expanded = sinkhorn(affinity[:1].expand(3, -1, -1, -1), RADIUS, eps=0.1, symmetric=True)
    assert torch.equal(expanded, wanted[0][:1].expand(3, -1, -1, -1))
    assert torch.equal(affinity, copy)


def test_images_of_a_batch_do_not_see_each_other(rng, backend):
    affinity = random_window(rng, batch=3)
    together = sinkhorn(affinity, RADIUS)
    assert all(torch.equal(together[b : b + 1], sinkhorn(affinity[b : b + 1], RADIUS)) for b in range(3))


@pytest.mark.skipif("native" not in KERNELS or DEVICE != "cpu", reason="no native CPU kernels")
def test_the_number_of_threads_changes_no_bit(rng):
    affinity, grad, threads = random_window(rng, 1, 11, 13), random_window(rng, 1, 11, 13), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            leaf = affinity.clone().requires_grad_()
            out = sinkhorn(leaf, RADIUS, symmetric=True, backend="native")
            results.append((out, *torch.autograd.grad(out, leaf, grad)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for result in results for pair in zip(result, results[0]))


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("affinity", torch.ones(1, 9, 4), ValueError),
        ("affinity", torch.ones(1, 8, 3, 4), ValueError),
        ("affinity", torch.ones(0, 9, 3, 4), ValueError),
        ("affinity", torch.ones(1, 9, 3, 4, dtype=torch.int64), TypeError),
        ("affinity", None, TypeError),
        ("radius", -1, ValueError),
        ("radius", 2, ValueError),
        ("radius", 1.0, TypeError),
        ("radius", 2**70, ValueError),
        ("num_iter", -1, ValueError),
        ("num_iter", 1.0, TypeError),
        ("num_iter", 2**70, ValueError),
        ("eps", -0.1, ValueError),
        ("eps", float("nan"), ValueError),
        ("eps", float("inf"), ValueError),
        ("eps", "0.1", TypeError),
        ("symmetric", 1, TypeError),
        ("symmetric", None, TypeError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    case = {"affinity": torch.ones(1, 9, 3, 4), "radius": 1}
    named = "affinity" if (argument, value) == ("radius", 2) else argument
    with pytest.raises(error, match=f"^{named}"):
        sinkhorn(**{**case, argument: value})


@pytest.mark.parametrize("backend", available("sinkhorn")[:2], indirect=True)  # the others' graphs are the second's
def test_compiles_in_one_graph(rng, backend):
    leaf = random_window(rng, height=3, width=4, radius=1).requires_grad_()

    def step(affinity):
        return sinkhorn(sinkhorn(affinity, 1, 2, 0.1), 1, symmetric=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(leaf), step(leaf)
    assert relative_error(got, wanted) < 1e-6
    grad = torch.randn(got.shape, generator=rng).to(DEVICE)
    assert relative_error(*(torch.autograd.grad(out, leaf, grad)[0] for out in (got, wanted))) < 1e-6


@pytest.mark.parametrize("backend_name", KERNELS)
def test_operators_are_registered_right(rng, backend_name):
    """Schema, fake tensors, autograd and tracing of the operator and of its gradient."""
    affinity = random_window(rng, 1, 3, 4, 1)
    inputs = (affinity.clone().requires_grad_(), 1, 2, 0.1, True, backend_name)
    torch.library.opcheck(torch.ops.afa.sinkhorn.default, inputs)
    scales = torch.ops.afa.sinkhorn(affinity, 1, 2, 0.1, True, backend_name)[1]
    assert scales.shape == (1, 4, 3, 4) and scales.dtype == torch.float64
    inputs = (affinity, scales, affinity, 1, 0.1, True, backend_name)
    torch.library.opcheck(torch.ops.afa.sinkhorn_gradient.default, inputs)
