"""oneDNN's linear layer: what PyTorch's own gives, forward and backward, wherever it is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.common import relative_error
from torch import nn

from afa_model.networks import onednn
from afa_model.networks.onednn import Linear

needs_onednn = pytest.mark.skipif(not onednn._AVAILABLE, reason="this torch has no oneDNN")


@pytest.fixture
def products(monkeypatch) -> list[torch.Size]:
    """The shapes that went through oneDNN."""
    seen, real = [], onednn._product
    monkeypatch.setattr(onednn, "_product", lambda x, *rest: seen.append(x.shape) or real(x, *rest))
    return seen


@needs_onednn
@pytest.mark.parametrize(
    ("shape", "inputs", "outputs", "bias"),
    [
        ((2, 7), 64, 128, True),
        ((5,), 300, 400, True),  # wide enough for the other way to the weight's gradient
        ((1, 1, 3), 8, 5, False),
        ((1,), 1, 1, True),
    ],
)
def test_linear_is_the_formula(products, shape, inputs, outputs, bias):
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, bias=bias)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    x = torch.randn(*shape, inputs, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    grad = torch.randn(*shape, outputs)

    got, want = layer(x), exact(x64)
    assert products == [x.shape]
    assert relative_error(got, want) < 1e-6
    gradients = torch.autograd.grad(got, [x, *layer.parameters()], grad)
    wanted = torch.autograd.grad(want, [x64, *exact.parameters()], grad.double())
    for one, other in zip(gradients, wanted):
        assert relative_error(one, other) < 1e-5
    with torch.no_grad():
        assert torch.equal(layer(x), got)


@needs_onednn
def test_linear_takes_any_strides_and_gives_only_wanted_gradients(products):
    layer = Linear(6, 4)
    x = torch.randn(6, 5).t()
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((4,), 5.0))
    assert relative_error(layer(x), F.linear(x.contiguous(), layer.weight, layer.bias)) < 1e-6
    expanded = layer(torch.randn(3, 6, requires_grad=True)).sum()  # its gradient has stride 0
    expanded.backward()


def test_linear_leaves_the_rest_to_torch(products):
    layer = Linear(6, 4)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x[0]).shape == (4,)
    assert layer(x[:0]).shape == (0, 4)
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.backends.mkldnn.flags(enabled=False):
        layer.float()(x)
    assert not products


def test_linear_refuses_what_torch_refuses():
    with pytest.raises(RuntimeError):
        Linear(6, 4)(torch.randn(2, 5))
