"""The classes and constants of ``pydensecrf.densecrf``: names, orders, defaults, layouts and errors are theirs.

Arrays are float32, classes before points. What they refuse because of its layout (strides, read-only) is taken here.
Distributions are plain arrays, row by row in memory where theirs are column by column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from numbers import Number
from typing import NamedTuple

import numpy as np
import torch

from ...ops.bilateral import LatticeKernel, crf_of_energies

CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = 0, 1, 2
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = 0, 1, 2, 3
_NORMALIZATIONS = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}
_KERNELS = (CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL)


def _floats(value: object, name: str, ndim: int) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    if value.dtype != np.float32 or value.ndim != ndim:
        raise ValueError(f"{name} must be float32 of {ndim} dimensions, got {value.dtype} of {value.ndim}")
    return value


def _several(value: object, count: int, name: str) -> tuple[float, ...]:
    values = (value,) * count if isinstance(value, Number) else tuple(value)
    if len(values) != count or not all(number > 0 for number in values):
        raise ValueError(f"{name} must be a positive number or {count} of them, got {value!r}")
    return tuple(map(float, values))


class _Compatibility:
    """What is subtracted of the logits for a filtered distribution [n, N]."""

    def __init__(self, compat: object, classes: int) -> None:
        if isinstance(compat, Number):
            self.factor = torch.tensor(-float(compat), device="cpu")
            return
        values = np.asarray(compat)
        if values.dtype != np.float32 or values.ndim not in (1, 2):
            raise ValueError(f"compat must be a number or a float32 array of 1 or 2 dimensions, got {compat!r}")
        if values.shape != (classes,) * values.ndim:
            raise ValueError(f"compat must have {classes} entries a dimension, got shape {values.shape}")
        weights = torch.from_numpy(np.array(values))
        self.factor = weights[:, None] if values.ndim == 1 else (weights + weights.t()) / 2

    def __call__(self, filtered: torch.Tensor) -> torch.Tensor:
        return self.factor @ filtered if self.factor.dim() == 2 and self.factor.shape[1] > 1 else self.factor * filtered


class _OfImage(NamedTuple):
    """A pairwise term that `crf_of_energies` knows: Potts, as wide in x as in y, one deviation for all colours."""

    kernel: tuple[float, float, float]  # weight, sigma_xy, sigma_rgb or 0
    normalization: str
    image: np.ndarray | None


class DenseCRF:
    """``DenseCRF(number of points, number of classes)``."""

    _shape: tuple[int, int] | None = None

    def __init__(self, nvar: int, nlabels: int, /) -> None:
        self._points, self._classes = int(nvar), int(nlabels)
        if self._points < 1 or self._classes < 1:
            raise ValueError(f"there must be at least one point and one class, got {nvar} and {nlabels}")
        self._unary: torch.Tensor | None = None
        self._pairwise: list[tuple[Callable[[], LatticeKernel], _Compatibility]] = []  # lattices when they are needed
        self._known: list[_OfImage | None] = []

    def setUnaryEnergy(self, u: np.ndarray, f: None = None) -> None:
        """u [n, N] float32, minus log probability."""
        if f is not None:
            raise ValueError("f must be None: unaries that are learnt from features are not offered")
        u = _floats(u, "u", 2)
        if u.shape != (self._classes, self._points):
            raise ValueError(f"u must have shape {(self._classes, self._points)}, got {u.shape}")
        self._unary = torch.from_numpy(np.array(u))

    def addPairwiseEnergy(
        self,
        features: np.ndarray,
        compat: float | np.ndarray,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """features [d, N] float32. ``kernel`` says what of a kernel could be learnt; as set up all are the same."""
        features = _floats(features, "features", 2)
        if features.shape[1] != self._points:
            raise ValueError(f"features must have {self._points} columns, got shape {features.shape}")
        taken = torch.from_numpy(np.array(features.T, order="C"))
        self._add(lambda: taken, len(features), compat, kernel, normalization)

    def _add(
        self,
        features: Callable[[], torch.Tensor],
        dims: int,
        compat: float | np.ndarray,
        kernel: int,
        normalization: int,
        known: _OfImage | None = None,
    ) -> None:
        if kernel not in _KERNELS:
            raise ValueError(f"kernel must be one of {_KERNELS}, got {kernel!r}")
        if normalization not in _NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {tuple(_NORMALIZATIONS)}, got {normalization!r}")
        compatibility = _Compatibility(compat, self._classes)
        # Theirs takes points by fours and fills up the last four with points at the origin, corners of the lattice too.
        silent = torch.zeros(1, dims, device="cpu") if self._points % 4 else None
        options = self._shape, _NORMALIZATIONS[normalization], silent
        self._pairwise.append((functools.cache(lambda: LatticeKernel(features(), *options)), compatibility))
        self._known.append(known if silent is None else None)

    def inference(self, niter: int, /) -> np.ndarray:
        """Mean field: [n, N] float32 probabilities after ``niter`` iterations."""
        images = {id(term.image): term.image for term in self._known if term is not None and term.image is not None}
        alike = len({term.normalization for term in self._known if term is not None}) == 1
        if None not in self._known and alike and len(images) <= 1:
            return self._at_once(int(niter), next(iter(images.values()), None))
        q, *rest = self.startInference()
        for _ in range(int(niter)):
            self.stepInference(q, *rest)
        return q

    def _at_once(self, niter: int, image: np.ndarray | None) -> np.ndarray:
        """All iterations in one call, which is several times faster than one by one."""
        shape = 1, self._classes, *self._shape
        if image is None:
            image = np.zeros((*self._shape, 3), np.uint8)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        kernels, normalization = [term.kernel for term in self._known], self._known[0].normalization
        with torch.no_grad():
            q = crf_of_energies(pixels, self._energy().reshape(shape), max(niter, 0), kernels, normalization)
        return q.reshape(self._classes, self._points).numpy()

    def startInference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distribution of the unaries alone, and two arrays that `stepInference` does not need."""
        return self._softmax(-self._energy()), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)

    def stepInference(self, Q: np.ndarray, tmp1: np.ndarray, tmp2: np.ndarray, /) -> None:
        """One iteration; Q is written to."""
        Q[...] = self._softmax(-self._energy() - self._messages(self._distribution(Q)))

    def klDivergence(self, Q: np.ndarray, /) -> float:
        """Of Q from the CRF's distribution, up to a constant."""
        q = self._distribution(Q)
        return float((q * (q.clamp_min(1e-20).log() + self._energy() + self._messages(q))).double().sum())

    def _energy(self) -> torch.Tensor:
        return torch.zeros(self._classes, self._points, device="cpu") if self._unary is None else self._unary

    def _distribution(self, q: np.ndarray) -> torch.Tensor:
        q = np.asarray(q)
        if q.shape != (self._classes, self._points):
            raise ValueError(f"Q must have shape {(self._classes, self._points)}, got {q.shape}")
        return torch.from_numpy(np.array(q, np.float32))

    def _messages(self, q: torch.Tensor) -> torch.Tensor:
        return sum((compat(kernel()(q)) for kernel, compat in self._pairwise), torch.zeros_like(q))

    @staticmethod
    def _softmax(logits: torch.Tensor) -> np.ndarray:
        return torch.softmax(logits, 0).numpy()


