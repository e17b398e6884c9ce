"""PAR and PAMR: reference against recorded numbers, all backends, the emulated CUDA one too, against reference,
gradients. What PyTorch asks of them: test_par_interface.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from support.common import DEVICE, ROOT, available, relative_error
from support.par_cases import SCENES, inputs, on_device, scene
from support.running import EMULATED_CHIPS

from afa_kernels import PAR, pamr, pamr_weights, par, par_weights

BACKENDS = [*available("par"), *EMULATED_CHIPS]
FAST = BACKENDS[1:]
AUTOMATIC = [None, *EMULATED_CHIPS]  # where a test leaves the choice to the operator
SIX = (1, 2, 4, 8, 12, 24)


# --- the published numbers ---


def recorded(*names):
    """Every backend on every recording; Triton's interpreter, which takes 10 s for one of the larger, on the
    others.
    """
    slow = ("photo", "small") if DEVICE == "cpu" else ()
    return [(backend, name) for backend in BACKENDS for name in names if backend != "triton" or name not in slow]


@pytest.mark.parametrize(("backend", "name"), recorded("photo", "noise", "flat", "small"), indirect=["backend"])
def test_par_gives_the_published_numbers(golden, backend, name):
    z = golden(f"par_{name}")
    out = par(on_device(z["images"]), on_device(z["masks"]), z["dilations"], int(z["num_iter"]), backend=backend)
    assert relative_error(out, torch.tensor(z["out"])) < 1e-5


@pytest.mark.parametrize(("backend", "name"), recorded("photo", "noise", "small"), indirect=["backend"])
def test_pamr_gives_the_published_numbers(golden, backend, name):
    z = golden(f"pamr_{name}")
    out = pamr(on_device(z["images"]), on_device(z["masks"]), z["dilations"], int(z["num_iter"]), backend=backend)
    assert relative_error(out, torch.tensor(z["out"])) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_gradient_of_masks_gives_the_published_numbers(golden, backend):
    z = golden("par_grad")
    masks = on_device(z["masks"]).requires_grad_()
    out = par(on_device(z["images"]), masks, z["dilations"], int(z["num_iter"]), backend=backend)
    out.backward(on_device(z["grad_out"]))
    assert relative_error(masks.grad, torch.tensor(z["grad_masks"])) < 1e-5


# --- native against reference ---

SHAPES = [(1, 1, 1, 1), (2, 2, 1, 40), (1, 3, 37, 1), (3, 5, 2, 3), (1, 21, 33, 65), (2, 9, 16, 16), (1, 17, 7, 130)]


def every_case():
    """Operators, shapes and dilations in all combinations; for Triton's interpreter every shape with every set of
    dilations, by one operator or the other, the 48 taps on three shapes.
    """
    rows = list(itertools.product(FAST, (par, pamr), SHAPES, ((1,), (3, 1), SIX, (40,))))

    def taken(backend, operator, shape, dilations):
        if backend != "triton" or DEVICE != "cpu":
            return True
        few = dilations != SIX or SHAPES.index(shape) in (0, 1, 4)
        return few and (SHAPES.index(shape) + len(dilations) + (operator is pamr)) % 2 == 0

    return [row for row in rows if taken(*row)]


@pytest.mark.parametrize(("backend", "operator", "shape", "dilations"), every_case(), indirect=["backend"])
def test_backends_equal_reference(rng, backend, operator, shape, dilations):
    images, masks = inputs(rng, *shape)
    want = operator(images, masks, dilations, 3, backend="reference")
    got = operator(images, masks, dilations, 3, backend=backend)
    assert relative_error(got, want) < 1e-5
    assert got.is_contiguous()


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("operator", [par_weights, pamr_weights])
def test_weights_equal_reference_and_sum_to_one_plus_share(rng, backend, operator):
    images, _ = inputs(rng, 2, 1, 18, 35)
    want, got = operator(images, SIX, backend="reference"), operator(images, SIX, backend=backend)
    assert relative_error(got, want) < 1e-5
    total = 1.01 if operator is par_weights else 1.0
    torch.testing.assert_close(got.sum(1), torch.full_like(got[:, 0], total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("operator", [par, pamr])
@pytest.mark.parametrize("name", SCENES)
def test_what_photographs_have_and_noise_has_not(rng, backend, operator, name):
    """Where nothing deviates but the pixel itself, kappa is 1e15: its roundings must be those of the formula."""
    images, masks = scene(name, rng, 2, 27, 41).to(DEVICE), torch.rand(2, 3, 27, 41, generator=rng).to(DEVICE)
    weights = pamr_weights if operator is pamr else par_weights
    slow = backend == "triton" and DEVICE == "cpu"
    # Of two greys a deviation can be 0 or a rounding, and PyTorch on a GPU sums in another order.
    allowed = 10 if name == "two greys" and DEVICE == "cuda" else 1
    for dilations in ((2, 1),) if slow else (SIX, (1,), (2, 1)):
        want = weights(images, dilations, backend="reference")
        assert (weights(images, dilations, backend=backend) - want).abs().max() < 1e-4 * allowed
        steps = 1 if slow else 10
        want = operator(images, masks, dilations, steps, backend="reference")
        assert relative_error(operator(images, masks, dilations, steps, backend=backend), want) < 2e-5 * allowed


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("grey", [250, 240, 200, 128, 0])
def test_one_odd_pixel_in_a_white_image(rng, backend, grey):
    images, masks = torch.ones(1, 3, 56, 56), torch.rand(1, 3, 56, 56, generator=rng)
    images[..., 28, 28] = grey / 255
    steps = 1 if backend == "triton" and DEVICE == "cpu" else 10
    want = par(images.to(DEVICE), masks.to(DEVICE), SIX, steps, backend="reference")
    assert relative_error(par(images.to(DEVICE), masks.to(DEVICE), SIX, steps, backend=backend), want) < 1e-5


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_reference(isa):
    """The instruction set is chosen once per process, so each runs in one of its own."""
    program = """
