"""Every operator on inputs nobody chose: shapes, strides, dtypes, taps and extreme values, against the reference.

A few cases per operator by default; ``AFA_FUZZ=1`` tries 20,000 of each, ``AFA_FUZZ=N`` N of each. The CUDA sources are
fuzzed too: on the device of AFA_TEST_DEVICE=cuda, and emulated on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from conftest import DEVICE, available
from cuda_emulator import build
from cuda_emulator.operators import emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import afa_kernels
from afa_kernels import _native_module

WISH = int(os.environ.get("AFA_FUZZ", "0"))
CASES = 20_000 if WISH == 1 else WISH or 15
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=WISH == 0,
    suppress_health_check=list(HealthCheck),
)
pytestmark = [pytest.mark.timeout(0 if WISH else 600)]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXTREMES = [0.0, 1e-30, 1e30, math.nan, math.inf, -math.inf]
# float32's squares overflow beyond 1e19; images are in 0..1, so that far there is nothing to agree on.
IMAGE_EXTREMES = [0.0, 1.0, 1e-30, 1e15, math.nan, math.inf]


def backends(operator: str) -> list[str]:
    """The backends to fuzz: all that run here but the reference and Triton's interpreter (seconds a case)."""
    fast = [name for name in available(operator)[1:] if DEVICE == "cuda" or name != "triton"]
    return [*fast, "emulated"] if has_cuda_source(operator) and DEVICE == "cpu" and build.compiler() else fast


def has_cuda_source(operator: str) -> bool:
    return any(f'"{operator}_cuda"' in path.read_text() for path in (build.CSRC / "bind").glob("*.cpp"))


@contextlib.contextmanager
def running(backend: str, generator: torch.Generator):
    """Calls with ``backend=None`` run there; emulated on a device of random size, so that every plan is met."""
    if backend != "emulated":
        with afa_kernels.use_backend(backend):
            yield
        return
    with emulated(build.load(), order=int(torch.randint(3, (), generator=generator))) as emulator:
        processors, kilobytes = (int(torch.randint(1, limit, (), generator=generator)) for limit in (9, 228))
        emulator.set_device(processors, kilobytes * 1024)
        yield


# --- inputs -----------------------------------------------------------------------------------------------------------


