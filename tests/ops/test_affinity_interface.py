"""Affinity from attention in PyTorch: bad input, gradients in float64, compilation, registration."""

from __future__ import annotations

import pytest
import torch
from support.affinity_cases import random_case
from support.common import DEVICE, available, relative_error
from support.running import EMULATED, running

import afa_kernels
from afa_kernels import use_backend
from afa_kernels.ops.affinity.losses import check_labels

BACKENDS = available("attention_affinity_loss")


@pytest.fixture(params=[*BACKENDS, *EMULATED])
def backend(request):
    with running(request.param) as name:
        yield name


# --- bad input ----------------------------------------------------------------------------------------------


def good():
    return {
        "query": torch.ones(2, 3, 12, 4),
        "key": torch.ones(2, 3, 12, 4),
        "head_weight": torch.ones(3),
        "head_bias": torch.ones(1),
        "height": 3,
        "width": 4,
        "radius": 1,
    }


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("query", [1.0], TypeError),
        ("query", torch.ones(2, 3, 12), ValueError),
        ("query", torch.ones(2, 3, 12, 4, dtype=torch.int64), TypeError),
        ("query", torch.ones(0, 3, 12, 4), ValueError),
        ("query", torch.ones(2, 3, 11, 4), ValueError),
        ("key", torch.ones(1, 3, 12, 4), ValueError),
        ("key", torch.ones(2, 3, 12, 5), ValueError),
        ("key", torch.ones(2, 3, 12, 4, dtype=torch.float16), TypeError),
        ("key", torch.ones(2, 3, 12, 4, device="meta"), ValueError),
        ("head_weight", torch.ones(2), ValueError),
        ("head_weight", torch.ones(3, 1), ValueError),
        ("head_bias", torch.ones(2), ValueError),
        ("head_bias", 0.0, TypeError),
        ("height", 0, ValueError),
        ("width", 4.0, TypeError),
        ("radius", -1, ValueError),
        ("radius", "1", TypeError),
        ("radius", 2**70, ValueError),
    ],
)
def test_bad_input_names_the_argument(argument, value, error):
    wrong = (
        "key" if argument == "query" and isinstance(value, torch.Tensor) and value.shape == (2, 3, 11, 4) else argument
    )
    with pytest.raises(error, match=f"^{wrong}"):
        afa_kernels.window_affinity(**{**good(), argument: value})


def test_a_grid_that_does_not_fit_the_pixels():
    with pytest.raises(ValueError, match=r"^query must have N = height \* width"):
        afa_kernels.window_affinity(**{**good(), "height": 4})
    case = good()
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    head = case["head_weight"], case["head_bias"]
    with pytest.raises(ValueError, match=r"^query must have N = height \* width"):
        afa_kernels.attention_affinity_loss(case["query"], case["key"], *head, labels, 1)
    for shape in ((2, 3, 12, 11), (2, 3, 12), (2, 3, 9, 9)):
        with pytest.raises(ValueError, match=r"^maps"):
            afa_kernels.affinity_from_maps(torch.ones(shape), *head, 3, 4, 1)
    for shape in ((1, 12, 11), (1, 9, 9), (12, 12)):
        with pytest.raises(ValueError, match=r"^dense"):
            afa_kernels.dense_to_window(torch.ones(shape), 3, 4, 1)


@pytest.mark.parametrize(
    "argument, value, error",
    [
        ("affinity", torch.ones(1, 8, 3, 4), ValueError),
        ("affinity", torch.ones(9, 3, 4), ValueError),
        ("affinity", torch.ones(1, 9, 3, 4, dtype=torch.int32), TypeError),
        ("affinity", torch.ones(1, 9, 0, 4), ValueError),
        ("labels", torch.zeros(1, 4, 3, dtype=torch.int64), ValueError),
        ("labels", torch.zeros(2, 3, 4, dtype=torch.int64), ValueError),
        ("labels", torch.zeros(1, 3, 4), TypeError),
        ("labels", torch.full((1, 3, 4), 256), ValueError),
        ("labels", torch.full((1, 3, 4), -1), ValueError),
        ("labels", torch.zeros(1, 3, 4, dtype=torch.int64, device="meta"), ValueError),
        ("radius", -2, ValueError),
        ("ignore_index", 1.5, TypeError),
        ("ignore_index", 2**70, ValueError),
        ("backend", "fast", ValueError),
    ],
)
def test_bad_input_of_the_loss(argument, value, error):
    case = {
        "affinity": torch.ones(1, 9, 3, 4),
        "labels": torch.zeros(1, 3, 4, dtype=torch.int64),
        "radius": 1,
    }
    with pytest.raises(error, match=f"^{argument}"):
        afa_kernels.affinity_loss(**{**case, argument: value})


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA an assertion on the device, which ends the process")
def test_labels_out_of_range_are_told_before_the_fused_loss(rng):
    leaves, labels = random_case(rng)
    labels[1, 2, 3] = 300
    with pytest.raises(ValueError, match=r"^labels must be in 0..255 or ignore_index = 255, got 300"):
        afa_kernels.attention_affinity_loss(*leaves, labels, 2)


