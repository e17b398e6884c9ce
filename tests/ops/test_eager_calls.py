"""Eager calls go past PyTorch's dispatcher: only where none of what it does for a call would be missed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.common import DEVICE
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from afa_kernels import attention_affinity_loss, par, random_walk
from afa_kernels.core import registration


@pytest.fixture
def walk(rng):
    affinity, cams = torch.rand(1, 9, 5, 6, generator=rng), torch.rand(1, 2, 5, 6, generator=rng)
    return affinity.to(DEVICE), cams.to(DEVICE)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A tensor whose class is told of every operator on it."""

    names: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_modes_and_classes_hear_of_a_call(walk):
    want = random_walk(*walk, 1)
    with Seen() as seen:
        assert torch.equal(random_walk(*walk, 1), want)
    assert "afa::random_walk" in seen.names
    with SeenFunctions() as heard:
        random_walk(*walk, 1)
    assert any("afa.random_walk" in name for name in heard.names)
    Own.names.clear()
    random_walk(walk[0].as_subclass(Own), walk[1], 1)
    assert any("afa.random_walk" in name for name in Own.names)


def test_a_profile_names_the_operator(walk):
    leaves = [tensor.requires_grad_() for tensor in walk]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        random_walk(*leaves, 1).sum().backward()
    names = {event.name for event in found.events()}
    assert {"afa::random_walk", "afa::random_walk_affinity_gradient"} <= names


def test_a_trace_has_the_operator_and_no_constant(walk):
    traced = torch.jit.trace(lambda affinity, cams: random_walk(affinity, cams, 1), walk)
    assert "afa::random_walk" in str(traced.graph)
    cams = torch.rand_like(walk[1])
    assert torch.equal(traced(walk[0], cams), random_walk(walk[0], cams, 1))


def test_tensors_without_data_have_shapes():
    affinity, cams = torch.rand(1, 9, 5, 6, device="meta"), torch.rand(1, 2, 5, 6, device="meta")
    with pytest.raises(ValueError, match="meta"):  # nothing runs there but the formula
        random_walk(affinity, cams, 1, backend="native")
    with FakeTensorMode():
        assert par(torch.rand(1, 3, 8, 9), torch.rand(1, 2, 8, 9)).shape == (1, 2, 8, 9)


def test_a_tensor_that_its_memory_is_not(walk):
    """The imaginary part of a conjugate: the memory holds it with the other sign."""
    affinity, cams = walk
    turned = torch.complex(cams, -cams).conj().imag
    assert turned.is_neg() and torch.equal(turned, cams)
    assert torch.equal(random_walk(affinity, turned, 1), random_walk(affinity, cams, 1))


@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_loss_keeps_goes_either_way(rng, recompute):
    leaves = [torch.rand(*shape, generator=rng).to(DEVICE) for shape in ((1, 2, 30, 4), (1, 2, 30, 4), (2,), (1,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    labels = torch.randint(3, (1, 5, 6), generator=rng).to(DEVICE)

    def gradients():
        loss = attention_affinity_loss(*leaves, labels, 2, recompute=recompute)[0]
        return torch.autograd.grad(loss, leaves)

    want = gradients()
    with Seen() as seen:
        got = gradients()
    assert {"afa::attention_affinity_loss", "afa::attention_affinity_loss_backward"} <= set(seen.names)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want))


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_and_plain_tensors_have_the_same_gradients(walk, wrapped):
    kind = torch.nn.Parameter if wrapped else lambda tensor: tensor.requires_grad_()
    leaves = [kind(tensor.clone()) for tensor in walk]
    got = torch.autograd.grad(random_walk(*leaves, 1).square().sum(), leaves)
    with Seen():
        want = torch.autograd.grad(random_walk(*leaves, 1).square().sum(), leaves)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want))


def test_a_gradient_of_a_gradient_is_refused_as_before(walk):
    affinity, cams = walk[0].requires_grad_(), walk[1]
    (slope,) = torch.autograd.grad(random_walk(affinity, cams, 1, backend="native").sum(), affinity, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of a gradient"):
        slope.sum().backward()


def test_counts_alone_have_no_gradient(rng):
    query = torch.rand(1, 2, 12, 4, generator=rng).to(DEVICE).requires_grad_()
    head = torch.rand(2, device=DEVICE), torch.rand(1, device=DEVICE)
    labels = torch.zeros(1, 3, 4, dtype=torch.int64, device=DEVICE)
    loss, *counts = attention_affinity_loss(query, query, *head, labels, 1)
    assert loss.requires_grad and not any(count.requires_grad for count in counts)
    with torch.no_grad():
        assert not attention_affinity_loss(query, query, *head, labels, 1)[0].requires_grad


def test_another_pytorch_that_cannot_be_asked_is_gone_through(walk, monkeypatch):
    assert registration._can_ask() and registration._CAN_ASK
    without = SimpleNamespace(**{name: vars(torch._C)[name] for name in registration._ASKED if "." not in name})
    assert not registration._can_ask(without)
    want = random_walk(*walk, 1)
    monkeypatch.setattr(registration, "_CAN_ASK", False)
    monkeypatch.setattr(registration.Operator, "_directly", None)
    assert torch.equal(random_walk(*walk, 1), want)
