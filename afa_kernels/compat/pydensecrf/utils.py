"""The functions of ``pydensecrf.utils``: energies of labels and probabilities, features of grids and images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Number

import numpy as np


def unary_from_labels(labels: np.ndarray, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> np.ndarray:
    """Energies [n_labels, N] float32 of labels that are right with probability ``gt_prob``.

    With ``zero_unsure`` 0 is no label but stands for not knowing, and the classes are counted from 1.
    """
    if not 0 < gt_prob < 1:
        raise AssertionError(f"`gt_prob must be in (0,1), got {gt_prob}")
    labels = np.asarray(labels).flatten()
    wrong = -np.log((1.0 - gt_prob) / (n_labels - 1))
    energies = np.full((n_labels, len(labels)), wrong, dtype=np.float32)
    energies[labels - 1 if zero_unsure else labels, np.arange(len(labels))] = -np.log(gt_prob)
    if zero_unsure:
        energies[:, labels == 0] = -np.log(1.0 / n_labels)
    return energies


def compute_unary(labels: np.ndarray, M: int, GT_PROB: float = 0.5) -> np.ndarray:
    """The older name of `unary_from_labels`."""
    warnings.warn("pydensecrf.compute_unary is deprecated, use unary_from_labels instead.", stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def unary_from_softmax(sm: np.ndarray, scale: float | None = None, clip: float | None = 1e-5) -> np.ndarray:
    """Energies [n, N] float32 of probabilities [n, ...]: mixed with 1 - ``scale`` of the uniform distribution, taken
    for ``clip`` where they are less.
    """
    count = sm.shape[0]
    if scale is not None:
        if not 0 < scale <= 1:
            raise AssertionError(f"`scale` needs to be in (0,1], got {scale}")
        sm = scale * sm + (1 - scale) / count
    if clip is not None:
        sm = np.clip(sm, clip, 1.0)
    return -np.log(sm).reshape([count, -1]).astype(np.float32)


def softmax_to_unary(sm: np.ndarray, GT_PROB: float = 1) -> np.ndarray:
    """The older name of `unary_from_softmax`."""
    warnings.warn("pydensecrf.softmax_to_unary is deprecated, use unary_from_softmax instead.", stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, None)


def _grid(shape: Sequence[int], sdims: Sequence[float]) -> np.ndarray:
    mesh = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")).astype(np.float32)
    for axis, sigma in enumerate(sdims):  # one too many is an IndexError, as theirs
        mesh[axis] /= np.float32(sigma)
    return mesh


def create_pairwise_gaussian(sdims: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """Features [d, N] float32 of a grid, in the order of ``shape``; ``sdims`` are its standard deviations."""
    return _grid(shape, sdims).reshape(len(sdims), -1)


def create_pairwise_bilateral(
    sdims: Sequence[float], schan: float | Sequence[float], img: np.ndarray, chdim: int = -1
) -> np.ndarray:
    """Features [d, N] float32 of an image: its grid's, and its channels over ``schan``. ``chdim`` is the dimension of
    the channels; -1 says that there is none.
    """
    channels = (img[None] if chdim == -1 else np.moveaxis(img, chdim, 0)).astype(np.float32)
    for plane, sigma in zip(channels, [schan] * len(channels) if isinstance(schan, Number) else schan):
        plane /= np.float32(sigma)
    features = np.concatenate([_grid(channels.shape[1:], sdims), channels])
    return features.reshape(len(features), -1)
