"""Affinity of features: against the dense definition, gradients, half precision, bad input, what it feeds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import fuzzing
from support.common import DEVICE, available, relative_error
from support.fuzzing import DTYPES, Draw, agree, fuzz, without_limit
from support.running import EMULATED, running

import afa_kernels
from afa_kernels import feature_affinity, use_backend
from afa_kernels.ops.affinity.reference import window_mask

KINDS = ["cos", "exp_l1", "relu_dot"]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=[*available("feature_affinity"), *EMULATED])
def backend(request):
    with running(request.param) as name:
        yield name


def drawn(rng, batch=2, channels=5, height=7, width=10, dtype=torch.float32):
    """Some features equal, some of opposite sign, some 0: corners of every kind."""
    features = torch.randn(batch, channels, height, width, generator=rng)
    features[:, :, -1, -1] = features[:, :, 0, 0]
    features[:, 0].round_()
    features[0, :, height // 2, width // 2] = 0
    return features.to(DEVICE, dtype)


def dense_affinity(features: torch.Tensor, kind: str) -> torch.Tensor:
    """[B, N, N] in float64, from the formula."""
    values = features.double().flatten(2).transpose(1, 2)
    if kind == "exp_l1":
        return torch.exp(-(values[:, :, None] - values[:, None]).abs().mean(-1))
    if kind == "relu_dot":
        return (values @ values.transpose(1, 2)).clamp(min=0)
    length = values.square().sum(-1).sqrt().clamp(min=1e-8)
    return (values @ values.transpose(1, 2) / length[:, :, None] / length[:, None]).abs()


def windowed(features: torch.Tensor, radius: int, kind: str) -> torch.Tensor:
    return afa_kernels.dense_to_window(dense_affinity(features, kind), *features.shape[2:], radius)


def with_gradient(call, features, grad):
    leaf = features.detach().clone().requires_grad_()
    out = call(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


# --- against the definition ---------------------------------------------------------------------------------


SHAPES = [
    (1, 1, 1, 0),
    (2, 1, 1, 2),
    (5, 6, 5, 0),
    (3, 3, 9, 3),
    (70, 4, 3, 4),
    (2, 1, 17, 3),
    (20, 13, 2, 2),
    (9, 9, 37, 1),
]


@kinds
@pytest.mark.parametrize("channels, height, width, radius", SHAPES)
def test_affinity_against_matrices(rng, backend, kind, channels, height, width, radius):
    features = drawn(rng, 1, channels, height, width)
    got = feature_affinity(features, radius, kind)
    wanted = windowed(features, radius, kind)
    assert got.shape == wanted.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize(
    "channels, height, width, radius", [(1, 1, 1, 1), (5, 7, 10, 2), (70, 3, 4, 3), (33, 5, 35, 1)]
)
def test_gradients_against_the_reference(rng, backend, kind, channels, height, width, radius):
    features = drawn(rng, 1, channels, height, width)
    grad = torch.randn(1, (2 * radius + 1) ** 2, height, width, generator=rng).to(DEVICE)
    _, got = with_gradient(lambda f: feature_affinity(f, radius, kind), features, grad)
    _, wanted = with_gradient(lambda f: feature_affinity(f, radius, kind, backend="reference"), features.double(), grad)
    # Features of length 0 stand in front of a slope of 1e8 times 0.
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * (1 + float(wanted.abs().max())))


@kinds
@pytest.mark.parametrize("channels, height, width, radius", [(130, 7, 18, 8), (65, 4, 33, 12)])
def test_a_wide_window_and_all_registers(rng, kind, channels, height, width, radius):
    """Three rows and every number of taps and channels at once in the registers of the CPU's kernels."""
    features = drawn(rng, 1, channels, height, width)
    grad = torch.randn(1, (2 * radius + 1) ** 2, height, width, generator=rng).to(DEVICE)
    got, mine = with_gradient(lambda f: feature_affinity(f, radius, kind), features, grad)
    assert relative_error(got, windowed(features, radius, kind)) < 1e-5
    call = lambda f: feature_affinity(f, radius, kind, backend="reference")
    assert relative_error(mine, with_gradient(call, features.double(), grad)[1]) < 1e-5


@kinds
def test_symmetric_bit_for_bit(rng, backend, kind):
    features = drawn(rng, 1, 19, 5, 9)
    dense = afa_kernels.window_to_dense(feature_affinity(features, 2, kind), 2)
    assert torch.equal(dense, dense.transpose(1, 2))
    assert torch.equal(dense > 0, (dense_affinity(features, kind) > 0) & window_mask(5, 9, 2, features.device))


