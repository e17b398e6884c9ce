"""Diffusion: all backends, the emulated CUDA one too, against reference on both borders, the adjoint, gradients of
masks and weights, registration, bad input.
"""

from __future__ import annotations

import pytest
import torch
from support.common import DEVICE, available, relative_error
from support.running import EMULATED_CHIPS, ONE_EMULATED

from afa_kernels import diffuse

HERE = available("diffuse")
BACKENDS = [*HERE, *EMULATED_CHIPS]
FAST = BACKENDS[1:]
BORDERS = ["replicate", "zero"]
# Not a ring: an odd number of taps, the centre, a repeated one, and some farther than the image is long.
OFFSETS = [(0, 0), (1, -2), (-3, 1), (0, 5), (2, 0), (2, 0), (-40, 7), (3, 60), (-1, -1)]
SHAPES = [(1, 1, 1, 1), (2, 2, 1, 40), (1, 3, 37, 1), (3, 5, 2, 3), (1, 9, 18, 33)]


def inputs(rng, batch, channels, height, width, taps=len(OFFSETS)):
    weights = torch.randn(batch, taps, height, width, generator=rng) / taps
    return weights.to(DEVICE), torch.rand(batch, channels, height, width, generator=rng).to(DEVICE)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_iter", [0, 1, 4])
def test_backends_equal_reference(rng, backend, border, shape, num_iter):
    weights, masks = inputs(rng, *shape)
    want = diffuse(weights, masks, OFFSETS, num_iter, border, backend="reference")
    got = diffuse(weights, masks, OFFSETS, num_iter, border, backend=backend)
    assert relative_error(got, want) < 1e-5 and got.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_step_is_the_written_sum(rng, backend):
    weights, masks = inputs(rng, 1, 2, 4, 5)
    got = diffuse(weights, masks, OFFSETS, 1, "zero", backend=backend)
    weights, masks, want = weights.cpu(), masks.cpu(), torch.zeros(1, 2, 4, 5)
    for t, (dy, dx) in enumerate(OFFSETS):
        for y in range(4):
            for x in range(5):
                if 0 <= y + dy < 4 and 0 <= x + dx < 5:
                    want[0, :, y, x] += weights[0, t, y, x] * masks[0, :, y + dy, x + dx]
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_reference(rng, backend, border, shape):
    weights, masks = inputs(rng, *shape)
    grad = torch.rand(masks.shape, generator=rng).to(DEVICE)
    found = []
    for name in (backend, "reference"):
        leaves = weights.clone().requires_grad_(), masks.clone().requires_grad_()
        diffuse(*leaves, OFFSETS, 3, border, backend=name).backward(grad)
        found.append([leaf.grad for leaf in leaves])
    for got, want in zip(*found):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("border", BORDERS)
def test_gradient_is_the_adjoint(rng, backend, border):
    """<A x, y> = <x, A^T y>, borders included, in any shape."""
    for shape in SHAPES:
        weights, masks = inputs(rng, *shape)
        other = torch.rand(masks.shape, generator=rng).to(DEVICE)
        leaf = masks.clone().requires_grad_()
        out = diffuse(weights, leaf, OFFSETS, 2, border, backend=backend)
        (adjoint,) = torch.autograd.grad(out, leaf, other)
        assert (out.double() * other).sum().item() == pytest.approx(
            (masks.double() * adjoint).sum().item(), rel=1e-4, abs=1e-5
        )


