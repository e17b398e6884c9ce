"""Random-walk propagation: recorded numbers, dense matrices, background scores, bad input, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.common import DEVICE, available, relative_error
from support.running import EMULATED, running

import afa_kernels
from afa_kernels import use_backend


@pytest.fixture(params=[*available("random_walk"), *EMULATED])
def backend(request):
    with running(request.param) as name:
        yield name


def random_case(rng, batch=2, channels=4, height=7, width=10, radius=2, dtype=torch.float32):
    affinity = torch.rand(batch, (2 * radius + 1) ** 2, height, width, generator=rng)
    cams = torch.rand(batch, channels, height, width, generator=rng)
    return affinity.to(DEVICE, dtype), cams.to(DEVICE, dtype)


def dense_walk(affinity, cams, radius, power=2.0, num_steps=1, eps=0.1):
    """The formula with matrices, in float64: T = D^-1 A^p with D the column sums."""
    matrix = afa_kernels.window_to_dense(affinity.double(), radius) ** power
    matrix = matrix / (matrix.sum(1) + eps)[:, :, None]
    walked = cams.double().flatten(2)
    for _ in range(num_steps):
        walked = walked @ matrix.transpose(1, 2)
    return walked.view(cams.shape)


# --- recorded numbers ---------------------------------------------------------------------------------------


def recorded(arrays):
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in arrays.items()}
    height, width, radius = (int(tensors[name]) for name in ("height", "width", "radius"))
    affinity = afa_kernels.dense_to_window(tensors["affinity"], height, width, radius)
    return tensors, affinity, radius


def test_recorded_walk(golden, backend):
    tensors, affinity, radius = recorded(golden("random_walk"))
    walked = afa_kernels.random_walk(affinity, tensors["cams"], radius, int(tensors["power"]), eps=1e-4)
    assert relative_error(walked, tensors["out"]) < 1e-5


def test_recorded_walk_with_background(golden, backend):
    tensors, affinity, radius = recorded(golden("random_walk"))
    score = float(tensors["bkg_score"])
    labels = tensors["cls_labels"]
    walked = afa_kernels.random_walk_with_background(affinity, tensors["cams"], labels, score, radius)
    assert relative_error(walked, tensors["out_with_bkg"]) < 1e-5
    assert torch.equal(walked[:, 1:].amax((2, 3)) > 0, labels > 0)


# --- against matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, radius",
    [(1, 1, 0), (1, 1, 2), (6, 5, 0), (3, 9, 4), (9, 3, 8), (1, 17, 3), (23, 1, 2), (14, 37, 8)],
)
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_walk_against_matrices(rng, backend, height, width, radius, num_steps):
    if DEVICE == "cpu" and backend == "triton" and radius > 4:
        pytest.skip("Triton's interpreter takes too long for it; smaller windows take the same path")
    affinity, cams = random_case(rng, height=height, width=width, radius=radius, channels=3)
    got = afa_kernels.random_walk(affinity, cams, radius, num_steps=num_steps)
    assert relative_error(got, dense_walk(affinity, cams, radius, num_steps=num_steps)) < 1e-5


@pytest.mark.parametrize("power", [1, 2, 2.5, 4])
@pytest.mark.parametrize("eps", [0, 1e-4, 0.1])
def test_powers_and_eps(rng, backend, power, eps):
    affinity, cams = random_case(rng)
    got = afa_kernels.random_walk(affinity, cams, 2, power, 2, eps)
    assert relative_error(got, dense_walk(affinity, cams, 2, power, 2, eps)) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 2])
def test_gradients_against_the_reference(rng, backend, num_steps):
    leaves = [leaf.requires_grad_() for leaf in random_case(rng)]
    grad = torch.randn(2, 4, 7, 10, generator=rng).to(DEVICE)
    keep = torch.tensor([[True, False, True, True], [False, True, True, False]], device=DEVICE)
    got = torch.autograd.grad(afa_kernels.random_walk(*leaves, 2, 2, num_steps, class_mask=keep), leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = afa_kernels.random_walk(*wide, 2, 2, num_steps, class_mask=keep, backend="reference")
    for mine, theirs in zip(got, torch.autograd.grad(reference, wide, grad.double())):
        assert relative_error(mine, theirs) < 1e-4


def test_only_one_input_needs_gradients(rng, backend):
    affinity, cams = random_case(rng, height=4, width=5)
    both = [affinity.clone().requires_grad_(), cams.clone().requires_grad_()]
    wanted = torch.autograd.grad(afa_kernels.random_walk(*both, 2).square().sum(), both)
    for chosen in range(2):
        some = [value.clone().requires_grad_(i == chosen) for i, value in enumerate((affinity, cams))]
        (got,) = torch.autograd.grad(afa_kernels.random_walk(*some, 2).square().sum(), some[chosen])
        assert relative_error(got, wanted[chosen]) < 1e-6


def test_what_taps_outside_the_image_hold_plays_no_part(rng, backend):
    affinity, cams = random_case(rng, height=4, width=5, radius=3)
    inside = afa_kernels.dense_to_window(torch.ones(1, 20, 20, device=DEVICE), 4, 5, 3) > 0
    poisoned = torch.where(inside, affinity, torch.nan)
    assert torch.equal(afa_kernels.random_walk(poisoned, cams, 3), afa_kernels.random_walk(affinity, cams, 3))


def test_a_pixel_without_affinity_gets_zero_where_eps_is_positive(backend):
    affinity = torch.zeros(1, 9, 4, 4, device=DEVICE)
    walked = afa_kernels.random_walk(affinity, torch.ones(1, 2, 4, 4, device=DEVICE), 1)
    assert torch.equal(walked, torch.zeros_like(walked))


@pytest.mark.parametrize("value, eps", [(0.0, 1e-40), (1e-20, 0.0), (1e-20, 1e-40), (1e-18, 1e-36)])
def test_sums_below_the_normal_numbers_are_divided_by(rng, backend, value, eps):
    """Neither they nor what is multiplied by 1 / D leave float32, though 1 / D does."""
    affinity = (value * (0.5 + torch.rand(1, 9, 4, 5, generator=rng))).to(DEVICE).requires_grad_()
    cams = torch.rand(1, 3, 4, 5, generator=rng).to(DEVICE).requires_grad_()
    wide = affinity.detach().double().requires_grad_(), cams.detach().double().requires_grad_()
    got, wanted = (
        afa_kernels.random_walk(affinity, cams, 1, eps=eps),
        dense_walk(*wide, 1, eps=eps),
    )
    assert relative_error(got, wanted) < 1e-4 and (value > 0) == bool(wanted.any())
    mine, theirs = (torch.autograd.grad(out.sum(), leaves) for out, leaves in ((got, (affinity, cams)), (wanted, wide)))
    assert relative_error(mine[1], theirs[1]) < 1e-4
    # That of the affinity is a difference of terms of the size of out / affinity.
    size = float(wanted.abs().max()) / max(value, 1e-30)
    assert mine[0].isfinite().all() and float((mine[0] - theirs[0]).abs().max()) <= 1e-3 * size


def test_one_faint_pixel_leaves_the_others_as_they_are(rng, backend):
    affinity, cams = random_case(rng)
    affinity[0, :, 3, 4] *= 1e-21
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            affinity[0, (2 - dy) * 5 + 2 - dx, 3 + dy, 4 + dx] *= 1e-20
    got = afa_kernels.random_walk(affinity, cams, 2, eps=0)
    wanted = dense_walk(affinity, cams, 2, eps=0)
    assert relative_error(got, wanted) < 1e-3
    others = torch.ones(7, 10, dtype=torch.bool, device=DEVICE)
    others[3, 4] = False
    assert relative_error(got[:, :, others], wanted[:, :, others]) < 1e-5


def test_a_nan_stays_with_the_pixels_that_reach_it(rng, backend):
    affinity, cams = random_case(rng, batch=1)
    cams[0, 1, 3, 4] = torch.nan
    leaves = affinity.requires_grad_(), cams.requires_grad_()
    walked = afa_kernels.random_walk(*leaves, 2)
    rows, columns = torch.arange(7, device=DEVICE)[:, None], torch.arange(10, device=DEVICE)
    reached = ((rows - 3).abs() <= 2) & ((columns - 4).abs() <= 2)
    assert torch.equal(walked[0, 1].isnan(), reached) and walked[0, [0, 2, 3]].isfinite().all()
    of_affinity, of_cams = torch.autograd.grad(walked.nansum(), leaves)
    assert of_cams.isfinite().all()
    # A tap hears of the pixels that it starts from and points at, and these of their windows.
    assert not of_affinity[0][:, ((rows - 3).abs() > 4) | ((columns - 4).abs() > 4)].isnan().any()


def test_class_mask_leaves_channels_out(rng, backend):
    affinity, cams = random_case(rng)
    keep = torch.tensor([[True, False, True, False], [False, False, False, False]], device=DEVICE)
    full = afa_kernels.random_walk(affinity, cams, 2, num_steps=2)
    got = afa_kernels.random_walk(affinity, cams, 2, num_steps=2, class_mask=keep)
    assert relative_error(got, torch.where(keep[:, :, None, None], full, 0)) < 1e-6
    assert torch.equal(got[1], torch.zeros_like(got[1]))


# --- background ---------------------------------------------------------------------------------------------


def test_background_is_a_softmax_over_present_channels_then_one_step(rng, backend):
    affinity, cams = random_case(rng, channels=5)
    labels = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], device=DEVICE)
    got = afa_kernels.random_walk_with_background(affinity, cams, labels, 0.4, 2)
    for b, present in enumerate(([0, 3], [])):
        channels = torch.cat([torch.full((1, 7, 10), 0.4, device=DEVICE), cams[b, present]]).softmax(0)
        walked = dense_walk(affinity[b : b + 1], channels[None], 2)[0]
        wanted = torch.zeros(6, 7, 10, dtype=torch.float64, device=DEVICE)
        wanted[[0, *(k + 1 for k in present)]] = walked
        assert relative_error(got[b], wanted) < 1e-5


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_several_scores_are_as_many_walks(rng, backend, kind):
    affinity, cams = random_case(rng, height=4, width=5)
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], device=DEVICE).to(kind)
    together = afa_kernels.random_walk_with_background(affinity, cams, labels, (0.55, 0.35), 2)
    assert together.shape == (2, 2, 5, 4, 5)
    for score, one in zip((0.55, 0.35), together):
        assert relative_error(one, afa_kernels.random_walk_with_background(affinity, cams, labels, score, 2)) < 1e-6


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, np.float32])
def test_scores_as_arrays_and_tensors(rng, backend, kind):
    affinity, cams = random_case(rng, height=4, width=5)
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], device=DEVICE)
    walk = afa_kernels.random_walk_with_background
    several = walk(affinity, cams, labels, kind([0.5, 0.25]), 2)
    assert torch.equal(several, walk(affinity, cams, labels, (0.5, 0.25), 2))
    assert torch.equal(walk(affinity, cams, labels, kind([0.5])[0], 2), walk(affinity, cams, labels, 0.5, 2))


# --- types, modes, bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_the_same_in_pytorch(rng, backend, dtype):
    affinity, cams = random_case(rng, dtype=dtype)
    wanted = dense_walk(affinity, cams, 2)
    matrix = afa_kernels.window_to_dense(affinity, 2) ** 2
    matrix = matrix / (matrix.sum(1) + 0.1)[:, :, None]
    plain = (cams.flatten(2) @ matrix.transpose(1, 2)).view(cams.shape)
    got = afa_kernels.random_walk(affinity, cams, 2)
    assert got.dtype == dtype
    assert relative_error(got, wanted) <= 2 * relative_error(plain, wanted)
    mixed = afa_kernels.random_walk(affinity, cams.float(), 2)
    assert mixed.dtype == torch.float32
    assert relative_error(mixed, wanted) < 1e-5


def test_any_stride_autocast_same_bits_inputs_untouched(rng, backend):
    affinity, cams = random_case(rng)
    copies = affinity.clone(), cams.clone()
    wanted = afa_kernels.random_walk(affinity, cams, 2)
    last = [value.to(memory_format=torch.channels_last) for value in (affinity, cams)]
    turned = [value.transpose(2, 3).contiguous().transpose(2, 3) for value in (affinity, cams)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(afa_kernels.random_walk(affinity, cams, 2), wanted)
    assert torch.equal(afa_kernels.random_walk(affinity, cams, 2), wanted)
    for case in (last, turned):
        assert relative_error(afa_kernels.random_walk(*case, 2), wanted) < 1e-6
    assert torch.equal(affinity, copies[0]) and torch.equal(cams, copies[1])


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("affinity", torch.ones(1, 9, 4), ValueError),
        ("affinity", torch.ones(1, 8, 3, 4), ValueError),
        ("affinity", torch.ones(1, 9, 3, 4, dtype=torch.int64), TypeError),
        ("cams", torch.ones(2, 2, 3, 4), ValueError),
        ("cams", torch.ones(1, 2, 4, 3), ValueError),
        ("cams", torch.ones(1, 0, 3, 4), ValueError),
        ("cams", torch.ones(1, 2, 3, 4, device="meta"), ValueError),
        ("cams", None, TypeError),
        ("radius", -1, ValueError),
        ("radius", 2, ValueError),
        ("power", 0, ValueError),
        ("power", float("nan"), ValueError),
        ("num_steps", -1, ValueError),
        ("num_steps", 1.0, TypeError),
        ("num_steps", 2**70, ValueError),
        ("radius", 2**70, ValueError),
        ("power", 10**400, ValueError),
        ("eps", -0.1, ValueError),
        ("class_mask", torch.ones(1, 3, dtype=torch.bool), ValueError),
        ("class_mask", torch.ones(1, 2), TypeError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    case = {"affinity": torch.ones(1, 9, 3, 4), "cams": torch.ones(1, 2, 3, 4), "radius": 1}
    named = "affinity" if (argument, value) == ("radius", 2) else argument
    with pytest.raises(error, match=f"^{named}"):
        afa_kernels.random_walk(**{**case, argument: value})


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("cls_labels", torch.ones(1, 3), ValueError),
        ("cls_labels", torch.ones(2), ValueError),
        ("score", (), ValueError),
        ("score", "0.4", TypeError),
        ("score", (0.4, float("inf")), ValueError),
        ("score", None, TypeError),
        ("score", [[0.4]], TypeError),
        ("score", torch.tensor([[0.4]]), TypeError),
        ("score", torch.tensor(0.4, requires_grad=True), ValueError),
        ("eps", -1.0, ValueError),
    ],
)
def test_bad_input_with_background(argument, value, error):
    case = {
        "affinity": torch.ones(1, 9, 3, 4),
        "cams": torch.ones(1, 2, 3, 4),
        "cls_labels": torch.ones(1, 2),
        "score": 0.4,
        "radius": 1,
    }
    with pytest.raises(error, match=rf"^{argument}"):
        afa_kernels.random_walk_with_background(**{**case, argument: value})


def test_gradcheck_of_the_reference(rng):
    leaves = [leaf.requires_grad_() for leaf in random_case(rng, 1, 2, 3, 2, 1, torch.float64)]
    labels = torch.tensor([[1, 0]], device=DEVICE)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *x: afa_kernels.random_walk(*x, 1, 2, 2), leaves)
        walk = afa_kernels.random_walk_with_background
        assert torch.autograd.gradcheck(lambda a, c: walk(a, c, labels, (0.3, 0.5), 1), leaves)


def test_compiles_in_one_graph(rng, backend):
    leaves = [leaf.requires_grad_() for leaf in random_case(rng, height=3, width=4, radius=1)]
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], device=DEVICE)

    def step(affinity, cams):
        walked = afa_kernels.random_walk(affinity, cams, 1, num_steps=2)
        return afa_kernels.random_walk_with_background(affinity, walked, labels, (0.3, 0.5), 1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*leaves), step(*leaves)
    assert relative_error(got, wanted) < 1e-5
    grad = torch.randn(got.shape, generator=rng).to(DEVICE)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend_name", [name for name in available("random_walk") if name != "reference"])
def test_operators_are_registered_right(rng, backend_name):
    """Schema, fake tensors, autograd and tracing of the operator, its adjoint and the affinity's gradient."""
    affinity, cams = random_case(rng, 1, 3, 3, 4, 1)
    keep = torch.tensor([[True, False, True]], device=DEVICE)
    for transpose in (False, True):
        leaves = [affinity.clone().requires_grad_(), cams.clone().requires_grad_()]
        inputs = (*leaves, 1, 2.0, 2, 0.1, keep, transpose, backend_name)
        torch.library.opcheck(torch.ops.afa.random_walk.default, inputs)
    inputs = (affinity, cams, cams, 1, 2.0, 2, 0.1, keep, backend_name)
    torch.library.opcheck(torch.ops.afa.random_walk_affinity_gradient.default, inputs)