@kinds
def test_corners_have_a_slope_of_zero(backend, kind):
    """Equal features for L1, products of 0 for the others."""
    if kind == "exp_l1":
        features = torch.full((1, 3, 2, 3), 0.7)
    else:
        features = torch.eye(6).view(1, 6, 2, 3)
    grad = torch.ones(1, 9, 2, 3, device=DEVICE)
    _, got = with_gradient(lambda f: feature_affinity(f, 1, kind), features.to(DEVICE), grad)
    # What is left is each pixel's pair with itself: 2 f_i of the product, and nothing of the cosine.
    wanted = 2 * features if kind == "relu_dot" else torch.zeros_like(features)
    assert torch.equal(got.cpu(), wanted)


def test_short_features_and_l1_means():
    """Below 1e-8 a length counts as 1e-8; "exp_l1" takes the mean over channels."""
    short = torch.full((1, 1, 1, 2), 5e-9, device=DEVICE)
    torch.testing.assert_close(feature_affinity(short, 1)[0, 4], torch.full((1, 2), 0.25, device=DEVICE))
    apart = torch.tensor([[0.0, 1.0], [0.0, 3.0]], device=DEVICE).view(1, 2, 1, 2)
    assert float(feature_affinity(apart, 1, "exp_l1")[0, 5, 0, 0]) == pytest.approx(math.exp(-2), rel=1e-6)


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_with_the_pixels_that_reach_it(rng, backend, kind, value):
    features = drawn(rng, 1, 12, 7, 9)
    features[0, 3, 3, 4] = value
    features.requires_grad_()
    out = feature_affinity(features, 1, kind)
    with use_backend("reference"):
        wanted = feature_affinity(features.detach(), 1, kind)
    assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(out.isinf(), wanted.isinf())
    grad = torch.autograd.grad(out.nansum(), features)[0]
    rows, columns = torch.arange(7, device=DEVICE)[:, None], torch.arange(9, device=DEVICE)
    reached = ((rows - 3).abs() <= 1) & ((columns - 4).abs() <= 1)
    assert grad[:, :, ~reached].isfinite().all()


@kinds
def test_a_row_of_one_channel_does_not_meet_the_next(rng, kind):
    """16 pixels fill whole vectors: what a tap reads past the last of them must not be the next channel's first."""
    features = drawn(rng, 1, 6, 2, 16)
    features[0, 3, 0, 3] = math.nan
    features.requires_grad_()
    grad = torch.autograd.grad(feature_affinity(features, 7, kind).nansum(), features)[0]
    assert grad[..., 11:].isfinite().all() and grad[..., :11].isnan().any()


# --- what it feeds ------------------------------------------------------------------------------------------


@kinds
def test_it_feeds_the_random_walk_and_the_loss(rng, backend, kind):
    features = drawn(rng, 1, 6, 3, 4).requires_grad_()
    labels = torch.randint(3, (1, 3, 4), generator=rng).to(DEVICE)
    cams = torch.rand(1, 3, 3, 4, generator=rng).to(DEVICE)
    window = feature_affinity(features, 1, kind)
    loss = afa_kernels.affinity_loss(window, labels, 1)[0] + afa_kernels.random_walk(window, cams, 1).square().sum()
    (got,) = torch.autograd.grad(loss, features)
    wide = features.detach().double().requires_grad_()
    with use_backend("reference"):
        window = feature_affinity(wide, 1, kind)
        walked = afa_kernels.random_walk(window, cams.double(), 1)
        (wanted,) = torch.autograd.grad(afa_kernels.affinity_loss(window, labels, 1)[0] + walked.square().sum(), wide)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_window_across_the_grid_gives_the_contrast_over_all_pairs(rng, backend):
    """1/2 (1 - sum_same |cos| / (n+ + 1)) + 1/2 sum_different |cos| / (n- + 1) is `affinity_loss`, whose first term is
    1/2 sum_same (1 - |cos|) / (n+ + 1): n+ / (n+ + 1) stands there for 1, so that it is 1/2 / (n+ + 1) larger.
    """
    features = drawn(rng, 2, 6, 4, 5)
    labels = torch.randint(3, (2, 4, 5), generator=rng).to(DEVICE)
    labels[torch.rand(2, 4, 5, generator=rng).to(DEVICE) < 0.2] = 255
    loss, more_same, more_different = afa_kernels.affinity_loss(feature_affinity(features, 4), labels, 4)
    cosines, own = dense_affinity(features, "cos"), labels.flatten(1)
    counted = (own[:, :, None] != 255) & (own[:, None] != 255)
    same = counted & (own[:, :, None] == own[:, None])
    different = counted & ~same
    assert (int(same.sum()) + 1, int(different.sum()) + 1) == (int(more_same), int(more_different))
    contrast = 0.5 * (1 - cosines[same].sum() / more_same) + 0.5 * cosines[different].sum() / more_different
    assert float(loss) + 0.5 / int(more_same) == pytest.approx(float(contrast), rel=1e-6)


