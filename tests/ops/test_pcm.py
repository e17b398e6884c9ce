"""The pixel correlation module: its definition, what it means, gradients, odd values, types and modes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import DEVICE, available, relative_error
from support.cuda_emulator import build
from support.cuda_emulator.operators import emulated
from support.running import CHIPS, EMULATED_CHIPS, running

import afa_kernels
from afa_kernels import use_backend
from afa_kernels.core import native_module

# NaN and infinity are what some tests are about; Triton's interpreter has NumPy multiply them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.fixture(params=[*available("pcm"), *EMULATED_CHIPS])
def backend(request):
    with running(request.param) as name:
        yield name


def random_case(rng, batch=2, classes=3, depth=5, height=6, width=7, dtype=torch.float32):
    """Features centred on 0: half of the cosines are negative."""
    cams = torch.rand(batch, classes, height, width, generator=rng)
    features = torch.randn(batch, depth, height, width, generator=rng)
    return cams.to(DEVICE, dtype), features.to(DEVICE, dtype)


def dense(cams, features):
    """The definition with matrices, in float64."""
    values, units = cams.double(), features.double().flatten(2)
    if cams.shape[2:] != features.shape[2:]:
        values = F.interpolate(values, size=features.shape[2:], mode="bilinear", align_corners=True)
    units = units / (units.square().sum(1, keepdim=True).sqrt() + 1e-5)
    likeness = torch.einsum("bci,bcj->bij", units, units).clamp(min=0)
    weights = likeness / (likeness.sum(1, keepdim=True) + 1e-5)
    return torch.einsum("bki,bij->bkj", values.flatten(2), weights).view_as(values)


def gradients(call, leaves, grad):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(call(*leaves), leaves, grad.to(leaves[0].dtype))


# --- the definition ---------------------------------------------------------------------------------------------------

# Images smaller than a tile, of several, the last one of a few pixels; channels of several runs; more features than are
# multiplied at once.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 1, 17),
    (1, 2, 16, 23, 1),
    (2, 21, 19, 9, 11),
    (1, 33, 40, 10, 13),
    (1, 70, 3, 5, 13),
    (1, 2, 300, 7, 7),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(rng, backend, shape):
    case = random_case(rng, *shape)
    wanted = dense(*case)
    assert relative_error(afa_kernels.pcm(*case), wanted) < 2e-6
    grad = torch.randn(wanted.shape, generator=rng).to(DEVICE)
    wanted = gradients(dense, [tensor.double() for tensor in case], grad)
    for mine, theirs in zip(gradients(afa_kernels.pcm, case, grad), wanted):
        assert mine.shape == theirs.shape and mine.dtype == torch.float32
        if shape[3] * shape[4] > 1:
            assert relative_error(mine, theirs) < 2e-5
        else:  # one pixel's mean is its own value but for the sum of 1e-5
            torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-5, 1e-4])
def test_faint_features_are_divided_by_their_norm_and_1e_5(rng, backend, scale):
    """So they count less, and so few of them that the sum's own 1e-5 counts too."""
    cams, features = random_case(rng, height=1, width=3)
    features *= scale
    assert relative_error(afa_kernels.pcm(cams, features), dense(cams, features)) < 2e-6
    grad = torch.randn(cams.shape, generator=rng).to(DEVICE)
    wanted = gradients(dense, [cams.double(), features.double()], grad)
    for mine, theirs in zip(gradients(afa_kernels.pcm, [cams, features], grad), wanted):
        assert relative_error(mine, theirs) < 2e-5


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (12, 15)])
def test_cams_of_another_size_are_resized(rng, backend, size):
    cams, features = torch.rand(2, 3, *size, generator=rng).to(DEVICE), random_case(rng)[1]
    got = afa_kernels.pcm(cams, features)
    assert got.shape == (2, 3, 6, 7) and relative_error(got, dense(cams, features)) < 2e-6
    grad = torch.randn(got.shape, generator=rng).to(DEVICE)
    wanted = gradients(dense, [cams.double(), features.double()], grad)
    of_cams, of_features = gradients(afa_kernels.pcm, [cams, features], grad)
    assert relative_error(of_cams, wanted[0]) < 2e-5
    if size == (1, 1):  # the mean of one number is that number, whatever the features
        assert float(of_features.abs().max()) < 1e-5
    else:
        assert relative_error(of_features, wanted[1]) < 2e-5


