"""The CUDA sources of the permutohedral lattice and of the dense CRF, run on the CPU, beside the CPU's kernels and the
reference. Fresh memory holds NaN here, so what is read before it is written shows.
"""

from __future__ import annotations

import pytest
import torch
from support.common import relative_error
from support.cuda_emulator.marks import ON_THE_EMULATOR
from support.cuda_emulator.operators import emulated

from afa_kernels import bilateral_filter, dense_crf
from afa_kernels.core import native_module
from afa_kernels.ops.bilateral import LatticeKernel, native, native_cuda, reference

pytestmark = [
    *ON_THE_EMULATOR,
    pytest.mark.skipif(native_module.native is None, reason="built without the CPU kernels to compare with"),
]
ORDERS = (0, 1, 2)


def case(rng, batch=2, channels=5, height=13, width=21, dtype=torch.float32):
    images = 255 * torch.rand(batch, 3, height, width, generator=rng)
    images[:, :, : height // 2] = images[:, :, :1, :1]  # half of it is flat
    return images, torch.rand(batch, channels, height, width, generator=rng).to(dtype)


def lattice(*inputs) -> torch.Tensor:
    return bilateral_filter(*inputs, "lattice")


# --- the lattice ------------------------------------------------------------------------------------------------------


def points(rng, count: int, dims: int) -> torch.Tensor:
    """Near and far ones, equal ones, ties between coordinates, and what are no coordinates."""
    features = 3 * torch.randn(count, dims, generator=rng)
    features[: count // 4] = features[:1]
    features[count // 4 : count // 3] = features[count // 4 : count // 3].round()
    features[-3] *= 1e4
    features[-2, 0], features[-1, -1] = float("nan"), 1e30
    return features


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 11, 32])
def test_simplices_and_numbers_of_vertices_are_the_cpus_bit_for_bit(rng, either, dims):
    features = points(rng, 150, dims)
    want = native.lattice(features)
    corner, weight, _, vertex = want.arrays[:4]
    index = vertex[corner.int()]  # all of them are in one tile
    for order in ORDERS:
        with emulated(either, order):
            memory = native.lattice(features).memory
        count, entries = memory[:4].view(torch.int32), memory[64 : 64 + 8 * index.numel()].view(torch.int32).view(-1, 2)
        assert int(count) == want.sizes[3]
        assert torch.equal(entries[:, 0], index.flatten())
        assert torch.equal(entries[:, 1].clone().view(torch.float32).nan_to_num(7), weight.flatten().nan_to_num(7))


@pytest.mark.parametrize("dims", [1, 3, 5, 9])
def test_a_kernel_over_points_of_any_features(rng, emulator, dims):
    features, silent = torch.randn(90, dims, generator=rng), torch.randn(20, dims, generator=rng)
    values = torch.rand(6, 90, generator=rng)
    want = LatticeKernel(features, silent=silent)(values)
    with emulated(emulator):
        got = LatticeKernel(features, silent=silent)(values)
    assert relative_error(got, want) < 1e-6
    with emulated(emulator):
        got = LatticeKernel(features, normalization="none")(values)
    assert relative_error(got, reference.filter_lattice(features, values.double().t()).t()) < 1e-6


def test_a_vertex_of_more_entries_than_chunks_are_short(rng, emulator):
    """Two places on a line with 66,000 points: chunks of their lists are longer than 64."""
    features = torch.zeros(66_000, 1)
    features[1::1000] = 5.0
    values = torch.rand(1, 2, 66_000, 1, generator=rng)
    want = native.filter_lattice(native.lattice(features), values)
    with emulated(emulator):
        got = native.filter_lattice(native.lattice(features), values)
    assert relative_error(got, want) < 1e-5


def test_what_memory_held_before_does_not_matter(rng, emulator):
    """Fresh memory is all ones here, which as a neighbour is none."""
    features, values = torch.randn(90, 5, generator=rng), torch.rand(1, 3, 90, 1, generator=rng)
    with emulated(emulator) as module:
        built = native.lattice(features)
        want = native.filter_lattice(built, values)
        scratch = torch.full((module.native.lattice_build_cuda_workspace(90, 5),), 0x5A, dtype=torch.uint8)
        built.memory.fill_(0x5A)
        place = built.memory.data_ptr(), scratch.data_ptr(), 0, 0
        module.native.lattice_build_cuda(features.data_ptr(), 90, 5, 1, *place)
        assert torch.equal(native.filter_lattice(built, values), want)


def test_more_vertices_than_a_small_device_has_threads(rng, emulator):
    """Threads walk on: to vertices of their own, and to some that many points share."""
    images, values = 255 * torch.rand(1, 3, 30, 31, generator=rng), torch.rand(1, 2, 30, 31, generator=rng)
    places = (torch.arange(2800) // 70 * 5.0)[:, None]
    line = torch.rand(1, 5, 2800, 1, generator=rng)
    want = lattice(images, values, 1.0, 1.0), native.filter_lattice(native.lattice(places), line)
    with emulated(emulator):
        emulator.set_device(1)
        got = lattice(images, values, 1.0, 1.0), native.filter_lattice(native.lattice(places), line)
    assert all(relative_error(*pair) < 1e-6 for pair in zip(got, want))


# --- the filter -------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1), (2, 3, 1, 200), (1, 2, 150, 1), (1, 150, 5, 9), (2, 21, 13, 17), (1, 40, 9, 14), (3, 1, 8, 8)]
SIGMAS = [(60, 4), (None, 2.5), (1e-30, 1e-30), (1e9, 1e9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_filter_is_the_cpus_and_the_references(rng, either, shape, sigmas):
    images, values = case(rng, *shape)
    want = lattice(images, values, *sigmas)
    exact = bilateral_filter(images.double(), values.double(), *sigmas, "lattice", backend="reference")
    with emulated(either):
        got = lattice(images, values, *sigmas)
    assert relative_error(got, want) < 1e-6 and relative_error(got, exact) < 1e-6


@pytest.mark.parametrize("name", ["flat", "one colour in two tones", "checkers"])
def test_vertices_of_many_points(rng, emulator, name):
    """A flat image has 6 vertices, each with all of its points: their sums are of many chunks."""
    images, values = torch.full((1, 3, 26, 31), 77.0), torch.rand(1, 6, 26, 31, generator=rng)
    if name == "one colour in two tones":
        images[..., 15:] = 78
    if name == "checkers":
        images[..., ::2] = 200
    exact = bilateral_filter(images.double(), values.double(), 40, 300, "lattice", backend="reference")
    results = []
    for order in ORDERS:
        with emulated(emulator, order):
            results.append(lattice(images, values, 40, 300))
    assert relative_error(results[0], exact) < 1e-6
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_rounding(rng, emulator, dtype):
    images, values = case(rng, dtype=dtype)
    exact = bilateral_filter(images.double(), values.double(), 60, 4, "lattice", backend="reference")
    with emulated(emulator):
        got = lattice(images, values, 60, 4)
    assert got.dtype == dtype and relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


def test_strides_and_kinds_of_images(rng, emulator):
    images, values = case(rng)
    images = images.round()
    with emulated(emulator):
        want = lattice(images, values, 60, 4)
        for x, v in [
            (images.to(torch.uint8), values),
            (images.to(memory_format=torch.channels_last), values.to(memory_format=torch.channels_last)),
            (images.transpose(2, 3).contiguous().transpose(2, 3), values.flip(3).flip(3)),
            (images.half(), torch.cat([values, values], 3)[..., :21]),
            (images[:1].expand(2, 3, 13, 21), values),
        ]:
            got = lattice(x, v, 60, 4)
            assert torch.equal(got[:1], want[:1])
            assert x.stride(0) == 0 or torch.equal(got, want)


@pytest.mark.parametrize("sigma_rgb", [60, None])
def test_gradient_is_the_adjoint(rng, emulator, sigma_rgb):
    images, values = case(rng)
    grad = torch.randn(values.shape, generator=rng)
    got, want = values.clone().requires_grad_(), values.double().requires_grad_()
    with emulated(emulator):
        lattice(images, got, sigma_rgb, 4).backward(grad)
        again = lattice(images, grad, sigma_rgb, 4)
    bilateral_filter(images.double(), want, sigma_rgb, 4, "lattice", backend="reference").backward(grad.double())
    assert relative_error(got.grad, want.grad) < 1e-6 < relative_error(again, want.grad)


def test_values_that_are_not_finite_stay_where_they_are(rng, emulator):
    images, values = case(rng, 1, 3, 20, 30)
    images[0, :, -1, -1] = 1e6
    with emulated(emulator):
        clean = lattice(images, values, 5, 2)
        values[0, 1, -1, -1] = float("nan")
        out = lattice(images, values, 5, 2)
    assert torch.equal(out[:, [0, 2]], clean[:, [0, 2]]) and out[0, 1, -1, -1].isnan() and out[0, 1, 0, 0].isfinite()


# --- the dense CRF ----------------------------------------------------------------------------------------------------

SMALL = {"num_iter": 3, "bi_xy_std": 8, "bi_rgb_std": 60}
OPTIONS = {
    "symmetric": {},
    "before": {"normalization": "before"},
    "after": {"normalization": "after"},
    "none": {"normalization": "none", "pos_w": 0.02, "bi_w": 0.03},
    "early": {"tolerance": 0.1, "num_iter": 6},
    "place alone": {"bi_w": 0},
    "no kernel": {"bi_w": 0, "pos_w": 0},
    "no iteration": {"num_iter": 0},
    "exact": {"method": "exact", "normalization": "before"},
}


def crf_case(rng, classes=4, height=9, width=14, batch=2):
    images = (255 * torch.rand(batch, 3, height, width, generator=rng)).to(torch.uint8)
    return images, torch.rand(batch, classes, height, width, generator=rng).mul(3).softmax(1)


@pytest.mark.parametrize(
    ("name", "classes"),
    [*((name, 4) for name in OPTIONS), ("symmetric", 1), ("symmetric", 21), ("matrix", 21), ("symmetric", 150)]
    + [("matrix", 150), ("exact matrix", 5), ("matrix of nothing", 3), ("before matrix", 6)],
)
def test_options_and_their_gradients(rng, emulator, name, classes):
    images, probs = crf_case(rng, classes)
    grad = torch.randn(probs.shape, generator=rng)
    first = name.split()[0]
    options = {**SMALL, **OPTIONS.get(name if name in OPTIONS else first, {})}
    if "matrix" in name:
        options["compat"] = torch.rand(classes, classes, generator=rng)
        options.update({"bi_w": 0, "pos_w": 0} if "nothing" in name else {})
    results = []
    for backend in ("native", "reference", "emulated"):
        leaf = (probs.double() if backend == "reference" else probs).clone().requires_grad_()
        if backend == "emulated":
            with emulated(emulator):
                q, divergence = dense_crf(images, leaf, **options, convergence=True)
                q.backward(grad.to(q.dtype))
        else:
            q, divergence = dense_crf(images, leaf, **options, convergence=True, backend=backend)
            q.backward(grad.to(q.dtype))
        results.append((q, divergence, leaf.grad))
    (cpu, _, _), (true, true_divergence, true_grad), (q, divergence, got_grad) = results
    assert relative_error(q, cpu) < 5e-6 and relative_error(q, true) < 5e-6
    torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
    assert (divergence - true_divergence).abs().max() < 1e-4 * true_divergence.abs().max() + 1e-4
    assert classes == 1 or relative_error(got_grad, true_grad) < 1e-5
    assert got_grad.abs().max() < 1e-4 or classes > 1


def test_penalties_that_all_classes_share_are_none(rng, emulator):
    """Logits of -500 are as good as others, though what pads their row is 0."""
    images, probs = crf_case(rng, 5)
    with emulated(emulator):
        got = dense_crf(images, probs, **SMALL, compat=torch.full((5, 5), 70.0))
    assert relative_error(got, probs / probs.sum(1, keepdim=True)) < 1e-4


@pytest.mark.parametrize("classes", [5, 33])
def test_any_order_of_threads_on_any_device_gives_the_same_bits(rng, emulator, classes):
    images, probs = crf_case(rng, classes, 11, 15)
    images[:, :, :6] = 90
    grad = torch.randn(probs.shape, generator=rng)
    results = []
    for order in ORDERS:
        leaf = probs.clone().requires_grad_()
        with emulated(emulator, order):
            emulator.set_device(4 - order)
            q = dense_crf(images, leaf, **SMALL)
            q.backward(grad)
        results.append((q, leaf.grad))
    assert all(torch.equal(q, results[0][0]) and torch.equal(slope, results[0][1]) for q, slope in results[1:])


def test_images_of_a_batch_know_nothing_of_each_other(rng, emulator, monkeypatch):
    images, probs = crf_case(rng, 5, batch=3)
    images[1] = images[0]
    with emulated(emulator):
        both, filtered = dense_crf(images, probs, **SMALL), lattice(images, probs, 60, 4)
        assert torch.equal(both[1:2], dense_crf(images[1:2], probs[1:2], **SMALL))
        assert torch.equal(filtered[2:], lattice(images[2:], probs[2:], 60, 4))
        # Two at a time, then one.
        monkeypatch.setattr(native_cuda, "MOST_ENTRIES", 2 * 9 * 14 * 6)
        emulator.launches()
        assert torch.equal(dense_crf(images, probs, **SMALL), both)
        assert torch.equal(lattice(images, probs, 60, 4), filtered)
        half = dense_crf(images, probs.half().to(memory_format=torch.channels_last), **SMALL)
    assert half.dtype == torch.float16 and relative_error(half, both) < 2e-3


def test_what_is_too_large_is_refused(emulator):
    for points, dims, said in ((1 << 29, 2, "not supported"), (4, 33, "contradict"), (0, 2, "contradict")):
        with pytest.raises(RuntimeError, match=said):
            emulator.native.lattice_build_cuda(0, points, dims, 1, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="contradict"):
        emulator.native.lattice_build_cuda(0, 5, 2, 2, 0, 0, 0, 0)
    for channels, rows in ((0, [1] * 8), (5000, [1] * 8), (4, [1] * 5 + [0] * 3)):
        with pytest.raises(RuntimeError, match="contradict"):
            emulator.native.dense_crf_cuda([], 3, channels, rows, False, 0, 0, 0, 0)