# --- types, strides, modes ----------------------------------------------------------------------------------


def plainly(features: torch.Tensor, radius: int, kind: str) -> torch.Tensor:
    """The same in PyTorch, in the dtype of features throughout."""
    values = features.flatten(2).transpose(1, 2)
    if kind == "exp_l1":
        dense = torch.exp(-(values[:, :, None] - values[:, None]).abs().mean(-1))
    else:
        if kind == "cos":
            values = F.normalize(values, dim=-1, eps=1e-4)  # what float16 holds
        product = values @ values.transpose(1, 2)
        dense = product.abs() if kind == "cos" else product.relu()
    return afa_kernels.dense_to_window(dense, *features.shape[2:], radius)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_the_same_in_pytorch(rng, backend, kind, dtype):
    features = torch.randn(1, 24, 5, 7, generator=rng).to(DEVICE, dtype)
    grad = torch.randn(1, 9, 5, 7, generator=rng).to(DEVICE, dtype)
    got = with_gradient(lambda f: feature_affinity(f, 1, kind), features, grad)
    plain = with_gradient(lambda f: plainly(f, 1, kind), features, grad)
    wanted = with_gradient(lambda f: windowed(f, 1, kind), features.double(), grad.double())
    assert got[0].dtype == got[1].dtype == dtype
    for mine, theirs, true in zip(got, plain, wanted):
        assert relative_error(mine, true) <= 2 * relative_error(theirs, true)


@kinds
def test_any_stride_autocast_same_bits_inputs_untouched(rng, backend, kind):
    features = drawn(rng, 1, 5, 4, 6)
    grad = torch.randn(1, 9, 4, 6, generator=rng).to(DEVICE)
    copy, call = features.clone(), lambda f: feature_affinity(f, 1, kind)
    wanted = with_gradient(call, features, grad)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        again = with_gradient(call, features, grad)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, wanted))
    for turned in (
        features.to(memory_format=torch.channels_last),
        features.transpose(2, 3).contiguous().transpose(2, 3),
        features.flip(3).contiguous().flip(3),
    ):
        leaf = turned.detach().requires_grad_()
        out = call(leaf)
        back = grad.transpose(1, 3).contiguous().transpose(1, 3)
        assert relative_error(out, wanted[0]) < 1e-6
        assert relative_error(torch.autograd.grad(out, leaf, back)[0], wanted[1]) < 1e-5
    assert relative_error(call(features.expand(3, -1, -1, -1)), wanted[0].expand(3, -1, -1, -1)) < 1e-6
    assert torch.equal(features, copy)


@kinds
def test_images_of_a_batch_and_threads_do_not_matter(rng, kind):
    features = drawn(rng, 3, 20, 9, 13)
    grad = torch.randn(3, 49, 9, 13, generator=rng).to(DEVICE)
    call = lambda f: feature_affinity(f, 3, kind)
    together = with_gradient(call, features, grad)
    for b in range(3):
        alone = with_gradient(call, features[b : b + 1], grad[b : b + 1])
        assert all(torch.equal(mine[0], theirs[b]) for mine, theirs in zip(alone, together))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = with_gradient(call, features, grad)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, together))
    finally:
        torch.set_num_threads(threads)


