"""What clients call of rloss's module ``bilateralfilter``, on this project's lattice.

Arrays are flat and float32, images planar, [N * 3 * H * W] in 0..255; ``AS`` is written to.
"""

from __future__ import annotations

import numpy as np
import torch

from ..ops.bilateral import DenseEnergyLoss, bilateral_filter

__all__ = ["DenseEnergyLoss", "bilateralfilter", "bilateralfilter_batch"]


def _taken(values: np.ndarray, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    array = np.asarray(values, dtype=np.float32)
    if array.size != np.prod(shape):
        raise ValueError(f"{name} must have {' * '.join(map(str, shape))} elements, got {array.size}")
    return torch.from_numpy(np.array(array).reshape(shape))


def bilateralfilter_batch(
    images: np.ndarray,
    segs: np.ndarray,
    AS: np.ndarray,
    N: int,
    K: int,
    H: int,
    W: int,
    sigma_rgb: float,
    sigma_xy: float,
) -> None:
    """AS <- the bilateral sums of segs, N images of K channels.

    Raises:
        ValueError: an array of another size, or an AS that cannot be written to in place.
    """
    N, K, H, W = (int(size) for size in (N, K, H, W))
    if not isinstance(AS, np.ndarray) or AS.dtype != np.float32 or not (AS.flags.c_contiguous and AS.flags.writeable):
        raise ValueError("AS must be a writable, contiguous float32 array: it is written in place")
    if AS.size != N * K * H * W:
        raise ValueError(f"AS must have {N} * {K} * {H} * {W} elements, got {AS.size}")
    pixels, values = _taken(images, "images", (N, 3, H, W)), _taken(segs, "segs", (N, K, H, W))
    with torch.no_grad():
        AS.reshape(-1)[:] = bilateral_filter(pixels, values, sigma_rgb, sigma_xy, "lattice").numpy().reshape(-1)


def bilateralfilter(
    image: np.ndarray, seg: np.ndarray, AS: np.ndarray, H: int, W: int, sigma_rgb: float, sigma_xy: float
) -> None:
    """AS <- the bilateral sums of seg, one image and as many channels as seg holds."""
    bilateralfilter_batch(image, seg, AS, 1, np.size(seg) // (int(H) * int(W)), H, W, sigma_rgb, sigma_xy)