def test_only_one_input_needs_gradients(rng, backend):
    case = random_case(rng)
    grad = torch.randn(case[0].shape, generator=rng).to(DEVICE)
    wanted = gradients(afa_kernels.pcm, case, grad)
    for chosen in range(2):
        some = [value.clone().requires_grad_(i == chosen) for i, value in enumerate(case)]
        (got,) = torch.autograd.grad(afa_kernels.pcm(*some), some[chosen], grad)
        assert torch.equal(got, wanted[chosen])


# --- what it means ----------------------------------------------------------------------------------------------------


def test_pixels_of_one_kind_share_their_mean(rng, backend):
    """Kinds at right angles, or opposite, have nothing to do with each other, however long their features are."""
    kinds = torch.randint(4, (1, 9, 11), generator=rng)
    directions = torch.tensor([[3.0, 0, 0], [-0.5, 0, 0], [0, 7.0, 0], [0, 0, 2.0]])
    lengths = 1 + torch.rand(1, 9, 11, 1, generator=rng)
    features = (directions[kinds] * lengths).permute(0, 3, 1, 2).to(DEVICE)
    cams = torch.randn(1, 4, 9, 11, generator=rng).to(DEVICE)
    got = afa_kernels.pcm(cams, features)
    for kind in range(4):
        inside = (kinds[0] == kind).to(DEVICE)
        wanted = cams[0][:, inside].mean(1, keepdim=True).expand(-1, int(inside.sum()))
        assert relative_error(got[0][:, inside], wanted) < 5e-5


def test_a_pixel_without_features_gets_zero_and_gives_nothing(rng, backend):
    cams, features = random_case(rng)
    features[1, :, 2, 3] = 0
    cams[1, :, 2, 3] = 1e9
    got = afa_kernels.pcm(cams, features)
    assert torch.equal(got[1, :, 2, 3], torch.zeros_like(got[1, :, 2, 3]))
    assert relative_error(got, dense(cams, features)) < 2e-6
    of_features = gradients(afa_kernels.pcm, [cams, features], torch.ones_like(cams))[1]
    assert of_features.isfinite().all()


# --- odd values -------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_stays_with_its_channel_and_image(rng, backend):
    cams, features = random_case(rng)
    clean = afa_kernels.pcm(cams, features)
    spoilt = cams.clone()
    spoilt[0, 1, 2, 3], spoilt[1, 0, 0, 0] = torch.nan, torch.inf
    got = afa_kernels.pcm(spoilt, features)
    assert got[0, 1].isnan().all()
    alike = dense(spoilt, features)[1, 0].isposinf()
    assert torch.equal(got[1, 0].isposinf(), alike) and alike.any() and not got[1, 0].isfinite().any()
    for b, channels in enumerate(([0, 2], [1, 2])):
        assert torch.equal(got[b, channels], clean[b, channels])
    features[0, 1, 4, 4] = torch.nan
    got = afa_kernels.pcm(cams, features)
    assert got[0].isnan().all() and torch.equal(got[1], clean[1])
    of_cams, of_features = gradients(afa_kernels.pcm, [cams, features], torch.ones_like(cams))
    assert of_cams[0].isnan().all() and of_features[0].isnan().all()
    assert of_cams[1].isfinite().all() and of_features[1].isfinite().all()


def test_images_of_a_batch_do_not_meet(rng, backend):
    cams, features = random_case(rng, batch=3, height=9, width=11)
    grad = torch.randn(cams.shape, generator=rng).to(DEVICE)
    together = afa_kernels.pcm(cams, features), *gradients(afa_kernels.pcm, [cams, features], grad)
    for b in range(3):
        one = cams[b : b + 1], features[b : b + 1]
        alone = afa_kernels.pcm(*one), *gradients(afa_kernels.pcm, one, grad[b : b + 1])
        for mine, theirs in zip(alone, together):
            assert relative_error(mine, theirs[b : b + 1]) < 2e-6