class Draw:
    """What hypothesis chooses: sizes and switches by name, and a seed for the elements."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))

    def integer(self, name: str, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high), label=name)

    def choice(self, name: str, values: list):
        return self.data.draw(st.sampled_from(values), label=name)

    def flag(self, name: str) -> bool:
        return self.data.draw(st.booleans(), label=name)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def tensor(
        self, name: str, *shape: int, dtype: torch.dtype, extremes: list[float], low: float = 0.0
    ) -> torch.Tensor:
        """Uniform in low..1, a few elements extreme, in some memory layout."""
        values = low + (1 - low) * self.random(*shape)
        if self.data.draw(st.integers(0, 3), label=f"{name} has extremes") == 0:
            value = self.choice(f"extreme of {name}", extremes)
            share = self.choice(f"share in {name}", [0.02, 0.5, 1.0])
            values[self.random(*shape) < share] = value
        return self.layout(name, values.to(dtype).to(DEVICE))

    def layout(self, name: str, values: torch.Tensor) -> torch.Tensor:
        kind = self.choice(f"layout of {name}", ["contiguous", "channels_last", "swapped", "spaced", "shifted"])
        if kind == "channels_last" and values.dim() == 4:
            return values.to(memory_format=torch.channels_last)
        if kind == "swapped":
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "spaced":
            return torch.stack([values, torch.full_like(values, math.nan)], -1)[..., 0]
        if kind == "shifted":  # not on a 16-byte boundary, and rows that do not touch
            wide = torch.full(
                (*values.shape[:-1], values.shape[-1] + 3), math.nan, dtype=values.dtype, device=values.device
            )
            wide[..., 1:-2] = values
            return wide[..., 1:-2]
        return values

    def class_mask(self, batch: int, channels: int) -> torch.Tensor | None:
        return (self.random(batch, channels) > 0.4).to(DEVICE) if self.flag("class_mask") else None

    def offsets(self, count: int) -> list[tuple[int, int]]:
        reach = self.choice("reach", [1, 5, 50])
        drawn = torch.randint(-reach, reach + 1, (count, 2), generator=self.generator)
        return [(int(dy), int(dx)) for dy, dx in drawn]


def agree(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, tolerance: float) -> None:
    """Finite where the reference is, and as near as ``tolerance`` times the size of what was summed.

    Where the sum's size is past what the dtype holds the order of the sum decides between finite and not.
    """
    assert got.shape == want.shape and got.dtype == want.dtype
    rounding = 0.0 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
    limit = torch.finfo(want.dtype).max / 16
    got, want, bound = got.double().cpu(), want.double().cpu(), bound.double().cpu().nan_to_num(math.inf, math.inf)
    finite = want.isfinite()
    differs = (got.isfinite() != finite) & (~finite | (bound < limit))
    sure = ~finite & ~(bound.isfinite() & (bound >= limit))
    assert not (differs & (finite | sure)).any(), "finite where the reference is not, or the other way round"
    both = finite & got.isfinite()
    error = (got - want).abs()[both]
    allowed = (tolerance + rounding) * bound[both] + rounding * want.abs()[both] + 1e-30
    if want.dtype == torch.float16:
        allowed = allowed + 6e-8  # its smallest step
    assert (error <= allowed).all(), f"off by {float((error / allowed).max()):.3g} times what is allowed"


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends("diffuse"))
@fuzz
@given(st.data())
def test_diffuse(backend, data):
    draw = Draw(data)
    shape = [draw.integer(*limits) for limits in (("B", 1, 3), ("C", 1, 9), ("H", 1, 20), ("W", 1, 40))]
    taps = draw.choice("T", [1, 2, 3, 8, 9, 48, 66])
    batch, channels, height, width = shape
    weights = draw.tensor(
        "weights", batch, taps, height, width, dtype=draw.choice("weights", DTYPES), extremes=EXTREMES, low=-1
    )
    masks = draw.tensor("masks", *shape, dtype=draw.choice("masks", DTYPES), extremes=EXTREMES, low=-1)
    present, border = draw.class_mask(batch, channels), draw.choice("border", ["replicate", "zero"])
    offsets, num_iter = draw.offsets(taps), draw.integer("num_iter", 0, 3)
    grad = draw.random(*shape).to(DEVICE, masks.dtype)

    def run(weights, masks, grad):
        leaf = masks.detach().clone().requires_grad_()
        out = afa_kernels.diffuse(weights, leaf, offsets, num_iter, border, present)
        out.backward(grad)
        return out.detach(), leaf.grad

    with running(backend, draw.generator):
        got = run(weights, masks, grad)
    with afa_kernels.use_backend("reference"):
        want = run(weights, masks, grad)
        bound = run(weights.double().abs(), masks.double().abs(), grad.double())
    for pair in zip(got, want, bound):
        agree(*pair, 1e-5)


@pytest.mark.parametrize("backend", backends("par"))
@pytest.mark.parametrize("operator", [afa_kernels.par, afa_kernels.pamr])
@fuzz
@given(st.data())
def test_par(backend, operator, data):
    draw = Draw(data)
    shape = [draw.integer(*limits) for limits in (("B", 1, 3), ("C", 1, 9), ("H", 1, 24), ("W", 1, 40))]
    batch, channels, height, width = shape
    images = draw.tensor(
        "images", batch, 3, height, width, dtype=draw.choice("images", DTYPES), extremes=IMAGE_EXTREMES
    )
    masks = draw.tensor("masks", *shape, dtype=draw.choice("masks", DTYPES), extremes=EXTREMES)
    dilations = draw.choice("dilations", [[1], [2, 1], [1, 2, 4, 8, 12, 24], [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    num_iter, present = draw.integer("num_iter", 0, 4), draw.class_mask(batch, channels)

    def run(images, masks, backend=None):
        return operator(images, masks, dilations, num_iter, class_mask=present, backend=backend)

    with running(backend, draw.generator):
        got = run(images, masks)
    want, bound = run(images, masks, "reference"), run(images.double(), masks.double().abs(), "reference")
    if masks.dtype == torch.bfloat16:
        # On CUDA their weights are in half precision: 2^-11 an iteration, below the masks' own rounding, and steps of
        # 6e-8, which show where next to nothing is summed.
        bound = bound + 1e-4 * masks.double().abs().nan_to_num(0, 0).max()
    agree(got, want, bound, 2e-4)


@pytest.mark.parametrize("backend", backends("par_weights"))
@pytest.mark.parametrize("operator", [afa_kernels.par_weights, afa_kernels.pamr_weights])
@fuzz
@given(st.data())
def test_par_weights(backend, operator, data):
    draw = Draw(data)
    shape = [draw.integer("B", 1, 2), 3, draw.integer("H", 1, 24), draw.integer("W", 1, 40)]
    images = draw.tensor("images", *shape, dtype=draw.choice("images", DTYPES), extremes=IMAGE_EXTREMES)
    dilations = draw.choice("dilations", [[1], [2, 1], [1, 2, 4, 8, 12, 24], [50]])
    with running(backend, draw.generator):
        got = operator(images, dilations)
    want = operator(images, dilations, backend="reference")
    agree(got, want, torch.ones_like(want), 2e-5)


@pytest.mark.parametrize("backend", backends("random_walk"))
@fuzz
@given(st.data())
def test_random_walk(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 8), draw.integer("h", 1, 14), draw.integer("w", 1, 20)
    batch, channels, taps = draw.integer("B", 1, 2), draw.integer("C", 1, 6), (2 * radius + 1) ** 2
    extremes = [0.0, 1e-30, 1.0, math.nan]
    affinity = draw.tensor(
        "affinity", batch, taps, height, width, dtype=draw.choice("affinity", DTYPES), extremes=extremes
    )
    cams = draw.tensor("cams", batch, channels, height, width, dtype=draw.choice("cams", DTYPES), extremes=EXTREMES)
    options = (
        radius,
        draw.choice("power", [1.0, 2.0, 2.5]),
        draw.integer("num_steps", 0, 3),
        draw.choice("eps", [0.1, 1e-4]),
    )
    present = draw.class_mask(batch, channels)
    with running(backend, draw.generator):
        got = afa_kernels.random_walk(affinity, cams, *options, class_mask=present)
    with afa_kernels.use_backend("reference"):
        want = afa_kernels.random_walk(affinity, cams, *options, class_mask=present)
        bound = afa_kernels.random_walk(affinity.double(), cams.double().abs(), *options, class_mask=present)
    agree(got, want, bound, 5e-5)


def attention(draw: Draw) -> tuple[list[torch.Tensor], int, int, int]:
    """Query, key and head, and the grid they belong to."""
    radius, height, width = draw.integer("radius", 0, 5), draw.integer("h", 1, 9), draw.integer("w", 1, 12)
    batch, heads, depth = draw.integer("B", 1, 2), draw.integer("heads", 1, 5), draw.choice("d", [1, 3, 8, 16, 33])
    dtype, shape = draw.choice("dtype", DTYPES), (batch, heads, height * width, depth)
    extremes = [0.0, 1e-30, 1e3, math.nan]
    query, key = (draw.tensor(name, *shape, dtype=dtype, extremes=extremes, low=-1) for name in ("query", "key"))
    head = [(draw.random(count) - 0.5).to(DEVICE, dtype) for count in (heads, 1)]
    return [query, key, *head], height, width, radius


@pytest.mark.parametrize("backend", backends("window_affinity"))
@fuzz
@given(st.data())
def test_window_affinity(backend, data):
    draw = Draw(data)
    tensors, height, width, radius = attention(draw)
    with running(backend, draw.generator):
        got = afa_kernels.window_affinity(*tensors, height, width, radius)
    with afa_kernels.use_backend("reference"):
        want = afa_kernels.window_affinity(*tensors, height, width, radius)
        scale = afa_kernels.window_affinity(*(t.double() for t in tensors), height, width, radius)
    # A sigmoid's error is a quarter of its argument's, which is a sum of heads * d products.
    query, key, head, _ = (tensor.double().nan_to_num(0) for tensor in tensors)
    size = 1 + 2 * float((query.abs().max() * key.abs().max() * head.abs().sum()) * query.shape[-1])
    agree(got, want, torch.full_like(scale, min(size, 1e6)), 2e-6)


@pytest.mark.parametrize("backend", backends("attention_affinity_loss"))
@fuzz
@given(st.data())
def test_attention_affinity_loss(backend, data):
    draw = Draw(data)
    tensors, height, width, radius = attention(draw)
    tensors = [tensor.nan_to_num(0).clamp(-4, 4) for tensor in tensors]
    labels = torch.randint(
        draw.integer("classes", 1, 4), (tensors[0].shape[0], height, width), generator=draw.generator
    )
    labels[draw.random(*labels.shape) < draw.choice("ignored", [0.0, 0.2, 1.0])] = 255
    labels = labels.to(DEVICE)

    def run(tensors):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        loss, positive, negative = afa_kernels.attention_affinity_loss(*leaves, labels, radius)
        loss.backward()
        return (loss.detach(), positive, negative), [leaf.grad for leaf in leaves]

    with running(backend, draw.generator):
        got, got_grads = run(tensors)
    with afa_kernels.use_backend("reference"):
        want, want_grads = run(tensors)
        _, exact = run([tensor.double() for tensor in tensors])
    assert [float(count) for count in got[1:]] == [float(count) for count in want[1:]]
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    precision = torch.finfo(tensors[0].dtype).eps
    for mine, theirs, truth in zip(got_grads, want_grads, exact):
        error, usual = ((grad.double() - truth).norm() for grad in (mine, theirs))
        assert error <= 3 * usual + (1e-4 + 4 * precision) * truth.norm() + 1e-6


@pytest.mark.parametrize("backend", backends("affinity_loss"))
@fuzz
@given(st.data())
def test_affinity_loss(backend, data):
    draw = Draw(data)
    radius, height, width = draw.integer("radius", 0, 6), draw.integer("h", 1, 12), draw.integer("w", 1, 20)
    shape = draw.integer("B", 1, 3), (2 * radius + 1) ** 2, height, width
    affinity = draw.tensor("affinity", *shape, dtype=draw.choice("dtype", DTYPES), extremes=[0.0, 1.0, 1e-30])
    labels = torch.randint(draw.integer("classes", 1, 4), (shape[0], height, width), generator=draw.generator)
    labels[draw.random(*labels.shape) < draw.choice("ignored", [0.0, 0.2, 1.0])] = 255
    with running(backend, draw.generator):
        got = afa_kernels.affinity_loss(affinity, labels.to(DEVICE), radius)
    with afa_kernels.use_backend("reference"):
        want = afa_kernels.affinity_loss(affinity, labels.to(DEVICE), radius)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    assert [float(count) for count in got[1:]] == [float(count) for count in want[1:]]


# --- the compiled entry points ----------------------------------------------------------------------------------------


def nowhere(*shape: int) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """A contiguous float32 tensor as the entry points take it, at no address."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return 0, 0, shape, tuple(strides)


