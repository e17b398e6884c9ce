"""What only a CUDA device can show: graphs, streams, no synchronisation, compiled code, the memory that is taken."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

import afa_kernels
from afa_kernels.core import self_check

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIX = (1, 2, 4, 8, 12, 24)


def native(operator: str) -> bool:
    rows = afa_kernels.backends()
    return any(row[:4] == (operator, "native", "cuda", True) for row in rows)


class Case:
    """An operator on inputs that stay where they are, as a CUDA graph needs them."""

    def __init__(self, operator: str, run: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
        self.operator, self.run, self.inputs = operator, run, inputs

    def __call__(self) -> torch.Tensor:
        return self.run(*self.inputs)

    def renew(self) -> None:
        for tensor in self.inputs:
            tensor.copy_(torch.rand(tensor.shape))


def loss_and_gradients(query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """The fused loss and the gradients of queries, keys and head in one vector."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, *rest[:2])]
    loss = afa_kernels.attention_affinity_loss(*leaves, rest[2], 4)[0]
    grads = torch.autograd.grad(loss, leaves)
    return torch.cat([loss.detach().flatten(), *(grad.float().flatten() for grad in grads)])


def refined_and_slope(images: torch.Tensor, scores: torch.Tensor, **options) -> torch.Tensor:
    """A dense CRF's probabilities and their gradient, side by side."""
    leaf = scores.detach().requires_grad_()
    q = afa_kernels.dense_crf(255 * images, leaf.softmax(1), 3, bi_xy_std=20, bi_rgb_std=60, **options)
    (grad,) = torch.autograd.grad(q, leaf, scores)
    return torch.cat([q.detach(), 10 * grad], 1)


def affinity_and_slope(features: torch.Tensor, kind: str) -> torch.Tensor:
    """A window of features and the gradient of its squares in one vector."""
    leaf = features.detach().requires_grad_()
    window = afa_kernels.feature_affinity(leaf, 4, kind)
    (grad,) = torch.autograd.grad(window, leaf, window.detach())
    return torch.cat([window.detach().flatten(), grad.flatten()])


