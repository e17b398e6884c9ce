"""PAR and PAMR: reference against recorded numbers, native against reference, gradients, registration, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import relative_error

import afa_kernels
from afa_kernels import PAMR, PAR, pamr, pamr_weights, par, par_reference, par_weights

NATIVE = [row.backend for row in afa_kernels.backends() if row[:3] == ("par", "native", "cpu") and row.available]
BACKENDS = ["reference", *NATIVE]
SIX = (1, 2, 4, 8, 12, 24)


def inputs(rng, batch=1, channels=3, height=19, width=23, dtype=torch.float32):
    images = torch.rand(batch, 3, height, width, generator=rng).to(dtype)
    masks = torch.rand(batch, channels, height, width, generator=rng).to(dtype)
    return images, masks


# --- the published numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["photo", "noise", "flat", "small"])
def test_par_gives_the_published_numbers(golden, backend, name):
    z = golden(f"par_{name}")
    out = par(torch.tensor(z["images"]), torch.tensor(z["masks"]), z["dilations"], int(z["num_iter"]), backend=backend)
    assert relative_error(out, torch.tensor(z["out"])) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["photo", "noise", "small"])
def test_pamr_gives_the_published_numbers(golden, backend, name):
    z = golden(f"pamr_{name}")
    out = pamr(torch.tensor(z["images"]), torch.tensor(z["masks"]), z["dilations"], int(z["num_iter"]), backend=backend)
    assert relative_error(out, torch.tensor(z["out"])) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_masks_gives_the_published_numbers(golden, backend):
    z = golden("par_grad")
    masks = torch.tensor(z["masks"], requires_grad=True)
    out = par(torch.tensor(z["images"]), masks, z["dilations"], int(z["num_iter"]), backend=backend)
    out.backward(torch.tensor(z["grad_out"]))
    assert relative_error(masks.grad, torch.tensor(z["grad_masks"])) < 1e-5


# --- native against reference -----------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1, 1), (2, 2, 1, 40), (1, 3, 37, 1), (3, 5, 2, 3), (1, 21, 33, 65), (2, 9, 16, 16), (1, 17, 7, 130)]


@pytest.mark.parametrize("operator", [par, pamr])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dilations", [(1,), (3, 1), SIX, (40,)])
def test_native_equals_reference(rng, operator, shape, dilations):
    images, masks = inputs(rng, *shape)
    want = operator(images, masks, dilations, 3, backend="reference")
    got = operator(images, masks, dilations, 3, backend="native")
    assert relative_error(got, want) < 1e-5
    assert got.is_contiguous()


@pytest.mark.parametrize("operator", [par_weights, pamr_weights])
def test_native_weights_equal_reference_and_sum_to_one_plus_share(rng, operator):
    images, _ = inputs(rng, 2, 1, 18, 35)
    want, got = operator(images, SIX, backend="reference"), operator(images, SIX, backend="native")
    assert relative_error(got, want) < 1e-5
    total = 1.01 if operator is par_weights else 1.0
    torch.testing.assert_close(got.sum(1), torch.full((2, 18, 35), total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_reference(isa):
    """The instruction set is chosen once per process, so each runs in one of its own."""
    program = """
import torch, afa_kernels
from afa_kernels._native_module import native
images, masks = torch.rand(2, 3, 21, 45), torch.rand(2, 7, 21, 45)
grad = torch.rand(2, 7, 21, 45)
for operator in (afa_kernels.par, afa_kernels.pamr):
    results = []
    for backend in ("native", "reference"):
        leaf = masks.clone().requires_grad_()
        out = operator(images, leaf, (1, 2, 24), 4, backend=backend)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    for got, want in zip(*results):
        assert (got - want).norm() < 1e-5 * want.norm()
print(native.cpu_isa())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "AFA_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    from afa_kernels._native_module import native

    ranks = ["baseline", "avx2", "avx512"]
    assert run.stdout.strip() == ranks[min(ranks.index(isa), ranks.index(native.cpu_isa()))]