import torch, afa_kernels
from afa_kernels.core.native_module import native
from support.every_operator import everything
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
results = []
for backend in ("native", "reference"):
    with afa_kernels.use_backend(backend):
        results.append(everything(0))
for got, want in zip(*results):
    assert (got - want).norm() < 2e-5 * want.norm()
print(native.cpu_isa())
"""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "AFA_CPU_ISA": isa, "AFA_TEST_DEVICE": "cpu", "PYTHONPATH": folders}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from afa_kernels.core.native_module import native

    ranks = ["baseline", "avx2", "avx512"]
    assert run.stdout.strip() == ranks[min(ranks.index(isa), ranks.index(native.cpu_isa()))]


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_constant_neighbourhood_with_another_centre(backend):
    """The standard deviation is exactly 0 there: 1e-8 decides, and a rounding error in its place would show."""
    images = torch.full((1, 3, 30, 30), 0.7)
    images[0, :, 15, 15] = torch.tensor([0.1, 0.3, 0.9])
    images[0, 0, :, 20:] = 0.2
    images = images.to(DEVICE)
    want, got = par_weights(images, (1, 2), backend="reference"), par_weights(images, (1, 2), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", [par, pamr])
def test_half_precision_error_is_that_of_rounding(rng, backend, operator, dtype):
    images, masks = inputs(rng, 2, 4, 25, 31, dtype)
    steps = 1 if backend == "triton" and DEVICE == "cpu" else 4  # the interpreter takes seconds for each
    exact = operator(images.float(), masks.float(), SIX, steps, backend="reference")
    got = operator(images, masks, SIX, steps, backend=backend)
    assert got.dtype == dtype
    # Weights and sums are float32 inside, so only the result is rounded.
    assert relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("backend", AUTOMATIC, indirect=True)
def test_mixed_dtypes_give_the_masks_dtype(rng, backend):
    images, masks = inputs(rng)
    assert par(images, masks.bfloat16()).dtype == torch.bfloat16
    assert par(images.half(), masks).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides_and_memory_formats(rng, backend):
    images, masks = inputs(rng, 2, 5, 10, 17)
    dilations = (1, 12)
    want = par(images, masks, dilations, 2, backend=backend)
    channels_last = torch.channels_last
    for x, m in [
        (images.to(memory_format=channels_last), masks.to(memory_format=channels_last)),
        (images.transpose(2, 3).contiguous().transpose(2, 3), masks.flip(3).flip(3)),
        (images, torch.cat([masks, masks], 3)[..., :17]),
        (images.new_empty(2, 3, 10, 34)[..., ::2].copy_(images), masks),
    ]:
        got = par(x, m, dilations, 2, backend=backend)
        assert torch.equal(got, want) if backend != "reference" else relative_error(got, want) < 1e-6
    broadcast = masks[:, :1].expand(-1, 5, -1, -1)
    one = par(images, masks[:, :1], dilations, 2, backend=backend)
    torch.testing.assert_close(par(images, broadcast, dilations, 2, backend=backend), one.expand(-1, 5, -1, -1))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_masks_are_resized_to_the_image(rng, backend):
    images, masks = inputs(rng, 2, 3, 24, 36)
    small = torch.rand(2, 3, 7, 9, generator=rng).to(DEVICE)
    resized = torch.nn.functional.interpolate(small, size=(24, 36), mode="bilinear", align_corners=True)
    got, want = par(images, small, SIX, 2, backend=backend), par(images, resized, SIX, 2, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_or_the_image_to_the_masks(rng, backend):
    images, _ = inputs(rng, 2, 3, 24, 36)
    small = torch.rand(2, 3, 7, 9, generator=rng).to(DEVICE).requires_grad_()
    images.requires_grad_()
    got = par(images, small, (1, 2), 2, resize="image", backend=backend)
    resized = torch.nn.functional.interpolate(images, size=(7, 9), mode="bilinear", align_corners=True)
    assert torch.equal(got, par(resized, small, (1, 2), 2, backend=backend))
    module = PAR([1, 2], 2, resize="image")
    assert relative_error(module(images, small), got) < 1e-5
    got.sum().backward()
    assert images.grad.isfinite().all() and small.grad.isfinite().all()
    with pytest.raises(ValueError, match="resize must be 'mask' or 'image'"):
        par(images, small, resize="both")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_class_mask_skips_channels(rng, backend):
    images, masks = inputs(rng, 2, 4, 15, 18)
    present = on_device([[True, False, True, False], [False, False, False, False]])
    masks[0, 1] = float("nan")  # an absent channel is not even looked at
    got = par(images, masks, SIX, 3, class_mask=present, backend=backend)
    want = par(images, masks, SIX, 3, backend=backend)
    assert torch.equal(got[0, [0, 2]], want[0, [0, 2]])
    assert not got[0, [1, 3]].any() and not got[1].any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_spreads_only_where_the_formula_takes_it(rng, backend):
    images, masks = inputs(rng, 1, 2, 21, 21)
    clean = par(images, masks, (2,), 1, backend=backend)
    images[0, 1, 10, 10] = float("nan")
    out = par(images, masks, (2,), 1, backend=backend)
    touched = torch.zeros(21, 21, dtype=torch.bool, device=DEVICE)
    touched[10, 10] = True
    for dy in (-2, 0, 2):
        for dx in (-2, 0, 2):
            touched[10 + dy, 10 + dx] = True
    assert out[0, :, touched].isnan().all()
    assert torch.equal(out[0, :, ~touched], clean[0, :, ~touched])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_same_bits_on_every_run_and_thread_count(rng, backend):
    images, masks = inputs(rng, 2, 4, 19, 34)
    first = par(images, masks, num_iter=3, backend=backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = par(images, masks, num_iter=3, backend=backend)
            # The reference's sums are PyTorch's own, which may split them by thread.
            assert torch.equal(again, first) if backend != "reference" else relative_error(again, first) < 1e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_iteration_returns_a_copy(rng, backend):
    images, masks = inputs(rng)
    out = par(images, masks, num_iter=0, backend=backend)
    assert torch.equal(out, masks) and out.data_ptr() != masks.data_ptr()


@pytest.mark.parametrize("backend", AUTOMATIC, indirect=True)
def test_inputs_stay_as_they_are(rng, backend):
    images, masks = inputs(rng)
    before = images.clone(), masks.clone()
    par(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


# --- gradients ---


def every_gradient():
    """All combinations; for Triton's interpreter every shape by one operator, whose gradient is the other's too."""
    rows = list(itertools.product(FAST, (par, pamr), SHAPES))
    slow = "triton" if DEVICE == "cpu" else None
    return [row for row in rows if row[0] != slow or (SHAPES.index(row[2]) + (row[1] is pamr)) % 2 == 0]


@pytest.mark.parametrize(("backend", "operator", "shape"), every_gradient(), indirect=["backend"])
def test_gradient_of_masks_equals_reference(rng, backend, operator, shape):
    images, masks = inputs(rng, *shape)
    grad = torch.rand(masks.shape, generator=rng).to(DEVICE)
    got, want = masks.clone().requires_grad_(), masks.clone().requires_grad_()
    operator(images, got, (1, 3, 8), 3, backend=backend).backward(grad)
    operator(images, want, (1, 3, 8), 3, backend="reference").backward(grad)
    assert relative_error(got.grad, want.grad) < 1e-5


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_gradient_of_images_goes_through_the_reference(rng, backend):
    images, masks = inputs(rng, 1, 2, 9, 11)
    for operator in (lambda leaf, name: par(leaf, masks, (1, 2), 2, backend=name),
                     lambda leaf, name: par_weights(leaf, (1, 2), backend=name)):  # fmt: skip
        got, want = images.clone().requires_grad_(), images.clone().requires_grad_()
        operator(got, backend).square().sum().backward()
        operator(want, "reference").square().sum().backward()
        assert relative_error(got.grad, want.grad) < 1e-4


def test_reference_gradcheck_in_float64():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, m: par(x, m, (1, 2), 2), (images, masks), fast_mode=True)
    torch.autograd.gradcheck(lambda x, m: pamr(x, m, (1, 2), 2), (images, masks), fast_mode=True)


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_second_derivative_of_the_masks_is_the_operator_again(rng, backend):
    images, masks = inputs(rng, 1, 2, 8, 9)
    masks.requires_grad_()
    seed = torch.rand(masks.shape, generator=rng).to(DEVICE).requires_grad_()
    (first,) = torch.autograd.grad(par(images, masks, (1,), 2, backend=backend), masks, seed, create_graph=True)
    (second,) = torch.autograd.grad(first, seed, masks.detach())
    torch.testing.assert_close(second, par(images, masks.detach(), (1,), 2))