class DenseCRF2D(DenseCRF):
    """``DenseCRF2D(width, height, number of classes)``: the points are an image's pixels, row by row."""

    def __init__(self, w: int, h: int, nlabels: int, /) -> None:
        super().__init__(int(w) * int(h), nlabels)
        self._shape = int(h), int(w)

    def addPairwiseGaussian(
        self,
        sxy: float | tuple[float, float],
        compat: float | np.ndarray,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """A Gaussian of place; ``sxy`` are standard deviations in pixels, x before y."""
        term = self._term(sxy, None, None, compat, normalization)
        self._add(lambda: torch.stack(self._place(sxy), dim=1), 2, compat, kernel, normalization, term)

    def addPairwiseBilateral(
        self,
        sxy: float | tuple[float, float],
        srgb: float | tuple[float, float, float],
        rgbim: np.ndarray,
        compat: float | np.ndarray,
        kernel: int = DIAG_KERNEL,
        normalization: int = NORMALIZE_SYMMETRIC,
    ) -> None:
        """A Gaussian of place and colour; rgbim [h, w, 3] uint8."""
        if not isinstance(rgbim, np.ndarray):
            raise TypeError(f"rgbim must be an array, got {type(rgbim).__name__}")
        if rgbim.dtype != np.uint8 or rgbim.shape != (*self._shape, 3):
            raise ValueError(f"rgbim must be uint8 {(*self._shape, 3)}, got {rgbim.dtype} {rgbim.shape}")
        # Of one image all terms keep one copy.
        copies = (term.image for term in self._known if term is not None and term.image is not None)
        image = next((copy for copy in copies if np.array_equal(copy, rgbim)), None)
        image = np.array(rgbim) if image is None else image
        term = self._term(sxy, srgb, image, compat, normalization)

        def features() -> torch.Tensor:
            sigmas = torch.tensor(_several(srgb, 3, "srgb"), device="cpu")
            colours = torch.from_numpy(image).flatten(0, 1).float() / sigmas
            return torch.cat([torch.stack(self._place(sxy), dim=1), colours], dim=1)

        self._add(features, 5, compat, kernel, normalization, term)

    def _term(self, sxy: object, srgb: object, image: np.ndarray | None, compat: object, norm: int) -> _OfImage | None:
        """What `crf_of_energies` has to know of a term, or None if it is none of its kind."""
        places, colours = set(_several(sxy, 2, "sxy")), set() if srgb is None else set(_several(srgb, 3, "srgb"))
        if not isinstance(compat, Number) or norm not in _NORMALIZATIONS or len(places) > 1 or len(colours) > 1:
            return None
        return _OfImage((float(compat), *places, *(colours or {0.0})), _NORMALIZATIONS[norm], image)

    def _place(self, sxy: float | tuple[float, float]) -> list[torch.Tensor]:
        height, width = self._shape
        sx, sy = torch.tensor(_several(sxy, 2, "sxy"), device="cpu")
        x = torch.arange(width, dtype=torch.float32, device="cpu") / sx
        y = torch.arange(height, dtype=torch.float32, device="cpu") / sy
        return [x.expand(height, width).flatten(), y[:, None].expand(height, width).flatten()]