def test_reference_gradcheck_in_float64():
    torch.manual_seed(0)
    weights = torch.rand(2, 9, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for border in BORDERS:
        torch.autograd.gradcheck(lambda w, m, b=border: diffuse(w, m, OFFSETS, 2, b), (weights, masks), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("border", BORDERS)
def test_class_mask(rng, backend, border):
    weights, masks = inputs(rng, 2, 5, 9, 12)
    present = torch.tensor([[True, False, False, True, True], [False] * 5], device=DEVICE)
    masks[0, 1] = float("inf")
    weights.requires_grad_(), masks.requires_grad_()
    got = diffuse(weights, masks, OFFSETS, 2, border, present, backend=backend)
    want = diffuse(weights, masks[:, [0, 3, 4]], OFFSETS, 2, border, backend=backend)
    torch.testing.assert_close(got[0, [0, 3, 4]], want[0])
    assert not got[0, [1, 2]].any() and not got[1].any()
    grads = torch.autograd.grad(got.sum(), (weights, masks))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][0, [1, 2]].any() and not grads[1][1].any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_error_is_that_of_rounding(rng, backend, dtype):
    weights, masks = (value.to(dtype) for value in inputs(rng, 2, 3, 15, 20))
    exact = diffuse(weights.float(), masks.float(), OFFSETS, 3, backend="reference")
    got = diffuse(weights, masks, OFFSETS, 3, backend=backend)
    assert got.dtype == dtype
    assert relative_error(got, exact) <= 2 * relative_error(exact.to(dtype), exact)


@pytest.mark.parametrize("backend", [name for name in FAST if name != "triton"], indirect=True)
def test_half_conversions_are_exact(backend):
    """Every half and bfloat16 value, with infinities, NaN and subnormals, passes through the kernel and back."""
    weights = torch.ones(1, 1, 1, 65536, device=DEVICE)
    every = torch.arange(-32768, 32768, dtype=torch.int32, device=DEVICE).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype).reshape(1, 1, 1, -1)
        got = diffuse(weights, values, [(0, 0)], 1, backend=backend)
        torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
    # And float32 to half rounds as PyTorch does: ties, subnormals, overflow.
    wide = torch.cat(
        [torch.randn(4096) * 10.0**e for e in (-9, -7, -5, -4, 0, 4, 5)] + [torch.tensor([65519.0, 65520.0, 2.0**-25])]
    ).to(DEVICE)
    for dtype in (torch.float16, torch.bfloat16):
        masks = torch.ones(1, 1, 1, wide.numel(), dtype=dtype, device=DEVICE)
        got = diffuse(wide.view(1, 1, 1, -1), masks, [(0, 0)], 1, backend=backend)
        torch.testing.assert_close(got.flatten(), wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides(rng, backend):
    weights, masks = inputs(rng, 2, 3, 12, 17)
    want = diffuse(weights, masks, OFFSETS, 2, backend=backend)
    got = diffuse(
        weights.to(memory_format=torch.channels_last),
        masks.transpose(0, 1).contiguous().transpose(0, 1),
        torch.tensor(OFFSETS, dtype=torch.int32),
        2,
        backend=backend,
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    one = weights[:1, :, :1, :1]
    torch.testing.assert_close(
        diffuse(one.expand(2, -1, 12, 17), masks, OFFSETS, 2, backend=backend),
        diffuse(one.expand(2, -1, 12, 17).contiguous(), masks, OFFSETS, 2, backend=backend),
    )


@pytest.mark.parametrize("backend", [*HERE[1:], *ONE_EMULATED], indirect=True)
def test_opcheck(rng, backend):
    weights, masks = inputs(rng, 2, 2, 3, 4)
    weights.requires_grad_(), masks.requires_grad_()
    offsets, present = torch.tensor(OFFSETS), torch.tensor([[True, False], [True, True]], device=DEVICE)
    for border, mask, transpose in (("replicate", None, False), ("zero", present, True)):
        torch.library.opcheck(torch.ops.afa.diffuse, (weights, masks, offsets, 2, border, mask, transpose, backend))
        torch.library.opcheck(
            torch.ops.afa.diffuse_correlation, (masks.detach(), masks.detach(), offsets, border, mask)
        )


@pytest.mark.parametrize("backend", [*HERE, *ONE_EMULATED], indirect=True)
def test_compiles_without_a_graph_break(rng, backend):
    torch._dynamo.reset()  # torch 2.11 confuses functions compiled by earlier tests with this one's
    weights, masks = inputs(rng, 1, 2, 6, 7)
    leaves = weights.requires_grad_(), masks.requires_grad_()

    def step(w, m):
        return diffuse(w, m, OFFSETS, 2, backend=backend).square().sum()

    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    want = torch.autograd.grad(step(*leaves), leaves)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


GOOD_WEIGHTS, GOOD_MASKS = torch.rand(2, 2, 8, 9, device=DEVICE), torch.rand(2, 4, 8, 9, device=DEVICE)


@pytest.mark.parametrize("backend", [None, *HERE])
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"weights": GOOD_WEIGHTS[0]}, ValueError, "weights"),
        ({"weights": GOOD_WEIGHTS.long()}, TypeError, "weights"),
        ({"weights": GOOD_WEIGHTS[:, :0]}, ValueError, "weights"),
        ({"masks": GOOD_MASKS[:, :, :7]}, ValueError, "masks"),
        ({"masks": GOOD_MASKS[:1]}, ValueError, "masks"),
        ({"masks": None}, TypeError, "masks"),
        ({"offsets": [(0, 1)]}, ValueError, "offsets"),
        ({"offsets": [(0, 1), (1, 2, 3)]}, ValueError, "offsets"),
        ({"offsets": [(0, 1), (0.5, 1)]}, TypeError, "offsets"),
        ({"offsets": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "offsets"),
        ({"offsets": torch.zeros(2, 2)}, TypeError, "offsets"),
        ({"offsets": None}, TypeError, r"offsets must be 2 pairs \(dy, dx\), one per channel of weights, got None"),
        ({"offsets": 3}, TypeError, "offsets must be 2 pairs"),
        ({"offsets": [1, 2]}, TypeError, "offsets must be 2 pairs"),
        ({"num_iter": 2**70}, ValueError, "num_iter must be from 0 to"),
        ({"num_iter": -1}, ValueError, "num_iter"),
        ({"border": "wrap"}, ValueError, "border"),
        ({"class_mask": torch.ones(2, 4, dtype=torch.uint8, device=DEVICE)}, TypeError, "class_mask"),
    ],
)
def test_bad_input_is_named(change, error, named, backend):
    arguments = {
        "weights": GOOD_WEIGHTS,
        "masks": GOOD_MASKS,
        "offsets": [(0, 1), (1, 0)],
        "num_iter": 2,
        "backend": backend,
    }
    with pytest.raises(error, match=named):
        diffuse(**{**arguments, **change})