# --- types, modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_the_same_in_pytorch(rng, backend, dtype):
    cams, features = random_case(rng, dtype=dtype)
    wanted, grad = dense(cams, features), torch.randn(cams.shape, generator=rng).to(DEVICE)
    units = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    likeness = (units.flatten(2).transpose(1, 2) @ units.flatten(2)).relu()
    plain = (cams.flatten(2) @ (likeness / (likeness.sum(1, keepdim=True) + 1e-5))).view(cams.shape)
    got = afa_kernels.pcm(cams, features)
    assert got.dtype == dtype
    assert relative_error(got, wanted) <= 2 * relative_error(plain, wanted)
    mixed = afa_kernels.pcm(cams.float(), features)
    assert mixed.dtype == torch.float32 and relative_error(mixed, wanted) < 2e-6
    resized = afa_kernels.pcm(cams[:, :, ::2, ::2], features)
    assert resized.dtype == dtype and relative_error(resized, dense(cams[:, :, ::2, ::2], features)) < 0.02
    wanted = gradients(dense, [cams.double(), features.double()], grad.to(dtype))
    for mine, theirs in zip(gradients(afa_kernels.pcm, [cams, features], grad), wanted):
        assert mine.dtype == dtype and relative_error(mine, theirs) < torch.finfo(dtype).eps * 4


def test_any_stride_autocast_same_bits_inputs_untouched(rng, backend):
    cams, features = random_case(rng, height=9, width=11)
    copies, grad = (cams.clone(), features.clone()), torch.randn(cams.shape, generator=rng).to(DEVICE)
    wanted = afa_kernels.pcm(cams, features)
    first = gradients(afa_kernels.pcm, [cams, features], grad)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(afa_kernels.pcm(cams, features), wanted)
        small = afa_kernels.pcm(cams[:, :, :3, :3], features)
    assert torch.equal(small, afa_kernels.pcm(cams[:, :, :3, :3], features))
    assert torch.equal(afa_kernels.pcm(cams, features), wanted)
    assert all(map(torch.equal, gradients(afa_kernels.pcm, [cams, features], grad), first))
    last = [value.to(memory_format=torch.channels_last) for value in (cams, features)]
    turned = [value.transpose(2, 3).contiguous().transpose(2, 3) for value in (cams, features)]
    for case in (last, turned):
        assert relative_error(afa_kernels.pcm(*case), wanted) < 1e-6
        leaves = [value.requires_grad_() for value in case]
        for mine, theirs in zip(torch.autograd.grad(afa_kernels.pcm(*leaves), leaves, grad.mT.contiguous().mT), first):
            assert relative_error(mine, theirs) < 2e-6
    one = torch.rand(1, 3, 1, 1, generator=rng).to(DEVICE).expand(2, 3, 9, 11)
    assert relative_error(afa_kernels.pcm(one, features), dense(one, features)) < 2e-6
    assert torch.equal(cams, copies[0]) and torch.equal(features, copies[1])


