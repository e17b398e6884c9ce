"""What clients call of rloss, on this project's lattice: its module ``bilateralfilter``, its losses, and the function
by which training scripts call them.

Arrays are flat and float32, images planar, [N * 3 * H * W] in 0..255; ``AS`` is written to. The losses have shape [1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import bilateral
from ..ops.bilateral import bilateral_filter

__all__ = ["DenseCRFLoss", "DenseEnergyLoss", "bilateralfilter", "bilateralfilter_batch", "get_energy_loss"]


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
    if min(N, K, H, W) < 1:
        raise ValueError(f"N, K, H and W must be at least 1, got {N}, {K}, {H}, {W}")
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
    """AS <- the bilateral sums of seg, one image and as many channels as seg holds.

    Raises:
        ValueError: as `bilateralfilter_batch`, or a seg that holds no whole number of channels.
    """
    H, W = int(H), int(W)
    if min(H, W) < 1 or np.size(seg) % (H * W):
        raise ValueError(f"seg must hold a multiple of H * W elements, got {np.size(seg)} with H = {H}, W = {W}")
    bilateralfilter_batch(image, seg, AS, 1, np.size(seg) // (H * W), H, W, sigma_rgb, sigma_xy)


class DenseEnergyLoss(bilateral.DenseEnergyLoss):
    """`afa_kernels.DenseEnergyLoss`, by the lattice unless told otherwise, as theirs is.

    ``DenseEnergyLoss(weight, sigma_rgb, sigma_xy, scale_factor)``; ``recompute_scale_factor=True`` for the copies that
    resize so. forward(images [N, 3, H, W] in 0..255, segmentations [N, K, H, W], ROIs [N, H, W], seg_label
    [N, 1, H, W]) -> loss [1].
    """

    def __init__(
        self,
        weight: float,
        sigma_rgb: float,
        sigma_xy: float,
        scale_factor: float,
        method: str = "lattice",
        recompute_scale_factor: bool = False,
    ) -> None:
        super().__init__(weight, sigma_rgb, sigma_xy, scale_factor, method, recompute_scale_factor)

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor, seg_label: Tensor) -> Tensor:
        return super().forward(images, segmentations, ROIs, seg_label)


class DenseCRFLoss(DenseEnergyLoss):
    """The older loss of rloss (Tang et al. 2018), without the gate: -sum(segmentations AS) / N within the ROIs.

    forward(images [N, 3, H, W] in 0..255, segmentations [N, K, H, W], ROIs [N, H, W], or None: everywhere) -> loss [1].
    """

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor | None = None) -> Tensor:
        if ROIs is None:
            ROIs = torch.ones_like(segmentations[:, 0])
        # The gate is open where nothing is labelled.
        open_everywhere = torch.full_like(segmentations[:, :1], bilateral.UNLABELLED, dtype=torch.uint8)
        return super().forward(images, segmentations, ROIs, open_everywhere)


def get_energy_loss(
    img: Tensor,
    logit: Tensor,
    label: Tensor,
    img_box: Sequence[Sequence[int]] | Tensor | None,
    loss_layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    mean: Sequence[float] = (123.675, 116.28, 103.53),
    std: Sequence[float] = (58.395, 57.12, 57.375),
) -> Tensor:
    """The loss of a batch as training scripts have it.

    Args:
        img: [N, 3, H, W], normalised by ``mean`` and ``std`` of grey levels.
        logit: [N, K, H, W] before the softmax.
        label: [N, H, W] of the segmentation, 255 where there is none.
        img_box: for each image (y0, y1, x0, x1), where the photograph is in its crop; None: everywhere.
        loss_layer: a `DenseEnergyLoss`.

    Returns:
        [1], on the device of logit.
    """
    size = img.shape[2:]
    inside = torch.ones(len(img), *size, device=logit.device)
    if img_box is not None:
        if len(img_box) != len(img):
            raise ValueError(f"img_box must have a box for each of the {len(img)} images, got {len(img_box)}")
        inside.zero_()
        for plane, box in zip(inside, img_box):
            y0, y1, x0, x1 = (max(int(side), 0) for side in box)
            plane[y0:y1, x0:x1] = 1
    mean, std = (torch.tensor(values, dtype=img.dtype, device=img.device)[:, None, None] for values in (mean, std))
    return loss_layer(img * std + mean, F.softmax(logit, dim=1), inside, label.to(torch.uint8)[:, None])
