"""A backend proves itself before it is used: what is compared, what comes of a kernel that is wrong, the table."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from support.common import DEVICE, relative_error
from support.cuda_emulator import build
from support.cuda_emulator.operators import emulated
from support.fuzzing import has_cuda_source
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

import afa_kernels
from afa_kernels import random_walk
from afa_kernels.core import backends, native_module, self_check
from afa_kernels.ops.affinity import native as affinity_native
from afa_kernels.ops.random_walk import native as random_walk_native

pytestmark = [
    pytest.mark.skipif(native_module.native is None, reason="no native module"),
    pytest.mark.usefixtures("nothing_is_known"),
]


# --- a kernel that is right -------------------------------------------------------------------------------------------


def test_every_operator_has_a_case_that_its_kernels_pass(checks):
    table = afa_kernels.self_check("cpu")
    rows = {(row.operator, row.dtype, row.direction) for row in table}
    operators = {row.operator for row in afa_kernels.backends()}
    assert rows == {(op, kind, way) for op in operators for kind in ("float32", "float16", "bfloat16")
                    for way in ("forward", "backward")}  # fmt: skip
    assert {(row.backend, row.device) for row in table} == {("native", "cpu")}
    for row in table:
        assert row.ok and row.reason == "" and row.milliseconds > 0, row
        assert row.tolerance == {"float32": 1e-4, "float16": 2**-10, "bfloat16": 2**-7}[row.dtype]
        # There is room: for float32 more than the odd rounding, for the others the rounding of the result.
        assert row.error < row.tolerance / (20 if row.dtype == "float32" else 2), row
        assert row.error > 0 or row.operator == "path_affinity", row  # whose maxima are exact


def test_cases_differentiate_every_input_and_go_where_kernels_have_gone_wrong():
    def draw(*shape):
        return torch.rand(shape)

    for operator, samples in self_check.samples.items():
        made = samples(draw)
        floats = {name for sample in made for name, value in {**sample.tensors, **sample.options}.items()
                  if isinstance(value, torch.Tensor) and value.is_floating_point()}  # fmt: skip
        assert floats == {name for sample in made for name in sample.gradients}, operator
    flat, mixed = self_check.odd_image(draw, 8, 19)
    for region, value in ((flat, flat[:, :1, :1]), (mixed[:, :4, :9], 0.3), (mixed[:, 4:, 9:], 1.0)):
        assert ((region != torch.as_tensor(value)).sum((1, 2)) == 1).all()


def test_cases_call_every_kernel(monkeypatch):
    native, called = native_module.native, set()
    kernels = {name for name in dir(native) if name.endswith("_cpu") and name != "openmp_cpu"}
    for name in kernels:
        kernel = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, n=name, k=kernel: called.add(n) or k(*args))
    assert all(row.ok for row in afa_kernels.self_check("cpu", dtypes=[FLOAT]))
    assert called == kernels


@pytest.mark.cuda_emulator
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("operator", sorted(filter(has_cuda_source, self_check.samples)))
def test_cases_are_passed_by_the_emulated_cuda_kernels(operator):
    """Where the tolerances have to hold: on tensor cores, with weights and gradients in half precision."""
    with emulated(build.load(build.kinds()[-1])):  # products fused into sums, as on a GPU
        table = afa_kernels.self_check("cpu", [operator])
    assert [row for row in table if row.error > row.tolerance / 2] == [] and len(table) == 6


def test_a_call_is_checked_once_for_each_dtype_and_direction(checks):
    with silence():
        for kind, expected in (
            ({}, (FLOAT, FLOAT, False)),
            ({"dtype": torch.bfloat16}, (torch.bfloat16, torch.bfloat16, False)),
            ({"dtype": torch.float16, "gradients": True}, (torch.float16, torch.float16, True)),
            ({"gradients": True}, (FLOAT, FLOAT, True)),
        ):
            walk(**kind)
            assert checks.pop() == ("random_walk", "native", CPU, expected[:2], expected[2]) and not checks
            walk(**kind)
        walk(dtype=torch.float16)  # came with its backward
        affinity, cams = walk_inputs()
        random_walk(affinity.bfloat16(), cams, 1)
        assert checks.pop()[3] == (torch.bfloat16, FLOAT)
        random_walk(affinity.bfloat16().requires_grad_(), cams, 1)  # one gradient is rounded, the other is not
        assert checks.pop()[3:] == ((torch.bfloat16, FLOAT), True)
        with torch.no_grad():
            walk(dtype=torch.bfloat16, gradients=True)
    assert not checks


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_for_one_of_two_tensors_asks_for_the_backward(which, checks):
    inputs = walk_inputs()
    inputs[which].requires_grad_()
    random_walk(*inputs, 1)
    assert [key[-1] for key in checks] == [True]


def test_a_gradient_for_the_head_alone_asks_for_the_backward(checks, monkeypatch):
    query, labels = torch.rand(1, 1, 6, 4), torch.zeros(1, 2, 3, dtype=torch.long)
    head, bias = torch.rand(1, requires_grad=True), torch.rand(1)
    for name, call in {
        "window_affinity": lambda *head: afa_kernels.window_affinity(query, query, *head, 2, 3, 1),
        "affinity_from_maps": lambda *head: afa_kernels.affinity_from_maps(query @ query.mT, *head, 2, 3, 1),
        "attention_affinity_loss": lambda *head: afa_kernels.attention_affinity_loss(query, query, *head, labels, 1),
    }.items():
        for arguments, asked in (((bias, bias), False), ((head, bias), True), ((bias, head), True)):
            self_check._proven.clear()
            call(*arguments)
            assert [(key[0], key[-1]) for key in checks] == [(name, asked)]
            checks.clear()


def test_the_cpu_need_not_prove_itself(monkeypatch):
    monkeypatch.setattr(self_check, "_compare", None)
    break_kernel(monkeypatch, random_walk_native, "random_walk", lambda out: out * 1.01)
    with silence():
        assert relative_error(walk(), walk("reference")) > 5e-3
    assert self_check.proven("random_walk", "native", CPU, FLOAT, FLOAT, False)  # nothing is asked again


def test_a_gpu_has_to():
    assert all(self_check.concerns(backend, torch.device("cuda", 1)) for backend in ("native", "triton"))
    assert not self_check.concerns("native", CPU)


# --- a kernel that is wrong -------------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_named_once_and_the_reference_runs(broken, checks):
    with pytest.warns(RuntimeWarning, match=f"native backend of random_walk is not used on cpu: {broken}") as caught:
        out = walk()
    assert len(caught) == 1 and len(checks) == 1
    with silence():
        assert torch.equal(out, walk("reference")) and torch.equal(walk(), out)
        walk(dtype=torch.bfloat16)
        walk(gradients=True)
    assert len(checks) == 1  # ruled out as a whole
    rows = {row.operator: row for row in afa_kernels.backends() if row.backend == "native" and row.device == "cpu"}
    assert not rows["random_walk"].available and rows["par"].available
    assert re.fullmatch(f"{broken}.*", rows["random_walk"].reason)


def test_a_wrong_kernel_that_is_asked_for_is_an_error(broken, checks, monkeypatch):
    said = f"backend: native cannot run random_walk on cpu: {broken}"
    with pytest.warns(RuntimeWarning) as caught, pytest.raises(ValueError, match=said):
        walk("native")
    assert len(caught) == 1
    with silence():
        with afa_kernels.use_backend("native"), pytest.raises(ValueError, match=f"use_backend: native .*{broken}"):
            walk()
        monkeypatch.setenv("AFA_BACKEND", "native")
        with pytest.raises(ValueError, match=f"AFA_BACKEND: native cannot run random_walk on cpu: {broken}"):
            walk()
    assert len(checks) == 1


def test_a_wrong_gradient_shows_when_gradients_are_asked_for_and_counts_for_all(checks, monkeypatch):
    gradient = random_walk_native.random_walk_affinity_gradient
    break_kernel(monkeypatch, random_walk_native, "random_walk_affinity_gradient", lambda out: out * 1.01)
    with silence():
        walk()
        assert backends.choose("random_walk", None, *walk_inputs()) == "native"
    reason = r"float32 backward differs from the reference by 0\.01 \(allowed 0\.0001\), the gradient of affinity in"
    with pytest.warns(RuntimeWarning, match=reason):
        affinity, cams = walk_inputs(gradients=True)
        random_walk(affinity, cams, 1).sum().backward()
    again = walk_inputs(gradients=True)
    random_walk(*again, 1, backend="reference").sum().backward()
    assert torch.equal(affinity.grad, again[0].grad)
    with silence():
        assert backends.choose("random_walk", None, *walk_inputs()) == "reference"
    monkeypatch.setattr(random_walk_native, "random_walk_affinity_gradient", gradient)
    assert backends.choose("random_walk", None, *walk_inputs()) == "reference"  # one verdict for the process


def test_a_wrong_forward_shows_also_where_its_gradient_is_right(checks, monkeypatch):
    kernel = affinity_native.affinity_loss
    monkeypatch.setattr(affinity_native, "affinity_loss", lambda *args: (1.01 * kernel(*args)[0], *kernel(*args)[1:]))
    window, labels = torch.rand(1, 9, 2, 3, requires_grad=True), torch.zeros(1, 2, 3, dtype=torch.long)
    with pytest.warns(RuntimeWarning, match="float32 forward differs from the reference by 0.01 .*, result 0 of"):
        afa_kernels.affinity_loss(window, labels, 1)


@pytest.mark.parametrize(("dtype", "factor"), [(FLOAT, 1 + 2e-4), (torch.float16, 1.0015), (torch.bfloat16, 1.01)])
def test_what_is_not_rounding_is_found_in_every_dtype(checks, monkeypatch, dtype, factor):
    """In float32 TF32 would be, at 5e-4; half precision shows what is twice its own rounding."""
    kind = str(dtype).removeprefix("torch.")

    def scaled(affinity, cams, *rest):
        return kernel(affinity, cams.float() * factor, *rest).to(cams.dtype)

    kernel = random_walk_native.random_walk
    monkeypatch.setattr(random_walk_native, "random_walk", scaled)
    with pytest.warns(RuntimeWarning, match=f"{kind} forward differs"):
        walk(dtype=dtype)


def test_a_count_has_to_be_exact(checks, monkeypatch):
    def one_more(*inputs):
        loss, pos_count, neg_count = kernel(*inputs)
        return loss, pos_count, neg_count + 1

    kernel = affinity_native.affinity_loss
    monkeypatch.setattr(affinity_native, "affinity_loss", one_more)
    for dtype in (FLOAT, torch.bfloat16):
        self_check._failures.clear()
        with pytest.warns(RuntimeWarning, match="forward differs from the reference by .*, result 2 of affinity_loss"):
            afa_kernels.affinity_loss(torch.rand(1, 9, 2, 3).to(dtype), torch.zeros(1, 2, 3, dtype=torch.long), 1)


def test_a_wrong_shape_is_an_error_too(checks, monkeypatch):
    break_kernel(monkeypatch, random_walk_native, "random_walk", lambda out: out[:1].clone())
    with pytest.warns(RuntimeWarning, match=r"ValueError: the result has shape \(1, 3, 9, 11\), the reference \(2, 3"):
        walk()


def test_a_wrong_dtype_rules_out_the_right_ones(monkeypatch, checks):
    kernel = random_walk_native.random_walk
    wrong = lambda affinity, *rest: kernel(affinity, *rest) * (1.01 if affinity.dtype == FLOAT else 1)
    monkeypatch.setattr(random_walk_native, "random_walk", wrong)
    with pytest.warns(RuntimeWarning):
        table = afa_kernels.self_check("cpu", ["random_walk"])
    assert {row.dtype for row in table if not row.ok} == {"float32"}
    assert self_check.failure("random_walk", "native", CPU).startswith("self check failed: float32 forward ")
    assert backends.choose("random_walk", None, *walk_inputs(torch.bfloat16)) == "reference"


@pytest.mark.parametrize("said", ["0", "off", "False", "NO"])
def test_it_can_be_turned_off(said, broken, checks, monkeypatch):
    monkeypatch.setenv("AFA_SELF_CHECK", said)
    with silence(), contextlib.suppress(RuntimeError):
        walk()
    assert not checks
    monkeypatch.setenv("AFA_SELF_CHECK", "1")
    with pytest.warns(RuntimeWarning):
        walk()
    monkeypatch.setenv("AFA_SELF_CHECK", said)
    assert backends.choose("random_walk", None, *walk_inputs()) == "native"
    assert all(row.available for row in afa_kernels.backends() if row[1:3] == ("native", "cpu"))
    assert not afa_kernels.self_check("cpu", ["random_walk"], as_needed=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("par_cuda: CUDA: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_what_says_nothing_about_the_kernel_is_no_verdict(error, checks, monkeypatch):
    def fail(*_):
        raise error

    kernel = random_walk_native.random_walk
    monkeypatch.setattr(random_walk_native, "random_walk", fail)
    with silence():
        for _ in range(2):
            assert backends.choose("random_walk", None, *walk_inputs()) == "native"
        assert len(checks) == 2
        monkeypatch.setattr(random_walk_native, "random_walk", kernel)
        walk(), walk()
    assert len(checks) == 3


# --- the public function ----------------------------------------------------------------------------------------------


def test_all_rows_come_also_after_one_has_failed(broken, checks):
    with pytest.warns(RuntimeWarning) as caught:
        table = afa_kernels.self_check("cpu", ["random_walk", "par_weights"])
    assert len(caught) == 1 and len(table) == 12 and len(checks) == 12
    assert not any(row.ok for row in table if row.operator == "random_walk")
    assert all(row.ok for row in table if row.operator == "par_weights")
    printed = str(table).splitlines()
    assert len(printed) == 13 and all("no: self check failed" in line for line in printed if "random_walk" in line)
    assert printed[-1].split()[:5] == ["par_weights", "native", "cpu", "bfloat16", "backward"]
    assert printed[-1].split()[8:] == ["yes"]


def test_a_second_look_replaces_the_first(checks, monkeypatch):
    kernel = random_walk_native.random_walk
    break_kernel(monkeypatch, random_walk_native, "random_walk", lambda out: out * 1.01)
    with pytest.warns(RuntimeWarning):
        walk()
    monkeypatch.setattr(random_walk_native, "random_walk", kernel)
    with silence():
        assert all(row.ok for row in afa_kernels.self_check("cpu", ["random_walk"]))
        assert backends.choose("random_walk", None, *walk_inputs()) == "native"
        checks.clear()
        walk(), walk(gradients=True), walk(dtype=torch.bfloat16)
    assert not checks
    break_kernel(monkeypatch, random_walk_native, "random_walk", lambda out: out * 1.01)
    with pytest.warns(RuntimeWarning):
        afa_kernels.self_check("cpu", ["random_walk"], [FLOAT])
    assert backends.choose("random_walk", None, *walk_inputs(torch.bfloat16)) == "reference"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"device": "cuda:99"}, "device must be among cpu.*got cuda:99"),
        ({"device": "nonsense"}, "device must be among cpu.*got nonsense"),
        ({"operators": "crf"}, "operators must be among .*par.*got crf"),
        ({"operators": ["par", "crf"]}, "operators must be among .*par.*got crf"),
        ({"backends": ["native", "reference"]}, "backends must be among native, triton, got reference"),
        ({"dtypes": [torch.float64]}, "dtypes must be among torch.float32.*got torch.float64"),
    ],
)
def test_what_is_not_known_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        afa_kernels.self_check(**arguments)


def test_where_only_the_reference_runs_there_is_nothing_to_check(monkeypatch):
    monkeypatch.setitem(backends._registry, "par", {"native": lambda *_: "none", "triton": lambda *_: "none"})
    assert str(afa_kernels.self_check("cpu", ["par"])) == "nothing to check: only the reference can run"


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton was imported without its interpreter")
def test_triton_is_checked_where_it_can_run(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    table = afa_kernels.self_check("cpu", ["par_weights"], [FLOAT])
    assert [(row.backend, row.direction, row.ok) for row in table] == [
        (backend, way, True) for backend in ("native", "triton") for way in ("forward", "backward")
    ]
    assert {row.backend for row in afa_kernels.self_check("cpu", ["par_weights"], [FLOAT], ["native"])} == {"native"}


def test_a_row_shows_the_error_of_its_direction(monkeypatch):
    def slightly_wrong(*args):
        loss, *counts = kernel(*args)
        return loss * (1 + 5e-5), *counts

    kernel = affinity_native.affinity_loss
    break_kernel(monkeypatch, random_walk_native, "random_walk_affinity_gradient", lambda out: out * (1 + 5e-5))
    monkeypatch.setattr(affinity_native, "affinity_loss", slightly_wrong)
    right, wrong = (0, 1e-6), (4e-5, 6e-5)
    for operator, expected in (("random_walk", (right, wrong)), ("affinity_loss", (wrong, right))):
        for row, (low, high) in zip(afa_kernels.self_check("cpu", [operator], [FLOAT]), expected, strict=True):
            assert row.ok and low < row.error < high, row
