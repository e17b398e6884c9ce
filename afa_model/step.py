"""Everything one training step computes, from a batch to its loss (section 3.5 and Figure 2)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_model.acceleration import CompiledNetworks, GraphedFunction
from afa_model.cams import class_slots, multi_scale_cam, same_in_eval_mode
from afa_model.collective import shown_as_mean
from afa_model.losses import affinity_loss, classification_loss, segmentation_loss
from afa_model.phases import phase
from afa_model.pseudo_labels import (
    IGNORE,
    labels_of_one_diffusion,
    propagate,
    refine_label,
    refine_propagated,
)


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
    shared_refinement: bool = False
    """Refine both pseudo-labels in one diffusion of the whole padded crop: faster than the published way,
    which treats the random-walk label image by image inside its box; slightly different near box borders."""
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


class PseudoLabels(NamedTuple):
    """What a step makes of an image and its image-level labels, S class slots an image.

    classes        [B, S] int64, of class_slots
    cam            [B, S, H, W] in 0..1
    refined_label  [B, H, W] int64: CAM after PAR
    affinity       [B, (2r + 1)^2, h, w] of the largest CAM scale, or None
    walked         [B, 1 or 2 scores x (S + 1), h, w] after the random walk, or None
    aff_label      [B, H, W] int64: CAM after random walk and PAR, or None
    """

    classes: Tensor
    cam: Tensor
    refined_label: Tensor
    affinity: Tensor | None = None
    walked: Tensor | None = None
    aff_label: Tensor | None = None


@dataclass
class StepResult:
    """One step's numbers. What the step did not compute is None.

    ``loss`` carries the gradient; all else is detached, on the device, and there for logs and pictures. Where
    several processes train together the losses are means over them and the counts sums.

    loss, cls_loss, seg_loss, aff_loss  scalars; ``loss`` is the weighted sum
    pos_count, neg_count                pairs in the affinity loss, plus one each (its divisors)
    refined_label, aff_label            [B, H, W] int64: CAM after PAR; CAM after random walk and PAR
    seg_logits                          [B, K, h4, w4]
    affinity                            [B, (2r + 1)^2, h, w] of the largest CAM scale
    class_cam, classes                  [B, S, H, W] and [B, S]: the CAM of each image's own classes, and which
    """

    loss: Tensor
    cls_loss: Tensor
    seg_loss: Tensor | None = None
    aff_loss: Tensor | None = None
    pos_count: Tensor | None = None
    neg_count: Tensor | None = None
    refined_label: Tensor | None = None
    aff_label: Tensor | None = None
    seg_logits: Tensor | None = None
    affinity: Tensor | None = None
    class_cam: Tensor | None = None
    classes: Tensor | None = None
    class_count: int = 0

    @property
    def cam(self) -> Tensor | None:
        """[B, K - 1, H, W] in 0..1; 0 for classes that were not computed as the image does not show them."""
        if self.class_cam is None:
            return None
        batch, _, height, width = self.class_cam.shape
        cam = self.class_cam.new_zeros(batch, self.class_count, height, width)
        return cam.scatter_(1, self.classes[:, :, None, None].expand_as(self.class_cam), self.class_cam)


class TrainingStep:
    """``TrainingStep(model, settings)(batch, iteration) -> StepResult``; the caller runs backward.

    model: an :class:`~afa_model.model.AFA`, wrapped (DDP) or not, in train mode. A CAM-only CNN learns from
    the classification loss alone; the labels made from its CAMs are computed only if asked for.

    max_classes: a number of classes that no image exceeds. On a GPU the work per class is done for so many
    only, instead of all K - 1; on the CPU the step looks at the batch.

    compile: run backbone and decoder through ``torch.compile``. cuda_graph: on a GPU, make the pseudo-labels
    (but for a refinement inside boxes, whose shapes vary) in a CUDA graph; crop and batch size must not vary.

    batch: ``image`` [B, 3, H, W] normalised, ``cls_labels`` [B, K - 1] multi-hot, optionally ``img_box``
    [B, 4] (best left on the CPU, see pseudo_labels.py).

    Every parameter gets a gradient in every phase (zero where it has no part), so that the optimizer's state
    and DDP need no special case. The loss is finite also where every label is ignored. Nothing here waits for
    the device.

    Several processes with equal batches, whose gradients are averaged (DDP), train as one process with all
    their images would: the losses are normalised by the counts of all of them. What remains different is batch
    norm in the decoder, unless it is synchronised, and the noise of dropout and drop path.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings | None = None,
        *,
        max_classes: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.model = model
        self.bare = getattr(model, "module", model)
        self.settings = settings or StepSettings()
        self.max_classes = max_classes
        self._networks = CompiledNetworks(self.bare) if compile else None
        self._graph = GraphedFunction(self._pseudo_labels) if cuda_graph else None
        self._mean = torch.tensor(self.settings.image_mean)[:, None, None]
        self._std = torch.tensor(self.settings.image_std)[:, None, None]

    def __call__(
        self, batch: Mapping[str, Any], iteration: int, everything: bool | None = None
    ) -> StepResult:
        """One step; the first ``iteration`` is 0. ``everything`` overrides ``compute_unused`` this once."""
        with self._networks.in_use() if self._networks is not None else nullcontext():
            return self._step(batch, iteration, everything)

    def _step(self, batch: Mapping[str, Any], iteration: int, everything: bool | None) -> StepResult:
        s, images = self.settings, batch["image"]
        everything = s.compute_unused if everything is None else everything
        pixels = not self.bare.cam_only
        learns = pixels and iteration > s.cam_iters
        walks = pixels and (everything or iteration > s.aff_iters)

        # Before the CAM passes: under autocast they then find the weights cast already, with their gradients.
        with phase("forward"):
            out = self.model(images, decode=learns or everything)
        labels = self._label(batch, walks, out.last_map) if learns or everything else None
        with phase("losses"):
            cls_loss = classification_loss(out.cls_logits, batch["cls_labels"])
            if not pixels or labels is None:
                loss, cls_loss = shown_as_mean(cls_loss + self._no_part(), cls_loss)
                result = StepResult(loss, cls_loss.detach())
            else:
                result = self._pixel_losses(out, cls_loss, labels, iteration, learns)
        if labels is not None:
            result.refined_label, result.aff_label = labels.refined_label, labels.aff_label
            result.affinity, result.class_cam, result.classes = labels.affinity, labels.cam, labels.classes
            result.class_count = batch["cls_labels"].shape[1]
        return result

    def _pixel_losses(
        self, out: Any, cls_loss: Tensor, labels: PseudoLabels, iteration: int, learns: bool
    ) -> StepResult:
        s = self.settings
        target = labels.aff_label if iteration > s.aff_iters else labels.refined_label
        seg_loss = segmentation_loss(out.seg_logits, target, IGNORE, across=True)
        grid = F.interpolate(labels.refined_label[:, None].float(), out.grid, mode="nearest")[:, 0].long()
        head = self.bare.affinity_head()
        aff_loss, pos_count, neg_count = affinity_loss(
            out.query, out.key, *head, grid, s.radius, IGNORE, across=True
        )
        loss = cls_loss + float(learns) * (s.seg_weight * seg_loss + s.aff_weight * aff_loss)
        loss, *parts = shown_as_mean(loss, cls_loss, seg_loss, aff_loss)
        parts = [part.detach() for part in parts]
        return StepResult(loss, *parts, pos_count, neg_count, seg_logits=out.seg_logits.detach())

    @torch.no_grad()
    def _label(self, batch: Mapping[str, Any], walks: bool, last_map: Tensor) -> PseudoLabels:
        """CAM and pseudo-labels, with ``walks`` also affinity and random-walk label."""
        images, img_box = batch["image"], batch.get("img_box")
        self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        inputs = images, batch["cls_labels"]
        if self._graph is None:
            # Exact without drop path only, with which the training pass is not what the CAM needs.
            known = last_map if same_in_eval_mode(self.bare.encoder) else None
            labels = self._pseudo_labels(*inputs, img_box, known, walks=walks)
        else:
            box = None if img_box is None else img_box.to(images.device, non_blocking=True)
            labels = self._graph(*inputs, box, None, key=walks, walks=walks)
        if walks and labels.aff_label is None:
            s, (classes, present) = self.settings, class_slots(batch["cls_labels"], self.max_classes)
            images01 = self._images01(images)
            label = refine_propagated(images01, labels.walked, present, img_box, s.par_dilations, s.par_iters)
            labels = labels._replace(aff_label=_name(label, classes))
        return labels

    def _images01(self, images: Tensor) -> Tensor:
        return (images.float() * self._std + self._mean).clamp_(0, 1)

    def _pseudo_labels(
        self, images: Tensor, cls_labels: Tensor, img_box: Tensor | None, last_map: Tensor | None, walks: bool
    ) -> PseudoLabels:
        """All that a CUDA graph can hold; ``aff_label`` only with shared refinement."""
        s = self.settings
        scores = {"high": s.high_score, "low": s.low_score}
        how = {**scores, "dilations": s.par_dilations, "num_iter": s.par_iters}
        with phase("CAM"):
            classes, present = class_slots(cls_labels, self.max_classes)
            radius = s.radius if walks else None
            cam, affinity = multi_scale_cam(self.bare, images, s.cam_scales, radius, classes, last_map)
            images01 = self._images01(images)
        walked = aff_label = None
        if walks:
            walked = propagate(affinity, cam, present, s.radius, power=s.walk_power, eps=s.walk_eps, **scores)
        if walks and s.shared_refinement:
            refined, aff_label = labels_of_one_diffusion(images01, walked, cam, present, img_box, **how)
            aff_label = _name(aff_label, classes)
        else:
            refined = refine_label(images01, cam, present, img_box, **how)
        return PseudoLabels(classes, cam, _name(refined, classes), affinity, walked, aff_label)

    def _no_part(self) -> Tensor | float:
        """Zero, with a zero gradient for every parameter of decoder and affinity head."""
        modules = [m for m in (self.bare.decoder, self.bare.attn_proj) if m is not None]
        return sum((0.0 * p.sum() for m in modules for p in m.parameters() if p.requires_grad), 0.0)


def _name(slots: Tensor, classes: Tensor) -> Tensor:
    """Labels that number an image's slots from 1 [B, H, W] -> labels that number the classes."""
    names = F.pad(classes + 1, (1, 0))
    known = slots != IGNORE
    named = names.gather(1, torch.where(known, slots, 0).flatten(1)).view_as(slots)
    return torch.where(known, named, IGNORE)