def test_slopes_are_kept_only_for_a_backward(rng, backend):
    if backend == "reference":
        pytest.skip("of the kernels")
    features = drawn(rng, 1, 3, 4, 5)
    for kind, keep, size in (("abs_dot", True, 13 * 20), ("abs_dot", False, 0), ("exp_l1", True, 0)):
        assert torch.ops.afa.feature_affinity(features, 2, kind, keep, backend)[1].numel() == size


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("features", torch.ones(1, 3, 4), ValueError),
        ("features", torch.ones(1, 0, 3, 4), ValueError),
        ("features", torch.ones(1, 2, 3, 4, dtype=torch.int64), TypeError),
        ("features", None, TypeError),
        ("radius", -1, ValueError),
        ("radius", 1.0, TypeError),
        ("radius", 2**70, ValueError),
        ("kind", "l2", ValueError),
        ("kind", "abs_dot", ValueError),
        ("kind", None, TypeError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    case = {"features": torch.ones(1, 2, 3, 4), "radius": 1, "kind": "cos"}
    with pytest.raises(error, match=f"^{argument}"):
        feature_affinity(**{**case, argument: value})


# --- PyTorch's other questions ------------------------------------------------------------------------------


@kinds
def test_gradcheck_of_the_reference(rng, kind):
    leaf = torch.randn(1, 2, 2, 3, generator=rng, dtype=torch.float64).to(DEVICE).requires_grad_()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda f: feature_affinity(f, 1, kind), leaf)


def test_compiles_in_one_graph(rng, backend):
    leaf = drawn(rng, 1, 3, 3, 4).requires_grad_()
    labels = torch.randint(2, (1, 3, 4), generator=rng).to(DEVICE)
    some = KINDS if backend == "native" else KINDS[:1]  # tracing takes seconds

    def step(features):
        windows = [feature_affinity(features, 1, kind) for kind in some]
        return sum(afa_kernels.affinity_loss(window, labels, 1)[0] for window in windows)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(leaf), step(leaf)
    assert relative_error(got, wanted) < 1e-5
    mine, theirs = (torch.autograd.grad(loss, leaf)[0] for loss in (got, wanted))
    assert relative_error(mine, theirs) < 1e-5


REGISTERED = [(name, kind) for name in available("feature_affinity")[1:] for kind in ("abs_dot", "exp_l1")]


@pytest.mark.parametrize("backend_name, kind", REGISTERED)
def test_operators_are_registered_right(rng, backend_name, kind):
    """Schema, fake tensors, autograd and tracing of the operator and of its gradient."""
    features = torch.randn(1, 3, 2, 3, generator=rng).to(DEVICE)
    inputs = (features.clone().requires_grad_(), 1, kind, True, backend_name)
    torch.library.opcheck(torch.ops.afa.feature_affinity.default, inputs)
    affinity, slopes = torch.ops.afa.feature_affinity(features, 1, kind, True, backend_name)
    slopes = affinity[:, 4:] if kind == "exp_l1" else slopes
    inputs = (features, slopes, affinity, 1, kind, backend_name)
    torch.library.opcheck(torch.ops.afa.feature_affinity_backward.default, inputs)


# --- inputs nobody chose ------------------------------------------------------------------------------------


def sizes(features: torch.Tensor, radius: int, kind: str, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sums of the result and of the gradient come to in float64, nothing cancelling."""
    wide = features.double().abs()
    products = windowed(wide, radius, "relu_dot")
    grad = grad.double().abs()
    ends = afa_kernels.window_to_dense(grad, radius)
    reached = (ends + ends.transpose(1, 2)) @ (torch.ones_like(wide) if kind == "exp_l1" else wide).flatten(
        2
    ).transpose(1, 2)
    reached = reached.transpose(1, 2).view_as(wide)
    return (torch.ones_like(products) if kind == "exp_l1" else products), reached


@pytest.mark.parametrize("backend", fuzzing.backends("feature_affinity"))
@without_limit
@fuzz
@given(st.data())
def test_on_inputs_nobody_chose(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 6), draw.integer("h", 1, 10), draw.integer("w", 1, 20)
    batch, channels = draw.integer("B", 1, 2), draw.integer("C", 1, 20)
    kind, dtype = draw.choice("kind", ["exp_l1", "relu_dot"]), draw.choice("dtype", DTYPES)
    features = draw.tensor("features", batch, channels, height, width, dtype=dtype, low=-1)
    grad = draw.random(batch, (2 * radius + 1) ** 2, height, width).to(DEVICE, dtype)
    call = lambda f: feature_affinity(f, radius, kind)
    with fuzzing.running(backend, draw.generator):
        got = with_gradient(call, features, draw.layout("grad", grad))
    with use_backend("reference"):
        want = with_gradient(call, features, grad)
    size, of_gradient = sizes(features, radius, kind, grad)
    reach = float(features.double().square().sum(1).max().nan_to_num(0, math.inf)) if kind == "relu_dot" else 0.0
    agree(got[0], want[0], size, 5e-5, reach)
    if features.isfinite().all() and float(features.abs().max()) <= 1:
        agree(got[1], want[1], of_gradient, 5e-5, reach)