@pytest.mark.skipif("native" not in available("pcm") or DEVICE != "cpu", reason="no native CPU kernels")
def test_any_number_of_threads_gives_the_same_bits(rng):
    case = random_case(rng, classes=30, depth=33, height=13, width=19)
    grad = torch.randn(case[0].shape, generator=rng)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with use_backend("native"):
                found.append((afa_kernels.pcm(*case), *gradients(afa_kernels.pcm, case, grad)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@pytest.mark.skipif(not EMULATED_CHIPS, reason="no emulator here")
@pytest.mark.parametrize("kind", build.kinds())
def test_any_order_of_cuda_threads_gives_the_same_bits(rng, kind):
    """On chips that have several blocks share a tile's sums, and channels."""
    case = random_case(rng, classes=40, depth=70, height=9, width=15)
    grad = torch.randn(case[0].shape, generator=rng)
    for chip in CHIPS.values():
        found = []
        for order in range(3):
            with emulated(build.load(kind), order) as emulator:
                emulator.set_device(*chip)
                found.append((afa_kernels.pcm(*case), *gradients(afa_kernels.pcm, case, grad)))
        for others in found[1:]:
            assert all(map(torch.equal, others, found[0]))


@pytest.mark.skipif(native_module.native is None, reason="no native module")
def test_no_matrix_of_all_pairs_is_kept():
    """Scratch memory of N = 128 x 128 is under a twentieth of the matrix, and under ten times the tensors."""
    native, batch, classes, depth, side = native_module.native, 2, 22, 192, 128

    def nowhere(channels):
        return 0, 0, (batch, channels, side, side), (channels * side**2, side**2, side, 1)

    forward = nowhere(classes - 1), nowhere(depth), nowhere(classes)
    backward = nowhere(classes), nowhere(classes - 1), nowhere(depth), nowhere(depth)
    sizes = [native.pcm_cpu_workspace(*forward, 2), native.pcm_features_gradient_cpu_workspace(*backward, 2)]
    for size in sizes:
        assert batch * depth * side**2 * 4 < size < 10 * batch * depth * side**2 * 4
        assert size < batch * side**4 * 4 / 20


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("cams", torch.ones(1, 2, 3), ValueError),
        ("cams", torch.ones(2, 2, 3, 4), ValueError),
        ("cams", torch.ones(1, 0, 3, 4), ValueError),
        ("cams", torch.ones(1, 2, 0, 4), ValueError),
        ("cams", torch.ones(1, 2, 3, 4, dtype=torch.int64), TypeError),
        ("cams", torch.ones(1, 2, 3, 4, device="meta"), ValueError),
        ("cams", None, TypeError),
        ("features", torch.ones(5, 3, 4), ValueError),
        ("features", torch.ones(1, 0, 3, 4), ValueError),
        ("features", torch.ones(1, 5, 3, 4, dtype=torch.bool), TypeError),
        ("features", "features", TypeError),
        ("backend", "dense", ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    case = {"cams": torch.ones(1, 2, 3, 4), "features": torch.ones(1, 5, 3, 4)}
    with pytest.raises(error, match=f"^{argument}"):
        afa_kernels.pcm(**{**case, argument: value})


def test_float64_is_the_references(rng):
    case = [tensor.double() for tensor in random_case(rng)]
    got = afa_kernels.pcm(*case)
    assert got.dtype == torch.float64 and relative_error(got, dense(*case)) < 1e-14


# --- gradients of the reference, registration -------------------------------------------------------------------------


def test_gradcheck_of_the_reference(rng):
    leaves = [leaf.requires_grad_() for leaf in random_case(rng, 1, 2, 3, 2, 3, torch.float64)]
    small = torch.rand(1, 2, 1, 2, generator=rng).double().to(DEVICE).requires_grad_()
    with use_backend("reference"):
        assert torch.autograd.gradcheck(afa_kernels.pcm, leaves)
        assert torch.autograd.gradcheck(afa_kernels.pcm, (small, leaves[1]))


@pytest.mark.parametrize("backend_name", available("pcm"))
def test_compiles_in_one_graph(rng, backend_name):
    leaves = [leaf.requires_grad_() for leaf in random_case(rng, height=3, width=4)]

    def step(cams, features):
        small = afa_kernels.pcm(cams[:, :, 1:, ::2], features, backend=backend_name)
        return small + afa_kernels.pcm(cams, features, backend=backend_name)

    got, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), step(*leaves)
    assert relative_error(got, wanted) < 1e-6
    grad = torch.randn(got.shape, generator=rng).to(DEVICE)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend_name", [name for name in available("pcm") if name != "reference"])
def test_operators_are_registered_right(rng, backend_name):
    """Schema, fake tensors, autograd and tracing of the sums, with a channel of ones and without, and the gradient."""
    cams, features = random_case(rng, 1, 2, 3, 3, 4)
    for ones in (False, True):
        leaves = [cams.clone().requires_grad_(), features.clone().requires_grad_()]
        torch.library.opcheck(torch.ops.afa.pcm.default, (*leaves, ones, backend_name))
        grad = torch.randn(1, 2 + ones, 3, 4, generator=rng).to(DEVICE)
        inputs = grad, cams, features, backend_name
        torch.library.opcheck(torch.ops.afa.pcm_features_gradient.default, inputs)
