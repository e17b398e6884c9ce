"""The dense energy loss, as the field's repositories already construct and call it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.checks import FLOATS, INTEGERS, check_float, check_same_device, check_tensor
from ...core.transforms import no_autocast
from .functional import bilateral_filter, check_method

UNLABELLED = 255


class DenseEnergyLoss(nn.Module):
    """Drop-in for the dense energy loss of Tang et al. (2018), gated as AFA's L_reg is.

    Pixels that are near in place and colour should share their class: with the bilateral sums AS of the probabilities
    inside the region of interest, the loss is ``-sum(probs * ROI * gate * AS) / B``, negative. The gate is 1 where the
    label is 255 and ``ROI - max(probs)``, at least 0, elsewhere. By design the gradient is not the value's derivative:
    it is ``-2 ROI gate AS / B``, the gate taken for a constant, and needs no filter of its own.

    Args:
        weight: factor of the loss.
        sigma_rgb: standard deviation in grey levels.
        sigma_xy: standard deviation in pixels of the input; scaled along with it.
        scale_factor: the loss is taken at this share of the input's size.
        method: ``"exact"`` or ``"lattice"``, as in `afa_kernels.bilateral_filter`. Published runs used the lattice,
            whose loss is about half the exact one.
        recompute_scale_factor: as of `torch.nn.functional.interpolate`: some repositories' copies resize with it. Where
            the sides times the scale are whole numbers it is the same.

    forward(images [B, 3, H, W] in 0..255, probs [B, K, H, W] in 0..1, ROIs [B, H, W] in 0..1, seg_label [B, 1, H, W]
    with 255 for unlabelled) -> loss [1] in float32 (float64 for such probs). Images, ROIs and labels are resized to the
    nearest pixel, probabilities bilinearly. Gradients reach the probabilities alone.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Examples:
        >>> import torch
        >>> from afa_kernels import DenseEnergyLoss
        >>> images, probs = 255 * torch.rand(2, 3, 32, 32), torch.rand(2, 21, 32, 32, requires_grad=True)
        >>> inside, unlabelled = torch.ones(2, 32, 32), torch.full((2, 1, 32, 32), 255)
        >>> loss = DenseEnergyLoss(weight=1e-7, method="lattice")(images, probs.softmax(1), inside, unlabelled)
        >>> loss.shape, loss.item() < 0
        (torch.Size([1]), True)
        >>> loss.backward()
    """

    def __init__(
        self,
        weight: float = 1e-7,
        sigma_rgb: float = 15,
        sigma_xy: float = 100,
        scale_factor: float = 0.5,
        method: str = "exact",
        recompute_scale_factor: bool = False,
    ) -> None:
        super().__init__()
        self.weight = check_float(weight, "weight")
        self.sigma_rgb = check_float(sigma_rgb, "sigma_rgb", positive=True)
        self.sigma_xy = check_float(sigma_xy, "sigma_xy", positive=True)
        self.scale_factor = check_float(scale_factor, "scale_factor", positive=True)
        self.method = check_method(method)
        self.recompute_scale_factor = bool(recompute_scale_factor)

    def forward(self, images: Tensor, probs: Tensor, ROIs: Tensor, seg_label: Tensor) -> Tensor:
        kinds = (torch.bool, *INTEGERS, *FLOATS)
        check_tensor(images, "images", ("B", 3, "H", "W"), (torch.uint8, *FLOATS))
        sizes = {"B": images.shape[0], "H": images.shape[2], "W": images.shape[3]}
        check_tensor(probs, "probs", ("B", "K", "H", "W"), FLOATS, **sizes)
        check_tensor(ROIs, "ROIs", ("B", "H", "W"), kinds, **sizes)
        check_tensor(seg_label, "seg_label", ("B", 1, "H", "W"), kinds[1:], **sizes)
        check_same_device(images, "images", probs=probs, ROIs=ROIs, seg_label=seg_label)
        with no_autocast(probs.device):
            return self.weight * self._energy(images.detach(), probs, ROIs.detach()[:, None], seg_label.detach())

    def _energy(self, images: Tensor, probs: Tensor, roi: Tensor, label: Tensor) -> Tensor:
        wide = torch.promote_types(probs.dtype, torch.float32)
        images, roi = self._nearest(images.to(wide)), self._nearest(roi.to(wide))
        # As a float a label keeps its 255, and 8-bit integers cannot be resized everywhere.
        unlabelled = self._nearest(label.to(torch.float32)) == UNLABELLED
        probs = probs.to(wide)
        probs = self._resized(probs, mode="bilinear", align_corners=False)
        with torch.no_grad():
            gate = (roi - probs.amax(1, keepdim=True)).clamp_min(0).masked_fill(unlabelled, 1)
            sigma_xy = self.sigma_xy * self.scale_factor
            near = bilateral_filter(images, probs * roi, self.sigma_rgb, sigma_xy, self.method)
            slope = near * gate * roi / len(probs)
        energy = (probs * slope).sum().view(1)
        # Minus the energy in value, twice that in slope: the sums are as linear in the probabilities as what they meet.
        return energy.detach() - 2 * energy

    def _nearest(self, value: Tensor) -> Tensor:
        return self._resized(value, mode="nearest")

    def _resized(self, value: Tensor, **how: object) -> Tensor:
        if self.scale_factor == 1:
            return value
        if min(value.shape[2:]) * self.scale_factor < 1:
            raise ValueError(f"scale_factor {self.scale_factor} leaves nothing of {list(value.shape[2:])} pixels")
        recompute = self.recompute_scale_factor or None
        return F.interpolate(value, scale_factor=self.scale_factor, recompute_scale_factor=recompute, **how)

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, sigma_rgb={self.sigma_rgb}, sigma_xy={self.sigma_xy}, "
            f"scale_factor={self.scale_factor}, method={self.method!r}, "
            f"recompute_scale_factor={self.recompute_scale_factor}"
        )


# Pickles of whole modules keep the public path, whatever the files are called.
DenseEnergyLoss.__module__ = "afa_kernels"
