"""The losses of a training step that are not kernels: classification and segmentation (section 3.5).

Several processes train together by averaging their gradients. With ``across`` each loss is this process's share
of the loss of all their images: counts are summed over the processes, and the mean of the shares is what one
process would get from the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from afa_kernels import attention_affinity_loss, window_affinity

from ..conventions import resize
from ..runtime.collectives import process_count, sum_over_processes


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
