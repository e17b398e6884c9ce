"""What the fuzz tests share: which backends, how many cases, inputs nobody chose, and when two results agree.

A few cases per operator by default; ``AFA_FUZZ=1`` tries 20,000 of each, ``AFA_FUZZ=N`` N of each. The CUDA sources are
fuzzed too: on the device of AFA_TEST_DEVICE=cuda, and emulated on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import afa_kernels
from support.common import DEVICE, available
from support.cuda_emulator import build
from support.cuda_emulator.operators import emulated
from support.par_cases import SCENES, scene

WISH = int(os.environ.get("AFA_FUZZ", "0"))
CASES = 20_000 if WISH == 1 else WISH or 15
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=WISH == 0,
    suppress_health_check=list(HealthCheck),
)
without_limit = pytest.mark.timeout(0 if WISH else 600)

# The CUDA sources, without and with products fused into sums.
EMULATED = {"plain": "emulated", "contracted": "emulated contracted"}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXTREMES = [0.0, 1e-30, 1e30, math.nan, math.inf, -math.inf]


def backends(operator: str) -> list[str]:
    """The backends to fuzz: all that run here but the reference and Triton's interpreter (seconds a case)."""
    fast = [name for name in available(operator)[1:] if DEVICE == "cuda" or name != "triton"]
    emulate = has_cuda_source(operator) and DEVICE == "cpu" and build.compiler()
    return [*fast, *(EMULATED[kind] for kind in build.kinds())] if emulate else fast


def has_cuda_source(operator: str) -> bool:
    return any(f'"{operator}_cuda"' in path.read_text() for path in (build.CSRC / "bind").glob("*.cpp"))


@contextlib.contextmanager
def running(backend: str, generator: torch.Generator):
    """Calls with ``backend=None`` run there; emulated on a device of random size, so that every plan is met."""
    kind = next((kind for kind, name in EMULATED.items() if name == backend), None)
    if kind is None:
        with afa_kernels.use_backend(backend):
            yield
        return
    with emulated(build.load(kind), order=int(torch.randint(3, (), generator=generator))) as emulator:
        processors, kilobytes = (int(torch.randint(1, limit, (), generator=generator)) for limit in (9, 228))
        emulator.set_device(processors, kilobytes * 1024)
        yield


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
        self, name: str, *shape: int, dtype: torch.dtype, extremes: list[float] = EXTREMES, low: float = 0.0
    ) -> torch.Tensor:
        """Uniform in low..1, a few elements extreme, in some memory layout."""
        values = low + (1 - low) * self.random(*shape)
        if self.data.draw(st.integers(0, 3), label=f"{name} has extremes") == 0:
            value = self.choice(f"extreme of {name}", extremes)
            share = self.choice(f"share in {name}", [0.02, 0.5, 1.0])
            values[self.random(*shape) < share] = value
        return self.layout(name, values.to(dtype).to(DEVICE))

    def photograph(
        self, batch: int, height: int, width: int, dtype: torch.dtype, extremes: list[float] = EXTREMES
    ) -> torch.Tensor:
        """[B, 3, H, W]: noise as `tensor` gives it, or one of `par_cases.SCENES`, in some memory layout."""
        kind = self.choice("kind of image", ["noise", *SCENES])
        if kind == "noise":
            return self.tensor("images", batch, 3, height, width, dtype=dtype, extremes=extremes)
        return self.layout("images", scene(kind, self.generator, batch, height, width).to(dtype).to(DEVICE))

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

    def masks(self, backend: str, height: int) -> list[int]:
        """[B, C, H, W] of masks; smaller where threads are emulated, but still of several tiles."""
        most = (2, 4, 18, 36) if backend in EMULATED.values() else (2, 9, height, 40)
        return [self.integer(name, 1, limit) for name, limit in zip("BCHW", most)]

    def class_mask(self, batch: int, channels: int) -> torch.Tensor | None:
        return (self.random(batch, channels) > 0.4).to(DEVICE) if self.flag("class_mask") else None

    def labels(self, batch: int, height: int, width: int) -> torch.Tensor:
        """One class or a few, some pixels ignored."""
        labels = torch.randint(self.integer("classes", 1, 4), (batch, height, width), generator=self.generator)
        labels[self.random(*labels.shape) < self.choice("ignored", [0.0, 0.2, 1.0])] = 255
        return labels.to(DEVICE)

    def offsets(self, count: int) -> list[tuple[int, int]]:
        reach = self.choice("reach", [1, 5, 50])
        drawn = torch.randint(-reach, reach + 1, (count, 2), generator=self.generator)
        return [(int(dy), int(dx)) for dy, dx in drawn]


def agree(
    got: torch.Tensor,
    want: torch.Tensor,
    bound: torch.Tensor,
    tolerance: float,
    reach: torch.Tensor | float = 0.0,
    slack: torch.Tensor | float = 0.0,
) -> None:
    """Finite where the reference is, and as near as ``tolerance`` times the size of what was summed, ``bound``, and
    ``slack``.

    Where that size is past what the dtype holds, or ``reach``, the size of a sum on the way, past what float32 does,
    the order of the sum decides between finite and not.
    """
    assert got.shape == want.shape and got.dtype == want.dtype
    rounding = 0.0 if want.dtype == torch.float32 else 2 * torch.finfo(want.dtype).eps
    smallest = torch.finfo(want.dtype).smallest_normal * rounding  # below it the steps get no finer
    limit, limit_inside = (torch.finfo(dtype).max / 16 for dtype in (want.dtype, torch.float32))
    got, want, bound = got.double().cpu(), want.double().cpu(), bound.double().cpu().nan_to_num(math.inf, math.inf)
    filled = (bound / limit).maximum(torch.as_tensor(reach).double().cpu().nan_to_num(0, math.inf) / limit_inside)
    finite = want.isfinite()
    differs = got.isfinite() != finite
    overflow_on_one_side = torch.where(finite, filled >= 1, filled.isfinite() & (filled >= 1))
    assert not (differs & ~overflow_on_one_side).any(), "finite where the reference is not, or the other way round"
    both = finite & got.isfinite()
    error = (got - want).abs()[both]
    slack = torch.as_tensor(slack, dtype=torch.float64).cpu().expand(want.shape)[both].nan_to_num(math.inf, math.inf)
    allowed = (tolerance + rounding) * bound[both] + rounding * want.abs()[both] + smallest + 1e-30 + slack
    if not (error <= allowed).all():
        worst = (error / allowed).nan_to_num(math.inf).argmax()
        found, wanted, size = (float(values[both][worst]) for values in (got, want, bound))
        raise AssertionError(f"{found:.9g}, not {wanted:.9g} within {allowed[worst]:.2g}; sums come to {size:.2g}")