# --- gradients and compilation ------------------------------------------------------------------------------


def test_gradcheck_of_the_reference(rng):
    leaves, labels = random_case(rng, batch=1, heads=2, height=2, width=3, depth=2, dtype=torch.float64, classes=2)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *x: afa_kernels.attention_affinity_loss(*x, labels, 1)[0], leaves)
        assert torch.autograd.gradcheck(lambda *x: afa_kernels.window_affinity(*x, 2, 3, 1), leaves)
        maps = torch.randn(1, 2, 6, 6, generator=rng, dtype=torch.float64).to(DEVICE).requires_grad_()
        head = leaves[2:]
        assert torch.autograd.gradcheck(lambda *x: afa_kernels.affinity_from_maps(*x, 2, 3, 1), (maps, *head))
        window = torch.rand(1, 9, 2, 3, generator=rng, dtype=torch.float64).to(DEVICE).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: afa_kernels.affinity_loss(x, labels, 1)[0], window)


def test_compiles_in_one_graph(rng, backend):
    leaves, labels = random_case(rng, batch=1, height=4, width=5)

    def step(query, key, weight, bias, labels):
        window = afa_kernels.window_affinity(query, key, weight, bias, 4, 5, 2)
        fused = afa_kernels.attention_affinity_loss(query, key, weight, bias, labels, 2)[0]
        return fused + afa_kernels.affinity_loss(window, labels, 2)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted, got = step(*leaves, labels), compiled(*leaves, labels)
    assert relative_error(got, wanted) < 1e-5
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves)):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("backend_name", [name for name in BACKENDS if name != "reference"])
def test_operators_are_registered_right(rng, backend_name):
    """Schema, fake tensors, autograd and tracing of each operator and of its backward."""
    leaves, labels = random_case(rng, batch=1, heads=2, height=3, width=4, depth=3)
    labels = check_labels(labels, 255)
    maps = torch.randn(1, 2, 12, 12, generator=rng).to(DEVICE).requires_grad_()
    window = torch.rand(1, 9, 3, 4, generator=rng).to(DEVICE).requires_grad_()
    head, grad = leaves[2:], torch.rand(1, 9, 3, 4, generator=rng).to(DEVICE)
    grad_loss = torch.rand((), generator=rng).to(DEVICE)
    counts = torch.tensor(7, device=DEVICE), torch.tensor(9, device=DEVICE)
    still = [leaf.detach() for leaf in leaves]
    operators = torch.ops.afa
    # Without what the loss keeps, and with it, where there is any.
    kept = [operators.attention_affinity_loss(*still, labels, 1, -1, keep, backend_name)[3] for keep in (False, True)]
    fused_backward = operators.attention_affinity_loss_backward
    slopes = [(grad_loss, *counts, derivatives) for derivatives in kept]
    cases = [
        (operators.window_affinity, (*leaves, 3, 4, 1)),
        (operators.affinity_from_maps, (maps, *head, 3, 4, 1)),
        (operators.affinity_loss, (window, labels, 1, -1)),
        *((operators.attention_affinity_loss, (*leaves, labels, 1, -1, keep)) for keep in (False, True)),
        (operators.window_affinity_backward, (*still, grad, 1, [True, False])),
        (operators.affinity_from_maps_backward, (maps.detach(), *still[2:], grad, 1, [True])),
        (operators.affinity_loss_backward, (window.detach(), labels, grad_loss, *counts, 1, -1)),
        *((fused_backward, (*still, labels, *slope, 1, -1, [True, True])) for slope in slopes),
    ]
    for operator, inputs in cases:
        torch.library.opcheck(operator.default, (*inputs, backend_name))
    torch.library.opcheck(operators.pair_labels.default, (torch.tensor([[[1, 255, 0]]], device=DEVICE), 255))
