"""The bilateral filter: recorded numbers, the sum itself, what is left out of it, the lattice's adjoint, bad input."""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE, available, cut_off, relative_error

import afa_kernels
from afa_kernels import DenseEnergyLoss, bilateral_filter, dense_crf
from afa_kernels.core import native_module

BACKENDS = available("bilateral_filter")
FAST = BACKENDS[1:]
METHODS = {"exact": "bilateral_filter", "lattice": "lattice_filter"}  # as `backends` calls them
KINDS = [(method, backend) for method, operator in METHODS.items() for backend in available(operator)]
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
each_fast = pytest.mark.parametrize("backend", FAST, indirect=True)
each_kind = pytest.mark.parametrize(("method", "backend"), KINDS, indirect=["backend"])
each_fast_kind = pytest.mark.parametrize(
    ("method", "backend"), [kind for kind in KINDS if kind[1] != "reference"], indirect=["backend"]
)


def case(rng, batch=2, channels=5, height=13, width=21, dtype=torch.float32):
    images = 255 * torch.rand(batch, 3, height, width, generator=rng)
    images[:, :, : height // 2] = images[:, :, :1, :1]  # half of it is flat
    values = torch.rand(batch, channels, height, width, generator=rng)
    return images.to(DEVICE), values.to(DEVICE, dtype)


def wide(images, values, *options):
    return bilateral_filter(images.double(), values.double(), *options, backend="reference")


# --- against numbers and formulas ---


@each_kind
def test_recorded_filter(golden, backend, method):
    arrays = {name: torch.tensor(value, device=DEVICE) for name, value in golden("energy_loss").items()}
    sigmas = float(arrays["sigma_rgb"]), float(arrays["sigma_xy"])
    got = bilateral_filter(arrays["images"], arrays["probs"] * arrays["roi"][:, None], *sigmas, method)
    assert relative_error(got, arrays[f"{method}_filtered"]) < 1e-6 * cut_off(backend)


@each_backend
def test_the_sum_over_all_pairs(rng, backend):
    images, values = case(rng, 1, 2, 5, 7)
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    colours = images[0].cpu()
    points = torch.cat([torch.stack([x, y]) / 3, colours / 90]).flatten(1).double()
    weights = torch.exp(-0.5 * (points[:, :, None] - points[:, None, :]).square().sum(0))
    want = (values[0].cpu().double().flatten(1) @ weights).view(2, 5, 7)
    assert relative_error(bilateral_filter(images, values, 90, 3)[0], want) < 1e-6
    spatial = torch.exp(-0.5 * (points[:2, :, None] - points[:2, None, :]).square().sum(0))
    want = (values[0].cpu().double().flatten(1) @ spatial).view(2, 5, 7)
    assert relative_error(bilateral_filter(images, values, None, 3)[0], want) < 1e-6


@each_fast_kind
@pytest.mark.parametrize(
    ("shape", "sigmas"),
    [
        ((1, 1, 1, 1), (10, 5)),
        ((2, 3, 1, 200), (20, 5)),
        ((1, 2, 150, 1), (20, 30)),
        ((1, 150, 11, 15), (20, 5)),
        ((2, 33, 20, 31), (60, 8)),
        ((1, 5, 30, 31), (1e-30, 1e-30)),
        ((1, 5, 20, 31), (1e9, 1e9)),
        ((1, 4, 23, 37), (None, 2.5)),
        ((1, 4, 9, 37), (None, 300)),
        ((1, 4, 9, 7), (None, 1e-30)),
    ],
)
def test_shapes_and_sigmas_against_the_reference(rng, backend, method, shape, sigmas):
    images, values = case(rng, *shape)
    got = bilateral_filter(images, values, *sigmas, method)
    assert relative_error(got, wide(images, values, *sigmas, method)) < 1e-6 * cut_off(backend)


@each_fast
@pytest.mark.parametrize("shape", [(1, 3, 70, 131), (1, 1, 1, 4200), (1, 40, 150, 3)])
def test_a_lattice_of_several_tiles_and_any_number_of_threads(rng, backend, shape):
    images, values = case(rng, *shape)
    images = images.div(8).round()  # colours that meet again in other tiles
    want = wide(images, values, 20, 9, "lattice")
    got = bilateral_filter(images, values, 20, 9, "lattice")
    assert relative_error(got, want) < 1e-6
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(bilateral_filter(images, values, 20, 9, "lattice"), got)


@each_kind
def test_one_colour_is_a_gaussian_of_place(rng, backend, method):
    images, values = case(rng, 1, 2, 24, 30)
    flat = torch.full_like(images, 77)
    got, want = bilateral_filter(flat, values, 5, 3, method), bilateral_filter(flat, values, None, 3)
    # The lattice approximates the sum up to a factor.
    error = relative_error(got / got.mean(), want / want.mean())
    assert error < (1e-6 * cut_off(backend) if method == "exact" else 0.1)


@each_fast
def test_what_is_left_out_is_less_than_a_millionth(rng, backend):
    """A smooth photograph, of which most pairs of tiles are too far apart to matter."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    images = torch.stack([4 * x, 5 * y, x + y])[None].to(DEVICE)
    values = torch.rand(1, 3, 40, 48, generator=rng).to(DEVICE)
    near = (y[None] < 8).to(DEVICE)
    values *= torch.where(near, 1.0, 100.0)  # what is far away has most of the value
    for sigmas in ((20, 6), (40, 12)):
        got, want = bilateral_filter(images, values, *sigmas), wide(images, values, *sigmas)
        weights = wide(images, torch.ones_like(values), *sigmas)
        assert ((got - want).abs() <= 1e-6 * 100 * weights + 2e-6 * cut_off(backend) * want).all()


@pytest.mark.skipif(DEVICE != "cpu" or not FAST, reason="counted by the native CPU kernel")
def test_most_pairs_of_tiles_are_not_met(rng):
    native, view = native_module.native, native_module.view
    images, values = case(rng, 1, 2, 48, 64)
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)
    out = torch.empty_like(values)
    scratch = torch.empty(native.bilateral_filter_cpu_workspace(view(images), view(values), 1), dtype=torch.uint8)
    place = scratch.data_ptr(), 1
    met, pairs = native.bilateral_filter_cpu(view(images), view(values), view(out), 0.5 / 9, 0.5 / 16, *place)
    assert pairs == 48**2 and met < 0.4 * pairs
    assert relative_error(out, wide(images, values, 3, 4)) < 1e-6


@each_fast_kind
def test_values_that_are_not_finite_are_not_left_out(rng, backend, method):
    images, values = case(rng, 1, 3, 40, 60)
    clean = bilateral_filter(images, values, 5, 2, method)
    values[0, 1, 39, 59] = float("nan")
    out = bilateral_filter(images, values, 5, 2, method)
    assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]])
    assert out[0, 1].isnan().all() if method == "exact" else out[0, 1, 39, 59].isnan()
    images[0, 0, 39, 59] = float("nan")
    values[0, 1, 39, 59] = 0
    assert bilateral_filter(images, values, 5, 2, method)[0, :, 39, 59].isnan().all()


# --- gradients ---


@each_fast
@pytest.mark.parametrize(("method", "sigma_rgb"), [("exact", 60), ("exact", None), ("lattice", 60), ("lattice", None)])
def test_gradient_is_the_adjoint(rng, backend, method, sigma_rgb):
    images, values = case(rng)
    grad = torch.randn(values.shape, generator=rng).to(DEVICE)
    got, want = values.clone().requires_grad_(), values.double().requires_grad_()
    bilateral_filter(images, got, sigma_rgb, 4, method).backward(grad)
    wide(images, want, sigma_rgb, 4, method).backward(grad.double())
    assert relative_error(got.grad, want.grad) < 1e-6
    again = bilateral_filter(images, grad, sigma_rgb, 4, method)
    # The lattice's adjoint blurs in another order, which is another filter where neighbours are missing.
    assert (relative_error(again, want.grad) < 1e-6) == (method == "exact")


def test_reference_gradcheck_in_float64(rng):
    images, values = case(rng, 1, 2, 4, 5, torch.float64)
    values.requires_grad_()
    for method in METHODS:
        torch.autograd.gradcheck(lambda v: bilateral_filter(images, v, 60, 2, method), values, fast_mode=True)  # noqa: B023


@each_fast
def test_second_derivative_is_the_filter_again(rng, backend):
    images, values = case(rng, 1, 2, 7, 9)
    values.requires_grad_()
    seed = torch.rand(values.shape, generator=rng).to(DEVICE).requires_grad_()
    out = bilateral_filter(images, values, 60, 2, "lattice")
    (first,) = torch.autograd.grad(out, values, seed, create_graph=True)
    (second,) = torch.autograd.grad(first, seed, values.detach())
    torch.testing.assert_close(second, out.detach())


# --- dtypes, layouts, threads ---


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_rounding(rng, backend, method, dtype):
    images, values = case(rng, dtype=dtype)
    exact = wide(images, values, 60, 4, method)
    got = bilateral_filter(images, values, 60, 4, method)
    assert got.dtype == dtype
    assert relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


@each_kind
def test_strides_and_kinds_of_images(rng, backend, method):
    images, values = case(rng)
    images = images.round()
    want = bilateral_filter(images, values, 60, 4, method)
    before = images.clone(), values.clone()
    last = torch.channels_last
    for x, v in [
        (images.to(torch.uint8), values),
        (images.to(memory_format=last), values.to(memory_format=last)),
        (images.transpose(2, 3).contiguous().transpose(2, 3), values.flip(3).flip(3)),
        (images.half(), torch.cat([values, values], 3)[..., :21]),
    ]:
        got = bilateral_filter(x, v, 60, 4, method)
        assert torch.equal(got, want) if backend != "reference" else relative_error(got, want) < 1e-6
    assert torch.equal(images, before[0]) and torch.equal(values, before[1])


@each_fast_kind
def test_same_bits_for_any_number_of_threads(rng, backend, method):
    images, values = case(rng, 2, 5, 11, 34)
    first = [bilateral_filter(images, values, rgb, 3, method) for rgb in (30, None)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        again = [bilateral_filter(images, values, rgb, 3, method) for rgb in (30, None)]
        assert all(map(torch.equal, again, first))


# --- PyTorch ---


@each_fast
def test_opcheck(rng, backend):
    images, values = case(rng, 1, 2, 3, 4)
    inputs = images, values.clone().requires_grad_(), None, 2.0, "lattice", False, backend
    torch.library.opcheck(torch.ops.afa.bilateral_filter, inputs)


@each_backend
def test_compiles_without_a_graph_break(rng, backend):
    images, values = case(rng, 1, 2, 9, 10)
    values.requires_grad_()

    def step(x, v):
        return bilateral_filter(x, v * 2, 60, 3, "exact", backend=backend).square().sum()

    torch.compile(step, fullgraph=True, backend="aot_eager")(images, values).backward()
    got, values.grad = values.grad, None
    step(images, values).backward()
    torch.testing.assert_close(got, values.grad)


def test_autocast_changes_nothing(rng):
    images, values = case(rng, 1, 2, 9, 10)
    for backend in BACKENDS:
        want = bilateral_filter(images, values, 60, 3, backend=backend)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(bilateral_filter(images, values, 60, 3, backend=backend), want)


def test_backends_says_where_there_are_no_kernels():
    for operator in ("bilateral_filter", "lattice_filter", "dense_crf"):
        rows = {(row.backend, row.device): row for row in afa_kernels.backends() if row.operator == operator}
        assert rows["reference", "cpu"].available
        for device in ("cpu", "cuda"):
            said = f"{operator} has no triton backend"
            assert (rows["triton", device].reason == said) == (operator != "bilateral_filter")


IMAGES, VALUES = torch.rand(2, 3, 4, 5, device=DEVICE), torch.rand(2, 4, 4, 5, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"images": IMAGES[0]}, ValueError, "images must have shape"),
        ({"images": IMAGES.int()}, TypeError, "images must be one of uint8"),
        ({"images": IMAGES.clone().requires_grad_()}, ValueError, "images must not require a gradient"),
        ({"values": VALUES[:1]}, ValueError, "values must have shape"),
        ({"values": VALUES[..., :4]}, ValueError, "values must have shape"),
        ({"values": VALUES.long()}, TypeError, "values must be one of"),
        ({"sigma_rgb": 0}, ValueError, "sigma_rgb must be a finite positive"),
        ({"sigma_rgb": "15"}, TypeError, "sigma_rgb must be a number"),
        ({"sigma_xy": -1}, ValueError, "sigma_xy must be a finite positive"),
        ({"sigma_xy": None}, TypeError, "sigma_xy must be a number"),
        ({"method": "fast"}, ValueError, "method must be 'exact' or 'lattice', got 'fast'"),
        ({"backend": "triton", "method": "lattice"}, ValueError, "lattice_filter has no triton backend"),
    ],
)
def test_bad_input_is_named(change, error, said):
    with pytest.raises(error, match=said):
        bilateral_filter(**{"images": IMAGES, "values": VALUES, "sigma_rgb": 15, "sigma_xy": 10, **change})


@pytest.mark.skipif(DEVICE != "cpu", reason="of what the CPU's kernels allocate")
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_the_default_device_is_no_business_of_filter_and_crf(rng, method):
    images, values = 255 * torch.rand(1, 3, 6, 7, generator=rng), torch.rand(1, 2, 6, 7, generator=rng).softmax(1)

    def both():
        leaf = values.clone().requires_grad_()
        filtered = afa_kernels.bilateral_filter(images, leaf, 60, 4, method)
        refined, divergence = afa_kernels.dense_crf(images, leaf, 2, method=method, convergence=True)
        (slope,) = torch.autograd.grad((filtered * refined).sum(), leaf)
        return filtered.detach(), refined.detach(), divergence, slope

    wanted = both()
    with torch.device("meta"):
        got = both()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted))


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_tensors_without_memory_have_shapes(method):
    images, values = torch.rand(2, 3, 8, 12, device="meta"), torch.rand(2, 4, 12, 8, device="meta").mT.requires_grad_()
    found = [
        bilateral_filter(images, values, 15, 5, method),
        dense_crf(images, values, 3, method=method),
        *dense_crf(images, values, 3, method=method, convergence=True),
        DenseEnergyLoss(method=method)(images, values, images[:, 0], images[:, :1]),
    ]
    assert [tuple(each.shape) for each in found] == [(2, 4, 8, 12)] * 3 + [(2, 4), (1,)]
    assert all(each.is_meta and each.is_contiguous() for each in found)
    assert all(each.requires_grad == (at != 3) for at, each in enumerate(found))