def make(name: str) -> Case:
    random = lambda *shape: torch.rand(shape, device="cuda")
    present = torch.rand(2, 5, device="cuda") > 0.3
    height, width = 48, 60
    images, masks = random(2, 3, height, width), random(2, 5, height, width)
    taps = [(0, 0), (1, -2), (-3, 1), (0, 5)]
    query, key, head = random(2, 4, 300, 16), random(2, 4, 300, 16), (random(4), random(1))
    labels = torch.randint(3, (2, 15, 20), device="cuda")
    penalties = random(150, 150) / 75
    cases = {
        "par resident": Case("par", lambda x, m: afa_kernels.par(x, m, class_mask=present), images, masks),
        "par streaming": Case(
            "par", lambda x, m: afa_kernels.par(x, m, [1, 500], 3), random(2, 3, 40, 2000), random(2, 5, 40, 2000)
        ),
        "par bfloat16": Case("par", lambda x, m: afa_kernels.par(x, m.bfloat16()).float(), images, masks),
        "pamr": Case("par", lambda x, m: afa_kernels.pamr(x, m, SIX, 10), images, masks),
        "par_weights": Case("par_weights", lambda x: afa_kernels.par_weights(x), images),
        "diffuse": Case("diffuse", lambda w, m: afa_kernels.diffuse(w, m, taps, 3), random(2, 4, height, width), masks),
        "window_affinity": Case(
            "window_affinity", lambda q, k: afa_kernels.window_affinity(q, k, *head, 15, 20, 4), query, key
        ),
        "window_affinity bfloat16": Case(
            "window_affinity",
            lambda q, k: afa_kernels.window_affinity(q.bfloat16(), k.bfloat16(), *head, 15, 20, 4).float(),
            query,
            key,
        ),
        "attention_affinity_loss": Case(
            "attention_affinity_loss", lambda q, k: loss_and_gradients(q, k, *head, labels), query, key
        ),
        "attention_affinity_loss float16": Case(
            "attention_affinity_loss", lambda q, k: loss_and_gradients(q.half(), k.half(), *head, labels), query, key
        ),
        "affinity_loss": Case(
            "affinity_loss", lambda a: afa_kernels.affinity_loss(a, labels, 4)[0], random(2, 81, 15, 20)
        ),
        "affinity_from_maps": Case(
            "affinity_from_maps",
            lambda m: afa_kernels.affinity_from_maps(m, *head, 15, 20, 4),
            random(2, 4, 300, 300),
        ),
        "bilateral_filter": Case(
            "bilateral_filter", lambda x, m: afa_kernels.bilateral_filter(255 * x, m, 60, 8), images, masks
        ),
        "bilateral_filter of place": Case(
            "bilateral_filter", lambda x, m: afa_kernels.bilateral_filter(x, m, None, 3), images, masks
        ),
        "random_walk": Case(
            "random_walk", lambda a, c: afa_kernels.random_walk(a, c, 4), random(2, 81, 15, 20), random(2, 6, 15, 20)
        ),
        "path_affinity": Case("path_affinity", lambda e: afa_kernels.path_affinity(e, 5), random(2, 1, 15, 37)),
        "feature_affinity": Case(
            "feature_affinity", lambda f: affinity_and_slope(f, "cos"), random(2, 40, 15, 20) - 0.5
        ),
        "feature_affinity exp_l1": Case(
            "feature_affinity", lambda f: affinity_and_slope(f.half(), "exp_l1").float(), random(2, 40, 15, 20)
        ),
        "pcm": Case("pcm", lambda c, f: afa_kernels.pcm(c, f - 0.5), random(2, 21, 15, 20), random(2, 192, 15, 20)),
        "sinkhorn": Case("sinkhorn", lambda a: afa_kernels.sinkhorn(a, 4, symmetric=True), random(2, 81, 15, 20)),
        "lattice_filter": Case(
            "lattice_filter", lambda x, v: afa_kernels.bilateral_filter(255 * x, v, 60, 20, "lattice"), images, masks
        ),
        "lattice_filter bfloat16": Case(
            "lattice_filter",
            lambda x, v: afa_kernels.bilateral_filter(255 * x, v.bfloat16(), None, 3, "lattice").float(),
            images,
            masks,
        ),
        "dense_crf": Case("dense_crf", refined_and_slope, images, masks),
        "dense_crf matrix": Case(
            "dense_crf",
            lambda x, m: refined_and_slope(x, m, compat=penalties, normalization="after"),
            images,
            random(2, 150, height, width),
        ),
    }
    return cases[name]


NAMES = [
    "par resident",
    "par streaming",
    "par bfloat16",
    "pamr",
    "par_weights",
    "diffuse",
    "window_affinity",
    "window_affinity bfloat16",
    "attention_affinity_loss",
    "attention_affinity_loss float16",
    "affinity_loss",
    "affinity_from_maps",
    "bilateral_filter",
    "bilateral_filter of place",
    "random_walk",
    "path_affinity",
    "feature_affinity",
    "feature_affinity exp_l1",
    "pcm",
    "sinkhorn",
    "lattice_filter",
    "lattice_filter bfloat16",
    "dense_crf",
    "dense_crf matrix",
]


@pytest.fixture(params=NAMES)
def case(request):
    torch.manual_seed(0)
    made = make(request.param)
    if not native(made.operator):
        pytest.skip(f"no native CUDA kernel for {made.operator}")
    with afa_kernels.use_backend("native"):
        yield made


def test_graph_replays_on_new_inputs(case):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case()
    for _ in range(3):
        case.renew()
        graph.replay()
        assert torch.equal(out, case())


def test_the_current_stream_is_respected(case):
    """Inputs that a slow stream is still writing: a kernel on any other stream would read the old ones."""
    case.renew()
    fresh = [torch.rand_like(tensor) for tensor in case.inputs]
    want = case.run(*fresh)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for tensor, value in zip(case.inputs, fresh):
            tensor.copy_(value)
        got = case()
    side.synchronize()
    assert torch.equal(got, want)


def test_nothing_waits_for_the_device(case):
    case()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_on_every_run(case):
    first = case()
    assert all(torch.equal(case(), first) for _ in range(5))


