"""The losses of a training step that are not kernels: classification and segmentation (section 3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(cls_logits: Tensor, cls_labels: Tensor) -> Tensor:
    """Multi-label soft margin (eq. 3). cls_logits, cls_labels: [B, K - 1], labels 0 or 1 -> scalar."""
    return F.multilabel_soft_margin_loss(cls_logits.float(), cls_labels.float())


def segmentation_loss(seg_logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
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
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    entropy = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
    background = labels == 0
    foreground = (labels != 0) & (labels != ignore_index)
    return 0.5 * (_mean_over(entropy, background) + _mean_over(entropy, foreground))


def _mean_over(values: Tensor, where: Tensor) -> Tensor:
    """Mean of ``values`` where the mask is set, 0 if it is set nowhere. No host synchronisation."""
    return torch.where(where, values, 0).sum() / where.sum().clamp_min(1)
