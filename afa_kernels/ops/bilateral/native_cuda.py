"""The native CUDA kernels of the permutohedral lattice and of the dense CRF, called: `native` hands CUDA tensors over.

Points lie with their channels side by side, [points, channels rounded up to a multiple of 4] float32, from the first
iteration to the last; the images of a batch are one lattice, in which they do not meet. Nothing waits for the device,
unless ``tolerance`` asks whether an image is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import native_module
from ...core.native_module import address, native, view, workspace

# Corners of simplices at once, of rows of up to 24 channels, fewer of longer ones: a batch beyond it goes in turns, so
# that memory stays within some GB and whole rows are filtered at once.
MOST_ENTRIES = 1 << 23
SOFTMAX, SLOPE = 1, 2  # what a step ends with, as in lattice_cuda.h

Kernels = list[tuple[float, float, "float | None"]]  # weight, sigma_xy, sigma_rgb


def bilateral_filter(
    images: Tensor, values: Tensor, sigma_rgb: float | None, sigma_xy: float, transpose: bool
) -> Tensor:
    """By the lattice."""
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    for part in _groups(values, 2 if sigma_rgb is None else 5):
        built, value = _of_images(images[part], sigma_rgb, sigma_xy), values[part]
        _to_planes(_filtered(built, _to_rows(value), value.shape[1], transpose), out[part])
    return out


def dense_crf(
    images: Tensor,
    unary: Tensor,
    num_iter: int,
    kernels: Kernels,
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
    convergence: bool,
    exact: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """``exact`` is the filter that the method of this name takes."""
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    shape = len(unary), num_iter + 1 if convergence else 0
    divergences = torch.empty(shape, dtype=torch.float64, device=unary.device)
    for part in _groups(unary, 5, alone=tolerance > 0):
        step = _Step(images[part], unary[part], kernels, compat, method, normalization, exact)
        _, q, found = _run(step, num_iter, tolerance, convergence)
        _to_planes(q, out[part])
        if convergence:
            divergences[part] = torch.stack(found, 1)
    return out, divergences


def dense_crf_gradient(
    images: Tensor,
    unary: Tensor,
    grad: Tensor,
    num_iter: int,
    kernels: Kernels,
    compat: Tensor | None,
    method: str,
    normalization: str,
    tolerance: float,
    exact: Callable[..., Tensor],
) -> Tensor:
    """The gradient of unary: the distributions of all iterations are made again, then met in reverse."""
    out = torch.empty(unary.shape, dtype=unary.dtype, device=unary.device)
    for part in _groups(unary, 5, alone=tolerance > 0):
        step = _Step(images[part], unary[part], kernels, compat, method, normalization, exact)
        before, last, _ = _run(step, num_iter, tolerance, False, keep=True)
        total = torch.zeros_like(last)
        slope = step.run([], SLOPE, near=_to_rows(grad[part]), q=last, total=total, out=torch.empty_like(last))
        while before:
            slope = step.adjoint(slope, before.pop(), total)
        _to_planes(total, out[part])
    return out


def lattice(features: Tensor) -> Lattice:
    """features [N, d] -> what `filter_lattice` takes."""
    return _build(features.contiguous(), 1)


def filter_lattice(lattice: Lattice, values: Tensor) -> Tensor:
    """values [1, K, H, W] float32 with H * W = N -> the same."""
    out = torch.empty(values.shape, device=values.device)
    _to_planes(_filtered(lattice, _to_rows(values), values.shape[1], False), out)
    return out


# --- points as rows ---


def _groups(values: Tensor, dims: int, alone: bool = False) -> Iterator[slice]:
    """The images of a batch, as many at once as the kernels' memory should hold."""
    batch, channels, height, width = values.shape
    entries = height * width * (dims + 1) * max(channels, 24) // 24
    count = 1 if alone else max(1, MOST_ENTRIES // entries)
    return (slice(first, first + count) for first in range(0, batch, count))


def _to_rows(values: Tensor) -> Tensor:
    """[B, C, H, W] -> [B * H * W, row], 0 behind the channels."""
    batch, channels, height, width = values.shape
    row = (channels + 3) // 4 * 4
    make = torch.empty if row == channels else torch.zeros
    rows = make(batch, height, width, row, device=values.device)
    rows[..., :channels].copy_(values.permute(0, 2, 3, 1))
    return rows.view(-1, row)


def _to_planes(rows: Tensor, out: Tensor) -> Tensor:
    batch, channels, height, width = out.shape
    out.copy_(rows.view(batch, height, width, -1)[..., :channels].permute(0, 3, 1, 2))
    return out


# --- the lattice ---


class Lattice(NamedTuple):
    """A permutohedral lattice that is built: how many points in how many dimensions, and where it is."""

    points: int
    dims: int
    memory: Tensor

    def kernel(self, scale: float, weighed: Tensor | None, after: Tensor | None) -> tuple:
        """As a step takes it; ``weighed`` is of `weigh`, ``after`` [points] multiplies the sums."""
        return self.points, self.dims, self.memory.data_ptr(), address(weighed), scale, address(after)

    def weigh(self, factor: Tensor) -> Tensor:
        """What the lattice splats, times a factor [points]."""
        weighed = torch.empty(self.points * (self.dims + 1), 2, dtype=torch.int32, device=factor.device)
        place = native_module.cuda_stream(factor.device)
        native.lattice_weigh_cuda(*self[:2], self.memory.data_ptr(), factor.data_ptr(), weighed.data_ptr(), *place)
        return weighed


def _of_images(images: Tensor, sigma_rgb: float | None, sigma_xy: float) -> Lattice:
    batch, _, height, width = images.shape
    features = torch.empty(batch * height * width, 2 if sigma_rgb is None else 5, device=images.device)
    place = native_module.cuda_stream(images.device)
    native.lattice_features_cuda(view(images), sigma_rgb or 0.0, sigma_xy, features.data_ptr(), *place)
    return _build(features, batch)


def _build(features: Tensor, images: int) -> Lattice:
    (points, dims), device = features.shape, features.device
    memory = torch.empty(native.lattice_cuda_bytes(points, dims), dtype=torch.uint8, device=device)
    scratch = workspace(native.lattice_build_cuda_workspace(points, dims), device)
    place = memory.data_ptr(), scratch.data_ptr(), *native_module.cuda_stream(device)
    native.lattice_build_cuda(features.data_ptr(), points, dims, images, *place)
    return Lattice(points, dims, memory)


def _filtered(lattice: Lattice, rows: Tensor, channels: int, transpose: bool) -> Tensor:
    out = torch.empty_like(rows)
    scratch = workspace(native.lattice_filter_cuda_workspace(lattice.points, lattice.dims, channels), rows.device)
    place = scratch.data_ptr(), *native_module.cuda_stream(rows.device)
    built = lattice.points, lattice.dims, lattice.memory.data_ptr()
    native.lattice_filter_cuda(*built, channels, rows.data_ptr(), out.data_ptr(), transpose, *place)
    return out


# --- mean field ---


class _Step:
    """An iteration of mean field for the images of a group."""

    def __init__(
        self,
        images: Tensor,
        unary: Tensor,
        kernels: Kernels,
        compat: Tensor | None,
        method: str,
        normalization: str,
        exact: Callable[..., Tensor],
    ) -> None:
        self.shape, self.channels, self.images = unary.shape, unary.shape[1], images
        self.base = _to_rows(-unary.float())
        self.matrix = self._padded(compat)
        self.exact = exact if method == "exact" else None
        self.kept, self.messages = [], {False: [], True: []}  # by whether it is the adjoint
        for weight, sigma_xy, sigma_rgb in kernels:
            self._add(weight, sigma_rgb, sigma_xy, normalization)

    def _padded(self, compat: Tensor | None) -> Tensor | None:
        """What a step multiplies with: [row, row], from a class to another; without compatibilities null for 1."""
        if compat is None:
            return None
        row = self.base.shape[1]
        matrix = torch.zeros(row, row, device=compat.device)
        matrix[: self.channels, : self.channels] = -(compat + compat.t()).float() / 2
        return matrix

    def _add(self, weight: float, sigma_rgb: float | None, sigma_xy: float, normalization: str) -> None:
        if self.exact:
            ones = torch.ones(len(self.images), 1, *self.shape[2:], device=self.images.device)
            norm = self.exact(self.images, ones, sigma_rgb, sigma_xy, "exact", False)
        else:
            lattice = _of_images(self.images, sigma_rgb, sigma_xy)
            ones = torch.ones(lattice.points, 4, device=self.images.device)
            norm = _filtered(lattice, ones, 4, False)[:, 0]
        inverse = 1 / (norm + 1e-20)
        inverse = (inverse.sqrt() if normalization == "symmetric" else inverse).contiguous()
        before = inverse if normalization in ("symmetric", "before") else None
        after = inverse if normalization in ("symmetric", "after") else None
        weighed = None if self.exact or normalization == "none" else lattice.weigh(inverse)
        for transpose in self.messages:
            # The adjoint multiplies before with what the filter is multiplied with after.
            first, last = (after, before) if transpose else (before, after)
            if self.exact:
                self.messages[transpose].append((weight, sigma_rgb, sigma_xy, first, last))
            else:
                self.messages[transpose].append(lattice.kernel(weight, None if first is None else weighed, last))
                self.kept += [lattice, weighed, last]

    def run(self, kernels: list[tuple], finish: int, transpose: bool = False, **rows: Tensor | None) -> Tensor:
        """A step of lattice_cuda.h, on rows by their names there; returns ``out``."""
        names = ("input", "near", "base", "matrix", "q", "out", "logits", "total")
        addresses, points = [address(rows.get(name)) for name in names], len(self.base)
        scratch = workspace(native.dense_crf_cuda_workspace(kernels, points, self.channels), self.base.device)
        place = scratch.data_ptr(), *native_module.cuda_stream(self.base.device)
        native.dense_crf_cuda(kernels, points, self.channels, addresses, transpose, finish, *place)
        return rows["out"]

    def start(self) -> Tensor:
        return self.run([], SOFTMAX, base=self.base, out=torch.empty_like(self.base))

    def __call__(self, q: Tensor, out: Tensor, logits: Tensor | None = None) -> Tensor:
        """The next distribution, written to ``out``, and what it is the softmax of to ``logits``."""
        rows = {"base": self.base, "matrix": self.matrix, "out": out, "logits": logits}
        return self._message(q, False, SOFTMAX, rows)

    def adjoint(self, slope: Tensor, q: Tensor, total: Tensor) -> Tensor:
        """From the slope of an iteration's logits to that of the logits before, whose softmax is ``q``."""
        rows = {"matrix": self.matrix, "q": q, "total": total, "out": torch.empty_like(q)}
        return self._message(slope, True, SLOPE, rows)

    def _message(self, values: Tensor, transpose: bool, finish: int, rows: dict[str, Tensor | None]) -> Tensor:
        messages = self.messages[transpose]
        if not self.exact:
            return self.run(messages, finish, transpose, input=values, **rows)
        planes = _to_planes(values, torch.empty(self.shape, device=values.device))
        near = torch.zeros_like(planes)
        for weight, sigma_rgb, sigma_xy, first, last in messages:
            value = planes if first is None else planes * first
            value = self.exact(self.images, value, sigma_rgb, sigma_xy, "exact", transpose)
            near += weight * (value if last is None else value * last)
        return self.run([], finish, near=_to_rows(near), **rows)


def _run(
    step: _Step, num_iter: int, tolerance: float, convergence: bool, keep: bool = False
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The distributions before the last if they are to be kept, the last, and the divergence of each if asked for."""
    q, spare, kept, found = step.start(), None, [], []
    logits = torch.empty_like(q) if convergence else None
    for _ in range(num_iter):
        out = step(q, torch.empty_like(q) if spare is None else spare, logits)
        if convergence:
            found.append(_divergence(step, q, logits))
        small = tolerance > 0 and float((out - q)[:, : step.channels].abs().mean()) < tolerance
        kept, spare, q = ([*kept, q], None, out) if keep else ([], q, out)
        if small:
            break
    if convergence:
        step(q, torch.empty_like(q), logits)
        found.append(_divergence(step, q, logits))
        found += found[-1:] * (num_iter + 1 - len(found))
    return kept, q, found


def _divergence(step: _Step, q: Tensor, logits: Tensor) -> Tensor:
    """Of each image, [B] float64."""
    terms = (q * (q.clamp_min(1e-20).log() - logits))[:, : step.channels].double()
    return terms.reshape(len(step.images), -1).sum(1)
