"""The losses of a training step: classification, segmentation, affinity and dense energy (section 3.5), and ToCo's
contrast of patch tokens.

Several processes train together by averaging their gradients. With ``across`` each loss is this process's share
of the loss of all their images: counts are summed over the processes, and the mean of the shares is what one
process would get from the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import DenseEnergyLoss, attention_affinity_loss, window_affinity

from ..conventions import require, resize
from ..labels.pseudo_labels import inside_boxes
from ..runtime.collectives import process_count, sum_over_processes

ENERGY_WEIGHT = 1e-7  # within the loss, beside its weight in the sum of losses: as published
LEAST_WEIGHT = 1e-12  # of the energy loss, below which it is not computed


@dataclass
class LossSettings:
    """The dense energy loss, the paper's L_reg, beside the losses whose weights are among the step's settings.

    Args:
        regularisation: its weight; below 1e-12 it is not computed. The paper's VOC run has 0.01.
        sigma_rgb: standard deviation of its Gaussian in grey levels.
        sigma_xy: the same in pixels of the crop.
        scale_factor: it is taken at this share of the crop's size.
        method: lattice, as published, or exact, whose loss is about twice as large.
    """

    regularisation: float = 0.0
    sigma_rgb: float = 15.0
    sigma_xy: float = 100.0
    scale_factor: float = 0.5
    method: Literal["exact", "lattice"] = "lattice"

    def __post_init__(self) -> None:
        require(0 <= self.regularisation < math.inf, "regularisation", "at least 0", self.regularisation)
        for name in ("sigma_rgb", "sigma_xy"):
            require(0 < getattr(self, name) < math.inf, name, "a positive number", getattr(self, name))
        require(0 < self.scale_factor <= 1, "scale_factor", "a number above 0, up to 1", self.scale_factor)
        require(self.method in ("exact", "lattice"), "method", "exact or lattice", self.method)

    @property
    def regularises(self) -> bool:
        """Whether there is an energy loss at all."""
        return self.regularisation >= LEAST_WEIGHT


def classification_loss(cls_logits: Tensor, cls_labels: Tensor) -> Tensor:
    """Multi-label soft margin (eq. 3). cls_logits, cls_labels: [B, K - 1], labels 0 or 1 -> scalar.

    A mean over images: with equal batches the processes' mean is the mean of all.
    """
    return F.multilabel_soft_margin_loss(cls_logits.float(), cls_labels.float())


def segmentation_loss(
    seg_logits: Tensor, labels: Tensor, ignore_index: int = 255, across: bool = False
) -> Tensor:
    """Mean of the cross-entropy over background pixels and that over foreground pixels.

    seg_logits: [B, K, h, w], resized to the labels (bilinear) where they differ. labels: [B, H, W] integer.
    A batch without background, without foreground, or without any label is fine: an empty half counts 0, and
    the gradient is the same as if it were left out.
    """
    if seg_logits.shape[0] != labels.shape[0] or labels.ndim != 3:
        raise ValueError(
            f"labels: expected [B, H, W] for seg_logits {list(seg_logits.shape)}, got {list(labels.shape)}"
        )
    labels = labels.long()
    logits = seg_logits.float()
    if logits.shape[2:] != labels.shape[1:]:
        logits = resize(logits, labels.shape[1:])
    entropy = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    background = labels == 0
    foreground = (labels != 0) & (labels != ignore_index)
    counts = torch.stack([background.sum(), foreground.sum()])
    if across:
        counts = sum_over_processes(counts)
    sums = torch.stack([torch.where(where, entropy, 0).sum() for where in (background, foreground)])
    share = process_count() if across else 1
    return 0.5 * share * (sums / counts.clamp_min(1)).sum()


def affinity_loss(
    query: Tensor,
    key: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    labels: Tensor,
    radius: int,
    ignore_index: int = 255,
    across: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`afa_kernels.attention_affinity_loss`, with ``across`` over the pairs of all processes.

    -> (loss, pos_count, neg_count); the counts are those of all processes.
    """
    if not across or process_count() == 1:
        return attention_affinity_loss(query, key, head_weight, head_bias, labels, radius, ignore_index)
    # The fused operator divides by its own counts. The window is small beside the backbone's maps.
    height, width = labels.shape[1:]
    window = window_affinity(query, key, head_weight, head_bias, height, width, radius).float().flatten(2)
    known = torch.where(labels == ignore_index, -1, labels).float()[:, None]
    others = F.unfold(F.pad(known, (radius,) * 4, value=-1.0), 2 * radius + 1)
    counted = (others >= 0) & (known.flatten(2) >= 0)
    same = counted & (others == known.flatten(2))
    different = counted & (others != known.flatten(2))
    counts = sum_over_processes(torch.stack([same.sum(), different.sum()])) + 1
    sums = torch.stack([torch.where(same, 1 - window, 0).sum(), torch.where(different, window, 0).sum()])
    return 0.5 * process_count() * (sums / counts).sum(), counts[0], counts[1]