def test_agrees_with_the_reference(case):
    got = case()
    with afa_kernels.use_backend("reference"):
        want = case()
    # Some cases round to half precision, in both.
    assert (got - want).norm() / want.norm() < 4e-3
    assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_with_inductor(mode):
    if not native("par"):
        pytest.skip("no native CUDA kernel for par")
    images, masks = torch.rand(2, 3, 33, 40, device="cuda"), torch.rand(2, 4, 33, 40, device="cuda")

    def step(images, masks):
        return afa_kernels.par(images, masks.relu(), (1, 3), 4, backend="native") * 2

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for _ in range(3):
        got = compiled(images, masks).clone()
    torch.testing.assert_close(got, step(images, masks))


def test_resident_par_takes_two_buffers_and_its_output():
    """Weights stay on chip: they would be 48 floats a pixel, the two mask buffers and the output are 3 * 3."""
    if not native("par"):
        pytest.skip("no native CUDA kernel for par")
    images, masks = torch.rand(2, 3, 160, 160, device="cuda"), torch.rand(2, 3, 160, 160, device="cuda")
    afa_kernels.par(images, masks, backend="native")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    afa_kernels.par(images, masks, backend="native")
    taken = torch.cuda.max_memory_allocated() - before
    weights = 48 * 4 * images.shape[0] * 160 * 160
    assert taken < 4 * masks.numel() * 4 + 2**20 < weights


# --- the first call proves itself -------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_known(monkeypatch):
    """As in a new process; the checks that are made gather in the list."""
    made, compare = [], self_check._compare

    def counted(found, *key):
        made.append(key)
        compare(found, *key)

    monkeypatch.setattr(self_check, "_proven", set())
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.setattr(self_check, "_compare", counted)
    monkeypatch.delenv("AFA_SELF_CHECK", raising=False)
    monkeypatch.delenv("AFA_BACKEND", raising=False)
    return made


@pytest.mark.parametrize("backend", ["native", pytest.param("triton", marks=pytest.mark.slow)])  # compiles for long
@pytest.mark.parametrize("operator", sorted(self_check.samples))
def test_every_row_of_the_self_check_passes(operator, backend, nothing_is_known):
    able = any(row[:4] == (operator, backend, "cuda", True) for row in afa_kernels.backends())
    table = afa_kernels.self_check("cuda", [operator], backends=[backend])
    print(table)  # with its milliseconds, of which 50 are meant to be enough
    assert [row for row in table if not row.ok] == [] and len(table) == 6 * able


def test_a_check_is_made_at_the_first_call_only_and_as_the_caller_never_sees(nothing_is_known):
    if not native("par"):
        pytest.skip("no native CUDA kernel for par")
    images, masks = torch.rand(1, 3, 9, 10, device="cuda"), torch.rand(1, 2, 9, 10, device="cuda")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()), torch.inference_mode():
            afa_kernels.par(images, masks)
            afa_kernels.par(images, masks)
            assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(nothing_is_known) == 1
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.cuda.get_rng_state())


def test_tf32_and_deterministic_algorithms_are_no_deviation(nothing_is_known):
    allowed = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    try:
        assert all(row.ok for row in afa_kernels.self_check("cuda", dtypes=[torch.float32], as_needed=True))
    finally:
        torch.backends.cudnn.allow_tf32 = allowed[0]
        torch.set_float32_matmul_precision(allowed[1])


@pytest.mark.parametrize("warm", [True, False])
def test_a_first_call_within_a_capture(warm, nothing_is_known):
    """It is not checked there; the warm-up that PyTorch asks for has been."""
    if not native("random_walk"):
        pytest.skip("no native CUDA kernel for random_walk")
    inputs = torch.rand(1, 81, 15, 20, device="cuda"), torch.rand(1, 3, 15, 20, device="cuda")
    with mock.patch.dict("os.environ", AFA_SELF_CHECK=str(int(warm))):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            afa_kernels.random_walk(*inputs, 4)
        torch.cuda.current_stream().wait_stream(side)
    assert len(nothing_is_known) == warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = afa_kernels.random_walk(*inputs, 4)
    assert len(nothing_is_known) == warm
    graph.replay()
    assert torch.equal(out, afa_kernels.random_walk(*inputs, 4))
    assert len(nothing_is_known) == 1