def test_constant_neighbourhood_with_another_centre(rng):
    """The standard deviation is exactly 0 there: 1e-8 decides, and a rounding error in its place would show."""
    images = torch.full((1, 3, 30, 30), 0.7)
    images[0, :, 15, 15] = torch.tensor([0.1, 0.3, 0.9])
    images[0, 0, :, 20:] = 0.2
    want, got = par_weights(images, (1, 2), backend="reference"), par_weights(images, (1, 2), backend="native")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", [par, pamr])
def test_half_precision_error_is_that_of_rounding(rng, operator, dtype):
    images, masks = inputs(rng, 2, 4, 25, 31, dtype)
    exact = operator(images.float(), masks.float(), SIX, 10, backend="reference")
    for backend in BACKENDS:
        got = operator(images, masks, SIX, 10, backend=backend)
        assert got.dtype == dtype
        # Weights and sums are float32 inside, so only the result is rounded.
        assert relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


def test_mixed_dtypes_give_the_masks_dtype(rng):
    images, masks = inputs(rng)
    assert par(images, masks.bfloat16()).dtype == torch.bfloat16
    assert par(images.half(), masks).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_memory_formats(rng, backend):
    images, masks = inputs(rng, 2, 5, 20, 27)
    want = par(images, masks, SIX, 2, backend=backend)
    channels_last = torch.channels_last
    for x, m in [
        (images.to(memory_format=channels_last), masks.to(memory_format=channels_last)),
        (images.transpose(2, 3).contiguous().transpose(2, 3), masks.flip(3).flip(3)),
        (images, torch.cat([masks, masks], 3)[..., :27]),
        (torch.rand(2, 3, 20, 54)[..., ::2].copy_(images), masks),
    ]:
        got = par(x, m, SIX, 2, backend=backend)
        assert torch.equal(got, want) if backend == "native" else relative_error(got, want) < 1e-6
    broadcast = masks[:, :1].expand(-1, 5, -1, -1)
    one = par(images, masks[:, :1], SIX, 2, backend=backend)
    torch.testing.assert_close(par(images, broadcast, SIX, 2, backend=backend), one.expand(-1, 5, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_resized_to_the_image(rng, backend):
    images, masks = inputs(rng, 2, 3, 24, 36)
    small = torch.rand(2, 3, 7, 9, generator=rng)
    resized = torch.nn.functional.interpolate(small, size=(24, 36), mode="bilinear", align_corners=True)
    assert torch.equal(par(images, small, backend=backend), par(images, resized, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_mask_skips_channels(rng, backend):
    images, masks = inputs(rng, 2, 4, 15, 18)
    present = torch.tensor([[True, False, True, False], [False, False, False, False]])
    masks[0, 1] = float("nan")  # an absent channel is not even looked at
    got = par(images, masks, SIX, 3, class_mask=present, backend=backend)
    want = par(images, masks, SIX, 3, backend=backend)
    assert torch.equal(got[0, [0, 2]], want[0, [0, 2]])
    assert not got[0, [1, 3]].any() and not got[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_spreads_only_where_the_formula_takes_it(rng, backend):
    images, masks = inputs(rng, 1, 2, 21, 21)
    clean = par(images, masks, (2,), 1, backend=backend)
    images[0, 1, 10, 10] = float("nan")
    out = par(images, masks, (2,), 1, backend=backend)
    touched = torch.zeros(21, 21, dtype=torch.bool)
    touched[10, 10] = True
    for dy in (-2, 0, 2):
        for dx in (-2, 0, 2):
            touched[10 + dy, 10 + dx] = True
    assert out[0, :, touched].isnan().all()
    assert torch.equal(out[0, :, ~touched], clean[0, :, ~touched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_on_every_run_and_thread_count(rng, backend):
    images, masks = inputs(rng, 2, 6, 40, 40)
    first = par(images, masks, backend=backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = par(images, masks, backend=backend)
            # The reference's sums are PyTorch's own, which may split them by thread.
            assert torch.equal(again, first) if backend == "native" else relative_error(again, first) < 1e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_iteration_returns_a_copy(rng, backend):
    images, masks = inputs(rng)
    out = par(images, masks, num_iter=0, backend=backend)
    assert torch.equal(out, masks) and out.data_ptr() != masks.data_ptr()


def test_inputs_stay_as_they_are(rng):
    images, masks = inputs(rng)
    before = images.clone(), masks.clone()
    par(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [par, pamr])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_masks_equals_reference(rng, operator, shape):
    images, masks = inputs(rng, *shape)
    grad = torch.rand(masks.shape, generator=rng)
    found = {}
    for backend in BACKENDS:
        leaf = masks.clone().requires_grad_()
        operator(images, leaf, (1, 3, 8), 3, backend=backend).backward(grad)
        found[backend] = leaf.grad
    assert relative_error(found["native"], found["reference"]) < 1e-5


def test_gradient_of_images_goes_through_the_reference(rng):
    images, masks = inputs(rng, 1, 2, 9, 11)
    found = []
    for backend in BACKENDS:
        leaf = images.clone().requires_grad_()
        par(leaf, masks, (1, 2), 2, backend=backend).square().sum().backward()
        found.append(leaf.grad)
    assert relative_error(found[-1], found[0]) < 1e-4
    leaf = images.clone().requires_grad_()
    par_weights(leaf, (1, 2)).square().sum().backward()
    other = images.clone().requires_grad_()
    par_weights(other, (1, 2), backend="reference").square().sum().backward()
    assert relative_error(leaf.grad, other.grad) < 1e-4


def test_reference_gradcheck_in_float64():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, m: par(x, m, (1, 2), 2), (images, masks), fast_mode=True)
    torch.autograd.gradcheck(lambda x, m: pamr(x, m, (1, 2), 2), (images, masks), fast_mode=True)


def test_second_derivative_of_the_masks_is_the_operator_again(rng):
    images, masks = inputs(rng, 1, 2, 8, 9)
    masks.requires_grad_()
    seed = torch.rand(masks.shape, generator=rng).requires_grad_()
    (first,) = torch.autograd.grad(par(images, masks, (1,), 2, backend="native"), masks, seed, create_graph=True)
    (second,) = torch.autograd.grad(first, seed, masks.detach())
    torch.testing.assert_close(second, par(images, masks.detach(), (1,), 2))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def test_opcheck(rng):
    images, masks = inputs(rng, 2, 3, 8, 10)
    grad = masks.clone().requires_grad_()
    present = torch.tensor([[True, False, True], [True, True, True]])
    for factors in ([0.3, 0.3, 0.01], []):
        for mask, transpose in ((None, False), (present, True)):
            torch.library.opcheck(torch.ops.afa.par, (images, grad, [1, 2], 2, factors, mask, transpose, "native"))
        torch.library.opcheck(torch.ops.afa.par_weights, (images.clone().requires_grad_(), [1, 2], factors, "native"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(rng, backend):
    images, masks = inputs(rng, 1, 2, 9, 10)
    masks.requires_grad_()

    def step(x, m):
        return par(x, m * 2, (1, 2), 2, backend=backend).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(images, masks).backward()
    got, masks.grad = masks.grad, None
    step(images, masks).backward()
    torch.testing.assert_close(got, masks.grad)


def test_module_compiles_and_picks_its_backend_inside(rng):
    images, masks = inputs(rng, 1, 2, 9, 10)
    module = PAR([1, 2], 2)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(images, masks), module(images, masks))


def test_autocast_and_no_grad(rng):
    images, masks = inputs(rng)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = par(images, masks)
    assert torch.equal(out, par(images, masks))


# --- choice of backend ------------------------------------------------------------------------------------------------


def test_choice_of_backend(rng, monkeypatch):
    images, masks = inputs(rng)
    with pytest.raises(ValueError, match="backend must be one of native, triton, reference"):
        par(images, masks, backend="cuda")
    with pytest.raises(ValueError, match="native cannot run par on cpu: .*float64"):
        par(images.double(), masks.double(), backend="native")
    with pytest.raises(ValueError, match="name must be one of"), afa_kernels.use_backend("fast"):
        pass
    calls = []
    monkeypatch.setattr(par_reference, "refine", lambda *a: calls.append(1) or torch.zeros(1))
    with afa_kernels.use_backend("reference"):
        par(images, masks)
    assert len(calls) == 1
    monkeypatch.setenv("AFA_BACKEND", "reference")
    par(images, masks)
    assert len(calls) == 2
    with afa_kernels.use_backend("native"):
        par(images, masks)
    assert len(calls) == 2
    monkeypatch.setenv("AFA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="AFA_BACKEND must be one of"):
        par(images, masks)


def test_backends_says_why_not():
    table = afa_kernels.backends()
    assert {row.operator for row in table} >= {"par", "par_weights", "diffuse"}
    for row in table:
        assert row.available == (row.reason == "")
    assert "par " in str(table) and "yes" in str(table)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD_IMAGES, GOOD_MASKS = torch.rand(2, 3, 8, 9), torch.rand(2, 4, 8, 9)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"images": GOOD_IMAGES[0]}, ValueError, "images"),
        ({"images": torch.rand(2, 4, 8, 9)}, ValueError, "images"),
        ({"images": GOOD_IMAGES.int()}, TypeError, "images"),
        ({"images": "photo"}, TypeError, "images"),
        ({"images": torch.rand(2, 3, 0, 9)}, ValueError, "images"),
        ({"masks": GOOD_MASKS[0]}, ValueError, "masks"),
        ({"masks": GOOD_MASKS[:1]}, ValueError, "masks"),
        ({"masks": torch.rand(2, 0, 8, 9)}, ValueError, "masks"),
        ({"masks": GOOD_MASKS.bool()}, TypeError, "masks"),
        ({"masks": GOOD_MASKS.to("meta")}, ValueError, "masks"),
        ({"dilations": ()}, ValueError, "dilations"),
        ({"dilations": (1, 0)}, ValueError, "dilations"),
        ({"dilations": (1, -2)}, ValueError, "dilations"),
        ({"dilations": (1.5,)}, TypeError, "dilations"),
        ({"dilations": 4}, TypeError, "dilations"),
        ({"num_iter": -1}, ValueError, "num_iter"),
        ({"num_iter": 2.5}, TypeError, "num_iter"),
        ({"w1": 0.0}, ValueError, "w1"),
        ({"w2": float("nan")}, ValueError, "w2"),
        ({"w3": "much"}, TypeError, "w3"),
        ({"class_mask": torch.ones(2, 4)}, TypeError, "class_mask"),
        ({"class_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "class_mask"),
    ],
)
def test_bad_input_is_named(change, error, named, backend):
    arguments = {"images": GOOD_IMAGES, "masks": GOOD_MASKS, "backend": backend, **change}
    with pytest.raises(error, match=named):
        par(**arguments)


# --- the modules ------------------------------------------------------------------------------------------------------


def test_modules_are_drop_ins(rng):
    images, masks = inputs(rng, 2, 3, 16, 20)
    module = PAR(num_iter=10, dilations=[1, 2, 4])
    assert torch.equal(module(imgs=images, masks=masks), par(images, masks, (1, 2, 4), 10))
    assert module.dim == 2 and module.w1 == 0.3 and module.w2 == 0.01 and module.pos.numel() == 24
    assert dict(module.named_buffers())["kernel"].shape == (8, 1, 3, 3)
    other = PAMR(15, [1, 2])
    assert torch.equal(other(images, masks), pamr(images, masks, (1, 2), 15))
    assert set(other.state_dict()) == {"aff_x.kernel", "aff_m.kernel", "aff_std.kernel"}
    assert (PAMR().num_iter, PAMR().dilations) == (1, [1])
    with pytest.raises(ValueError, match="imgs"):
        module(images[:, :2], masks)


def test_published_kernels_pick_the_neighbours(rng):
    """The kept buffers mean what the published modules convolve with."""
    image = torch.rand(1, 1, 7, 7, generator=rng)
    picked = torch.nn.functional.conv2d(image, PAR([1], 1).kernel)
    assert torch.equal(picked, par_reference.shifted(image, par_reference.tap_offsets([1]))[:, 0, :, 1:-1, 1:-1])