def patch_contrast_loss(
    tokens: Tensor, labels: Tensor, ignore_index: int = 255, across: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Patch token contrast: tokens of patches with the same label are pulled together, others pushed apart.

        L = 1/2 (1 - sum_{y_i = y_j} |cos(f_i, f_j)| / (N+ + 1)) + 1/2 sum_{y_i != y_j} |cos(f_i, f_j)| / (N- + 1)

    over the ordered pairs of two different patches of an image whose labels are both known; N+ and N- are their numbers
    in the batch.

    tokens: [B, C, h, w]. labels: [B, h, w] integer. ``across``: over the pairs of all processes.

    -> (loss, pos_count, neg_count), a scalar and the two divisors. A batch without a pair of a kind is fine; without
    any the loss is 1/2 and its gradient 0.

    Source: Ru et al., ToCo (CVPR 2023), in the form that its public code computes, read line by line. The paper itself
    was not at hand; its equation 4, as it is remembered, is 1/N+ sum (1 - cos) + 1/N- sum cos.
    """
    if tokens.ndim != 4 or labels.shape != (len(tokens), *tokens.shape[2:]):
        raise ValueError(f"labels: expected [B, h, w] for tokens {list(tokens.shape)}, got {list(labels.shape)}")
    with torch.autocast(tokens.device.type, enabled=False):  # as with every loss here the sums are float32
        unit = F.normalize(tokens.float().flatten(2), dim=1, eps=1e-8)
        cosine = (unit.transpose(1, 2) @ unit).abs()
    own = labels.flatten(1)
    known = own != ignore_index
    counted = known[:, :, None] & known[:, None, :]
    counted.diagonal(dim1=1, dim2=2).fill_(False)
    equal = own[:, :, None] == own[:, None, :]
    same, different = counted & equal, counted & ~equal
    counts = torch.stack([same.sum(), different.sum()])
    counts = (sum_over_processes(counts) if across else counts) + 1
    sums = torch.stack([(cosine * pairs).sum() for pairs in (same, different)])
    pull, push = (process_count() if across else 1) * sums / counts
    return 0.5 * (1 - pull) + 0.5 * push, counts[0], counts[1]


def energy_loss(
    seg_logits: Tensor, images01: Tensor, labels: Tensor, img_box: Tensor | None, settings: LossSettings
) -> Tensor:
    """Dense energy of the segmentation (Tang et al. 2018), without its weight among the losses -> scalar, negative.

    Pixels that are near in place and colour should have one class; where a label is known, as far as the
    segmentation is unsure. Its gradient is by design not the slope of its value (:class:`afa_kernels.DenseEnergyLoss`).

    seg_logits: [B, K, h, w], resized to the labels before the softmax. images01: [B, 3, H, W] in 0..1. labels:
    [B, H, W], 255 for open ones. img_box [B, 4]: where the photographs are in their crops.

    A mean over images: with equal batches the processes' mean is the mean of all.
    """
    size = labels.shape[1:]
    probs = resize(seg_logits.float(), size).softmax(1)
    inside = torch.ones_like(labels, dtype=torch.bool)
    if img_box is not None:
        inside = inside_boxes(img_box, size, labels.device)
    s = settings
    loss = DenseEnergyLoss(ENERGY_WEIGHT, s.sigma_rgb, s.sigma_xy, s.scale_factor, s.method)
    return loss(255 * images01, probs, inside, labels[:, None])[0]
