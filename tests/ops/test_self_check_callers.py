"""A backend proves itself before it is used: from where it may be called, on which device, and by training."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.self_checking import (  # noqa: F401 (fixtures)
    CPU,
    FLOAT,
    break_kernel,
    broken_fixture,
    checks_fixture,
    nothing_is_known_fixture,
    silence,
    walk,
    walk_inputs,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import afa_kernels
from afa_kernels import random_walk
from afa_kernels.core import backends, native_module, self_check
from afa_kernels.ops.random_walk import native as random_walk_native

pytestmark = [
    pytest.mark.skipif(native_module.native is None, reason="no native module"),
    pytest.mark.usefixtures("nothing_is_known"),
]


# --- where it is called from ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device(name: str):
    before = torch.get_default_device()
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CALLERS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "forced": lambda: afa_kernels.use_backend("native"),
    "deterministic": contextlib.nullcontext,
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_holds_for_the_caller_does_not_reach_the_check(caller, gradients, checks, monkeypatch):
    inputs, samples, drawn = walk_inputs(gradients=gradients), self_check.samples["random_walk"], []
    monkeypatch.setitem(self_check.samples, "random_walk", lambda draw: drawn.append(draw(1)) or samples(draw))
    if caller == "deterministic":
        torch.use_deterministic_algorithms(True)
    state = torch.get_rng_state()
    with silence(), CALLERS[caller]():
        random_walk(*inputs, 1)
        random_walk(*inputs, 1)
    assert torch.equal(torch.get_rng_state(), state)
    asked = gradients and caller not in ("inference mode", "no grad")
    assert [key[-1] for key in checks] == [asked]
    assert self_check.proven("random_walk", "native", CPU, FLOAT, FLOAT, asked)
    assert [(tensor.dtype, tensor.device) for tensor in drawn] == [(FLOAT, CPU)]


def test_nothing_is_checked_within_a_capture(checks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with silence():
        walk("native")
        assert not checks
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            afa_kernels.self_check("cpu")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        walk()
    assert len(checks) == 1


class WalksBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        with pytest.raises(RuntimeError, match="a backward is running"):
            afa_kernels.self_check("cpu")
        return grad * walk("native").sum()


def test_nothing_is_checked_within_a_backward(checks):
    with silence():
        WalksBack.apply(torch.ones(1, requires_grad=True)).sum().backward()
        assert not checks
        walk()
    assert len(checks) == 1


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_checked_before_it_is_traced(right, backend, checks, monkeypatch):
    torch._dynamo.reset()
    if not right:
        break_kernel(monkeypatch, random_walk_native, "random_walk_affinity_gradient", lambda out: out * 1.01)
    graphs = []

    def step(affinity, cams):
        return random_walk(affinity * 1, cams, 1).square().sum()

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=keep)
    inputs = walk_inputs(gradients=True)
    with silence() if right else pytest.warns(RuntimeWarning, match="float32 backward differs"):
        got = torch.autograd.grad(compiled(*inputs), inputs)
    assert [key[-1] for key in checks] == [True]
    (graph,) = graphs
    assert ("afa.random_walk" in graph.code) == right
    with silence():
        compiled(*inputs)
        want = torch.autograd.grad(step(*inputs), inputs)
    assert len(graphs) == 1 and len(checks) == 1
    for mine, true in zip(got, want):
        torch.testing.assert_close(mine, true)


def test_compiled_code_says_so_where_a_backend_is_forced(broken):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, c: random_walk(a, c, 1, backend="native"), fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match=broken), pytest.raises(Exception, match="native cannot run random_walk"):
        compiled(*walk_inputs())


def test_two_threads_make_one_check_and_both_wait_for_it(broken, checks, monkeypatch):
    counted, threads, answers = self_check._compare, 4, []
    barrier = threading.Barrier(threads)

    def slow(found, *key):
        threading.Event().wait(0.2)
        counted(found, *key)

    def first_call():
        barrier.wait()
        answers.append(backends.choose("random_walk", None, *walk_inputs()))

    monkeypatch.setattr(self_check, "_compare", slow)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        running = [threading.Thread(target=first_call) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert answers == ["reference"] * threads and len(checks) == 1 and len(caught) == 1


# --- GPUs that are not there ------------------------------------------------------------------------------------------


def on_gpu(index: int, **kind) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda", index), **{"dtype": FLOAT, "requires_grad": False, **kind})


@pytest.fixture
def gpus(monkeypatch):
    """Two devices for an operator `toy`; what its checks find is read from the dictionary."""
    wrong = {}

    def compare(found, operator, backend, device, dtypes, gradients):
        reason = wrong.get((backend, device.index))
        found[:] = 0.0, 1e-4, reason, True

    monkeypatch.setattr(self_check, "_compare", compare)
    able = dict.fromkeys(("native", "triton"), lambda device, *tensors: None)
    monkeypatch.setattr(backends, "_registry", {"toy": able})
    monkeypatch.setitem(self_check.samples, "toy", lambda draw: [])
    return wrong


def test_a_gpu_is_checked_on_a_stream_of_its_own_and_unwatched(monkeypatch):
    gpu, events, watched = torch.device("cuda", 1), [], [2]

    @contextlib.contextmanager
    def current(thing):
        events.append(thing)
        yield

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: watched[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watched.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a new stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "stream", current)
    with pytest.raises(KeyError), self_check._on(gpu):
        assert events == [gpu, "a new stream of cuda:1"] and watched == [2, 0]
        raise KeyError
    assert watched == [2, 0, 2]


def test_the_next_backend_is_taken_on_that_device(gpus):
    gpus["native", 0] = "float32 forward is not finite"
    with pytest.warns(RuntimeWarning, match="native backend of toy is not used on cuda:0: self check failed"):
        assert backends.choose("toy", None, on_gpu(0)) == "triton"
    with silence():
        assert backends.choose("toy", None, on_gpu(0)) == "triton"
        assert backends.choose("toy", None, on_gpu(1)) == "native"
    gpus["triton", 0] = "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"
    with pytest.warns(RuntimeWarning, match="triton backend of toy is not used on cuda:0"):
        assert backends.choose("toy", None, on_gpu(0, requires_grad=True)) == "reference"
    with silence():
        assert backends.choose("toy", None, on_gpu(0)) == "reference"
        assert backends.choose("toy", None, on_gpu(1)) == "native"


def test_the_row_of_cuda_speaks_of_the_current_device(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpus["native", 1] = "float32 forward is not finite"
    with pytest.warns(RuntimeWarning):
        backends.choose("toy", None, on_gpu(1))
    for index, reason in ((0, ""), (1, "self check failed: float32 forward is not finite")):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: index)  # noqa: B023
        (row,) = (row for row in afa_kernels.backends() if row[:3] == ("toy", "native", "cuda"))
        assert row.reason == reason


def test_up_front_as_needed_goes_down_to_the_first_that_passes(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check = lambda index, **options: [
        (row.backend, row.device, row.dtype, row.direction, row.ok)
        for row in afa_kernels.self_check(f"cuda:{index}", ["toy"], [FLOAT], as_needed=True, **options)
    ]
    with silence():
        found = check(1)
    assert found == [("native", "cuda:1", "float32", way, True) for way in ("forward", "backward")]
    assert check(1) == []  # proven
    gpus["native", 0] = "float32 forward is not finite"
    with pytest.warns(RuntimeWarning) as caught:
        found = check(0)
    assert len(caught) == 1 and [row[0] for row in found] == ["native", "native", "triton", "triton"]
    with silence():
        assert check(0) == [] and backends.choose("toy", None, on_gpu(0)) == "triton"
        assert afa_kernels.self_check("cpu", as_needed=True) == []
        monkeypatch.setenv("AFA_BACKEND", "triton")
        self_check._proven.clear()
        assert {row[0] for row in check(1)} == {"triton"}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "amp", "expected"), [
    ("cuda", "off", [FLOAT]), ("cuda", "bf16", [FLOAT, torch.bfloat16]), ("cpu", "bf16", None),
])  # fmt: skip
def test_training_on_a_gpu_begins_with_it(device, amp, expected, monkeypatch):
    from afa_model.runs import loop as train

    events = []
    here = train.Here(0, 1, torch.device(device))
    config = dataclasses.replace(train.Config(), amp=amp)
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())  # there may be no GPU to cast for
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: config.amp == "bf16")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(train, "processes", lambda *_: contextlib.nullcontext(here))
    trainer = SimpleNamespace(progress=SimpleNamespace(iteration=0), start=lambda: None, close=lambda: None, notes=[])
    folder = contextlib.nullcontext()
    folder.config, folder.path, folder.notes, folder.accept = config, None, [], lambda **_: None
    monkeypatch.setattr(train, "RunFolder", lambda *_: folder)
    monkeypatch.setattr(train, "Trainer", lambda *_: trainer)
    monkeypatch.setattr(train, "RunLog", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "Interrupt", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(train, "_Loop", lambda *_: SimpleNamespace(run=lambda: events.append("run")))
    monkeypatch.setattr(afa_kernels, "self_check", lambda *args, **options: events.append((*args, options)))
    train.train(config)
    if expected is None:
        assert events == ["run"]
        return
    (where, operators, dtypes, options), last = events
    assert (where, dtypes, options, last) == (here.device, expected, {"as_needed": True}, "run")
    assert set(operators) <= {row.operator for row in afa_kernels.backends()}