def modules() -> list[str]:
    cpu = [name for name in ("native",) if name in available("par")]
    return [*cpu, "emulated"] if build.compiler() and DEVICE == "cpu" else cpu


@pytest.mark.parametrize("module", modules())
@fuzz
@given(st.data())
def test_workspace_sizes_are_64_bit(module, data):
    """Sizes whose products pass 2^31 and 2^32: nothing wraps, and more pixels or channels never need less."""
    draw = Draw(data)
    batch, channels = draw.integer("B", 1, 200), draw.integer("C", 1, 2000)
    height, width = draw.integer("H", 1, 60_000), draw.integer("W", 1, 60_000)
    dilations = draw.choice("dilations", [[1], [1, 2, 4, 8, 12, 24]])
    half, num_iter = draw.flag("half weights"), draw.integer("num_iter", 3, 20)
    taps, pixels = 8 * len(dilations), height * width
    offsets = [0] * (2 * taps)

    def sizes(height: int, channels: int) -> tuple[int, int]:
        images, masks = nowhere(batch, 3, height, width), nowhere(batch, channels, height, width)
        weights = nowhere(batch, taps, height, width)
        if module == "native":
            native = _native_module.native
            return native.par_cpu_workspace(images, masks, dilations, 2), native.diffuse_cpu_workspace(
                weights, masks, offsets, 2
            )
        native, transpose = build.load().native, True  # the adjoint always streams
        refine = native.par_cuda_workspace(images, masks, dilations, num_iter, transpose, half, 0)
        return refine, native.diffuse_cuda_workspace(weights, masks, offsets, num_iter, transpose, 0)

    refine, diffuse = sizes(height, channels)
    if module == "native":  # one image at a time: its weights and two copies of its masks, in float32
        least = 4 * pixels * (taps + 2 * channels)
        assert refine >= least and diffuse >= least
    else:
        masks, weights = 8 * batch * channels * pixels, (2 if half else 4) * batch * taps * pixels
        assert diffuse >= masks and refine >= masks + weights
    assert all(more >= less for more, less in zip(sizes(height + 1, channels), (refine, diffuse)))
    assert all(more >= less for more, less in zip(sizes(height, channels + 1), (refine, diffuse)))
