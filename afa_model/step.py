"""Everything one training step computes, from a batch to its loss (section 3.5 and Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_kernels import attention_affinity_loss
from afa_model.cams import multi_scale_cam
from afa_model.losses import classification_loss, segmentation_loss
from afa_model.pseudo_labels import IGNORE, random_walk_label, refine_label


@dataclass
class StepSettings:
    """What a training step depends on; the defaults are the published ones for VOC.

    Up to and including iteration ``cam_iters`` (the first iteration is 0) only the classifier learns. Up to
    and including ``aff_iters`` the decoder's target is the PAR-refined CAM, after it the random-walk label.
    The affinity's target is the PAR-refined CAM throughout.
    """

    cam_iters: int = 2000
    aff_iters: int = 6000
    seg_weight: float = 0.1
    aff_weight: float = 0.1
    high_score: float = 0.55
    low_score: float = 0.35
    radius: int = 8
    cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    par_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    par_iters: int = 10
    walk_power: float = 2
    walk_eps: float = 0.1
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    compute_unused: bool = False
    """Compute (for logs and pictures) also what the current phase gives no weight."""

    def __post_init__(self) -> None:
        if not 0 <= self.cam_iters <= self.aff_iters:
            raise ValueError(
                "cam_iters, aff_iters: expected 0 <= cam_iters <= aff_iters,"
                f" got {self.cam_iters} and {self.aff_iters}"
            )
        if not 0 <= self.low_score <= self.high_score:
            raise ValueError(
                "low_score, high_score: expected 0 <= low_score <= high_score,"
                f" got {self.low_score} and {self.high_score}"
            )


@dataclass
class StepResult:
    """One step's numbers. What the step did not compute is None.

    ``loss`` carries the gradient; all else is detached, on the device, and there for logs and pictures.

    loss, cls_loss, seg_loss, aff_loss  scalars; ``loss`` is the weighted sum
    pos_count, neg_count                pairs in the affinity loss, plus one each (its divisors)
    cam                                 [B, K - 1, H, W] in 0..1
    refined_label, aff_label            [B, H, W] int64: CAM after PAR; CAM after random walk and PAR
    seg_logits                          [B, K, h4, w4]
    affinity                            [B, (2r + 1)^2, h, w] of the largest CAM scale
    """

    loss: Tensor
    cls_loss: Tensor
    seg_loss: Tensor | None = None
    aff_loss: Tensor | None = None
    pos_count: Tensor | None = None
    neg_count: Tensor | None = None
    cam: Tensor | None = None
    refined_label: Tensor | None = None
    aff_label: Tensor | None = None
    seg_logits: Tensor | None = None
    affinity: Tensor | None = None


class TrainingStep:
    """``TrainingStep(model, settings)(batch, iteration) -> StepResult``; the caller runs backward.

    model: an :class:`~afa_model.model.AFA`, wrapped (DDP) or not, in train mode. A CAM-only CNN learns from
    the classification loss alone; the labels made from its CAMs are computed only if asked for.

    batch: ``image`` [B, 3, H, W] normalised, ``cls_labels`` [B, K - 1] multi-hot, optionally ``img_box``
    [B, 4] (best left on the CPU, see pseudo_labels.py).

    Every parameter gets a gradient in every phase (zero where it has no part), so that the optimizer's state
    and DDP need no special case. The loss is finite also where every label is ignored. Nothing here waits for
    the device.
    """

    def __init__(self, model: nn.Module, settings: StepSettings | None = None) -> None:
        self.model = model
        self.bare = getattr(model, "module", model)
        self.settings = settings or StepSettings()
        self._mean = torch.tensor(self.settings.image_mean)[:, None, None]
        self._std = torch.tensor(self.settings.image_std)[:, None, None]

    def __call__(
        self, batch: Mapping[str, Any], iteration: int, everything: bool | None = None
    ) -> StepResult:
        """One step; the first ``iteration`` is 0. ``everything`` overrides ``compute_unused`` this once."""
        s, images = self.settings, batch["image"]
        everything = s.compute_unused if everything is None else everything
        pixels = not self.bare.cam_only
        learns = pixels and iteration > s.cam_iters
        walks = pixels and (everything or iteration > s.aff_iters)

        out = self.model(images, decode=learns or everything)
        cls_loss = classification_loss(out.cls_logits, batch["cls_labels"])
        result = StepResult(loss=cls_loss, cls_loss=cls_loss.detach())
        if learns or everything:
            self._label(result, batch, walks)
        if not pixels or not (learns or everything):
            result.loss = cls_loss + self._no_part()
            return result

        target = result.aff_label if iteration > s.aff_iters else result.refined_label
        seg_loss = segmentation_loss(out.seg_logits, target, IGNORE)
        labels = F.interpolate(result.refined_label[:, None].float(), out.grid, mode="nearest")[:, 0].long()
        aff_loss, result.pos_count, result.neg_count = attention_affinity_loss(
            out.query, out.key, *self.bare.affinity_head(), labels, s.radius, IGNORE
        )
        on = float(learns)
        result.loss = cls_loss + on * s.seg_weight * seg_loss + on * s.aff_weight * aff_loss
        result.seg_loss, result.aff_loss = seg_loss.detach(), aff_loss.detach()
        result.seg_logits = out.seg_logits.detach()
        return result

    @torch.no_grad()
    def _label(self, result: StepResult, batch: Mapping[str, Any], walks: bool) -> None:
        """Fill in CAM and pseudo-labels, with ``walks`` also affinity and random-walk label."""
        s, images, cls_labels = self.settings, batch["image"], batch["cls_labels"]
        self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        images01 = (images.float() * self._std + self._mean).clamp_(0, 1)
        shared = {
            "cls_labels": cls_labels,
            "img_box": batch.get("img_box"),
            "high": s.high_score,
            "low": s.low_score,
            "dilations": s.par_dilations,
            "num_iter": s.par_iters,
        }
        radius = s.radius if walks else None
        result.cam, result.affinity = multi_scale_cam(self.bare, images, s.cam_scales, radius)
        result.refined_label = refine_label(images01, result.cam, **shared)
        if walks:
            walk = {"radius": s.radius, "power": s.walk_power, "eps": s.walk_eps}
            result.aff_label = random_walk_label(images01, result.affinity, result.cam, **shared, **walk)

    def _no_part(self) -> Tensor | float:
        """Zero, with a zero gradient for every parameter of decoder and affinity head."""
        modules = [m for m in (self.bare.decoder, self.bare.attn_proj) if m is not None]
        return sum((0.0 * p.sum() for m in modules for p in m.parameters() if p.requires_grad), 0.0)
