"""Everything one training step computes, from a batch to its loss (section 3.5 and Figure 2)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conventions import IGNORE, denormalize, require
from ..labels.cams import Known, evaluating, multi_scale_cam, same_in_eval_mode
from ..labels.pseudo_labels import (
    PseudoLabels,
    grid_label,
    labels_of_one_diffusion,
    propagate,
    refine_label,
    refine_propagated,
)
from ..labels.settings import LabelSettings
from ..labels.slots import ClassSlots
from ..runtime.collectives import shown_as_mean, sum_over_processes
from ..runtime.phases import phase
from .acceleration import CompiledNetworks, GraphedFunction
from .losses import (
    LossSettings,
    affinity_loss,
    classification_loss,
    energy_loss,
    patch_contrast_loss,
    segmentation_loss,
)


@dataclass
class StepSettings:
    """What a training step depends on. The published runs also set ``cam_mode`` and ``normalise_across``.

    Up to and including iteration ``cam_iters`` (the first iteration is 0) only the classifier learns. Up to
    and including ``aff_iters`` the decoder's target is the refined CAM, after it the random-walk label.

    Args:
        cam_iters: last iteration in which the classifier learns alone.
        aff_iters: last iteration in which the refined CAM is the decoder's target.
        seg_weight: of the segmentation's loss.
        aff_weight: of the affinity's loss.
        aux_weight: of the auxiliary classifier's classification loss, from the first iteration on (where
            ``model.aux_layer`` makes one).
        contrast_weight: of the patch contrast of the last tokens by the auxiliary classifier's CAM, in every phase;
            with 0, without such a classifier or with a frozen backbone it is not computed.
        contrast_from: first iteration of the patch contrast.
        affinity_target: labels that the affinity learns from: refined_cam throughout (VOC), or the segmentation's
            target of the phase (COCO).
        cam_mode: eval: the CAM is made without drop path, and the decoder does not run for it. train: as published, in
            train mode with the decoder, whose batch norm then learns from every pass.
        normalise_across: several processes normalise losses by the pixels and pairs of all of them, and so train as one
            would with all the images. False: each by its own, as published.
        shared_refinement: refine both pseudo-labels in one diffusion of the whole padded crop: faster than the
            published way, which treats the random-walk label image by image inside its box; slightly different near
            box borders.
        compute_unused: compute (for logs) also what the current phase gives no weight, in train mode as all else.
    """

    cam_iters: int = 2000
    aff_iters: int = 6000
    seg_weight: float = 0.1
    aff_weight: float = 0.1
    aux_weight: float = 1.0
    contrast_weight: float = 0.2
    contrast_from: int = 0
    affinity_target: Literal["refined_cam", "segmentation"] = "refined_cam"
    cam_mode: Literal["eval", "train"] = "eval"
    normalise_across: bool = True
    shared_refinement: bool = False
    compute_unused: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.cam_iters <= self.aff_iters:
            raise ValueError(
                "cam_iters, aff_iters: expected 0 <= cam_iters <= aff_iters,"
                f" got {self.cam_iters} and {self.aff_iters}"
            )
        for name in ("aux_weight", "contrast_weight", "contrast_from"):
            require(0 <= getattr(self, name) < math.inf, name, "at least 0", getattr(self, name))
        for name, known in (("affinity_target", ("refined_cam", "segmentation")), ("cam_mode", ("eval", "train"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")


# By the name that it has in the result: a loss and its weight in the sum.
Losses = dict[str, tuple[float, Tensor]]


@dataclass
class StepResult:
    """One step's numbers. What the step did not compute is None.

    ``loss`` carries the gradient; all else is detached, on the device, and there for logs and pictures. Where
    several processes train together the losses are means over them and the counts sums.

    loss, cls_loss, seg_loss, aff_loss, reg_loss, aux_loss, contrast_loss
                                        scalars; ``loss`` is the weighted sum
    pos_count, neg_count                pairs in the affinity loss, plus one each (its divisors)
    seg_logits                          [B, K, h4, w4]
    labels                              :class:`~afa_model.labels.pseudo_labels.PseudoLabels` of the batch
    slots                               the classes of each image, which ``labels`` has channels for
    """

    loss: Tensor
    cls_loss: Tensor
    seg_loss: Tensor | None = None
    aff_loss: Tensor | None = None
    pos_count: Tensor | None = None
    neg_count: Tensor | None = None
    reg_loss: Tensor | None = None
    seg_logits: Tensor | None = None
    labels: PseudoLabels | None = None
    slots: ClassSlots | None = None
    aux_loss: Tensor | None = None
    contrast_loss: Tensor | None = None

    @property
    def refined_label(self) -> Tensor | None:
        """[B, H, W] int64: the CAM after refinement."""
        return self.labels and self.labels.refined_label

    @property
    def aff_label(self) -> Tensor | None:
        """[B, H, W] int64: the CAM after random walk and refinement."""
        return self.labels and self.labels.aff_label

    @property
    def affinity(self) -> Tensor | None:
        """[B, (2r + 1)^2, h, w] of the largest CAM scale."""
        return self.labels and self.labels.affinity

    @property
    def cam(self) -> Tensor | None:
        """[B, K - 1, H, W] in 0..1; 0 for classes that were not computed as the image does not show them."""
        return None if self.labels is None else self.slots.spread(self.labels.cam)


class TrainingStep(nn.Module):
    """``TrainingStep(model)(batch, iteration) -> StepResult``; the caller runs backward.

    It holds the model, and is what DistributedDataParallel wraps.

    model: an :class:`~afa_model.networks.afa.AFA` in train mode. A CAM-only CNN learns from the classification loss
    alone; the labels made from its CAMs are computed only if asked for. Of a frozen backbone
    (``model.freeze_backbone``) nothing is kept for the backward pass, and the CAM's scale 1 is the step's own pass.

    labels: how pixel labels are made, the settings that evaluation starts from too.

    loss: the dense energy loss, which joins the others in the phases in which the decoder learns.

    max_classes: a number of classes that no image exceeds. On a GPU the work per class is done for so many
    only, instead of all K - 1; on the CPU the step looks at the batch.

    compile: run backbone and decoder through ``torch.compile``. cuda_graph: on a GPU, make the pseudo-labels
    (but for a refinement inside boxes, whose shapes vary) in a CUDA graph; crop and batch size must not vary.
    falls_back: which of "compile" and "cuda_graph" are left out, with a line that says so, where they fail.

    batch: ``image`` [B, 3, H, W] normalised, ``cls_labels`` [B, K - 1] multi-hot, optionally ``img_box``
    [B, 4] (best left on the CPU, see pseudo_labels.py).

    Every parameter gets a gradient in every phase (zero where it has no part), so that the optimizer's state
    and DDP need no special case. The loss is finite also where every label is ignored. Nothing here waits for
    the device.

    Several processes with equal batches, whose gradients are averaged (DDP), train with ``normalise_across`` as one
    process with all their images would: the losses are normalised by the counts of all of them. What remains
    different is batch norm in the decoder, unless it is synchronised, and the noise of dropout and drop path.

    Raises:
        ValueError: a CUDA graph asked for together with ``cam_mode`` train, whose noise and batch norm it cannot hold,
            or with the refinement crf.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings | None = None,
        labels: LabelSettings | None = None,
        *,
        loss: LossSettings | None = None,
        max_classes: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        falls_back: Container[str] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings or StepSettings()
        self.labels = labels or LabelSettings()
        self.loss = loss or LossSettings()
        self.max_classes = max_classes
        if cuda_graph and self.settings.cam_mode == "train":
            raise ValueError("cuda_graph: expected cam_mode eval, got train, whose noise a graph cannot hold")
        if cuda_graph and self.labels.refinement == "crf":
            raise ValueError("cuda_graph: expected refinement par, pamr or none, got crf, whose sizes vary")
        self._networks = CompiledNetworks(model, falls_back="compile" in falls_back) if compile else None
        graph = GraphedFunction(self._pseudo_labels, falls_back="cuda_graph" in falls_back) if cuda_graph else None
        self._graph = graph

    def forward(self, batch: Mapping[str, Any], iteration: int, everything: bool | None = None) -> StepResult:
        """One step; the first ``iteration`` is 0. ``everything`` overrides ``compute_unused`` this once, and then
        computes what the phase gives no weight without a trace in the model or the random numbers.
        """
        with self._networks.in_use() if self._networks is not None else nullcontext():
            return self._step(batch, iteration, everything)

    def _step(self, batch: Mapping[str, Any], iteration: int, everything: bool | None) -> StepResult:
        s, images = self.settings, batch["image"]
        pixels = self.model.has_affinity
        learns = pixels and iteration > s.cam_iters
        looked_at = s.compute_unused if everything is None else everything
        decodes = learns or (s.compute_unused and looked_at)
        walks = pixels and (looked_at or iteration > s.aff_iters)

        may_contrast = self._may_contrast()
        contrasts = may_contrast and iteration >= s.contrast_from
        # Before the CAM passes: under autocast they then find the weights cast already, with their gradients.
        with phase("forward"):
            out = self.model(images, decode=decodes)
        labels = slots = None
        if decodes or looked_at or contrasts:
            asked = {"refines": decodes or looked_at, "walks": walks, "aux": contrasts or (may_contrast and looked_at)}
            labels, slots = self._label(batch, out, as_trained=decodes and s.cam_mode == "train", **asked)
        with phase("losses"):
            losses = self._image_losses(batch, out, labels, slots, contrasts)
        if pixels and decodes:
            result = self._pixel_losses(batch, out, losses, labels, iteration, learns)
        else:
            result = _result(losses, {}, extra=self._no_part())
            if pixels and looked_at:
                self._look(batch, labels, iteration, result)
        result.labels, result.slots = labels, slots
        return result

    def _may_contrast(self) -> bool:
        """Whether tokens are contrasted at all; those of a frozen backbone do not learn."""
        model = self.model
        return model.aux_classifier is not None and not model.freeze_backbone and self.settings.contrast_weight > 0

    def _image_losses(
        self, batch: Mapping[str, Any], out: Any, labels: PseudoLabels | None, slots: ClassSlots | None, contrasts: bool
    ) -> Losses:
        """What is learned in every phase; the contrast only shown if not ``contrasts``."""
        s, cls_labels = self.settings, batch["cls_labels"]
        losses = {"cls_loss": (1.0, classification_loss(out.cls_logits, cls_labels))}
        if out.aux_logits is not None:
            losses["aux_loss"] = s.aux_weight, classification_loss(out.aux_logits, cls_labels)
        if labels is not None and labels.aux_cam is not None:
            patches = grid_label(labels.aux_cam, slots, self.labels.scores, out.grid, batch.get("img_box"))
            contrast, _, _ = patch_contrast_loss(out.last_map, patches, IGNORE, across=s.normalise_across)
            losses["contrast_loss"] = s.contrast_weight * contrasts, contrast
        return losses

    @torch.no_grad()
    def _look(
        self, batch: Mapping[str, Any], labels: PseudoLabels, iteration: int, result: StepResult
    ) -> None:
        """What the phase has no use for, to be looked at; in eval mode, so that looking changes nothing: no batch
        norm learns from it and no random number is drawn.
        """
        with evaluating(self.model):
            out = self.model(batch["image"])
        shown = {"cls_loss": (1.0, result.cls_loss)}
        seen = self._pixel_losses(batch, out, shown, labels, iteration, learns=False)
        for name in ("seg_loss", "aff_loss", "reg_loss", "pos_count", "neg_count", "seg_logits"):
            setattr(result, name, getattr(seen, name))

    def _pixel_losses(
        self,
        batch: Mapping[str, Any],
        out: Any,
        losses: Losses,
        labels: PseudoLabels,
        iteration: int,
        learns: bool,
    ) -> StepResult:
        s = self.settings
        target = labels.aff_label if iteration > s.aff_iters else labels.refined_label
        with phase("losses"):
            seg_loss = segmentation_loss(out.seg_logits, target, IGNORE, across=s.normalise_across)
            source = target if s.affinity_target == "segmentation" else labels.refined_label
            grid = F.interpolate(source[:, None].float(), out.grid, mode="nearest")[:, 0].long()
            head = self.model.affinity_head()
            aff_loss, pos_count, neg_count = affinity_loss(
                out.query, out.key, *head, grid, self.labels.radius, IGNORE, across=s.normalise_across
            )
            if not s.normalise_across:
                pos_count, neg_count = sum_over_processes(torch.stack([pos_count, neg_count]) - 1) + 1
        pixel_losses = {"seg_loss": (s.seg_weight, seg_loss), "aff_loss": (s.aff_weight, aff_loss)}
        if self.loss.regularises:
            with phase("energy loss"):
                images01 = denormalize(batch["image"].float())
                energy = energy_loss(out.seg_logits, images01, target, batch.get("img_box"), self.loss)
            pixel_losses["reg_loss"] = self.loss.regularisation, energy
        result = _result(losses, pixel_losses, share=float(learns))
        result.pos_count, result.neg_count = pos_count, neg_count
        result.seg_logits = out.seg_logits.detach()
        return result

    @torch.no_grad()
    def _label(
        self, batch: Mapping[str, Any], out: Any, *, refines: bool, walks: bool, aux: bool, as_trained: bool
    ) -> tuple[PseudoLabels, ClassSlots]:
        """The CAM; with ``refines`` pseudo-labels, with ``walks`` also affinity and random-walk label, with ``aux`` the
        auxiliary classifier's CAM; and the batch's classes. ``out``: of the training pass.
        """
        images, img_box = batch["image"], batch.get("img_box")
        slots = ClassSlots.of(batch["cls_labels"], self.max_classes)
        known = Known()
        if same_in_eval_mode(self.model.encoder) and not as_trained:
            # Exact without drop path only, with which the training pass is not what the CAM needs.
            known = Known.of(out, self.labels.cam_scales, affinity=walks, aux=aux)
        options = {"count": slots.count, "refines": refines, "walks": walks, "aux": aux, "as_trained": as_trained}
        inputs = images, slots.classes, slots.present
        if self._graph is None:
            labels = self._pseudo_labels(*inputs, img_box, *known, **options)
        else:
            box = None if img_box is None else img_box.to(images.device, non_blocking=True)
            labels = self._graph(*inputs, box, *known, key=(refines, walks, aux), **options)
        if walks and labels.aff_label is None:
            label = refine_propagated(denormalize(images.float()), labels.walked, slots, self.labels, img_box)
            labels = labels._replace(aff_label=label)
        return labels, slots

    def _pseudo_labels(
        self,
        images: Tensor,
        classes: Tensor,
        present: Tensor,
        img_box: Tensor | None,
        *known: Tensor | None,
        count: int,
        walks: bool,
        refines: bool = True,
        aux: bool = False,
        as_trained: bool = False,
    ) -> PseudoLabels:
        """All that a CUDA graph can hold; ``aff_label`` only with shared refinement."""
        how, slots = self.labels, ClassSlots(classes, present, count)
        with phase("CAM"):
            radius = how.radius if walks else None
            cam, affinity, aux_cam = multi_scale_cam(
                self.model, images, how.cam_scales, radius, slots, Known(*known), as_trained, aux
            )
        if not refines:
            return PseudoLabels(cam, aux_cam=aux_cam)
        images01 = denormalize(images.float())
        walked = aff_label = None
        if walks:
            walked = propagate(affinity, cam, slots, how, how.scores)
        if walks and self.settings.shared_refinement:
            refined, aff_label = labels_of_one_diffusion(images01, walked, cam, slots, how, how.scores, img_box)
        else:
            refined = refine_label(images01, cam, slots, how, how.scores, img_box)
        return PseudoLabels(cam, refined, affinity, walked, aff_label, aux_cam)

    def _no_part(self) -> Tensor | float:
        """Zero, with a zero gradient for every parameter of decoder and affinity head."""
        modules = [m for m in (self.model.decoder, self.model.attn_proj) if m is not None]
        return sum((0.0 * p.sum() for m in modules for p in m.parameters() if p.requires_grad), 0.0)


def _result(losses: Losses, pixel_losses: Losses, share: float = 0.0, extra: Tensor | float = 0.0) -> StepResult:
    """The sum of both, of the second ``share`` times, and each by its name; ``extra`` joins the sum."""
    loss = sum(weight * value for weight, value in losses.values()) + extra
    if pixel_losses:
        loss = loss + share * sum(weight * value for weight, value in pixel_losses.values())
    named = losses | pixel_losses
    loss, *parts = shown_as_mean(loss, *(value for _, value in named.values()))
    return StepResult(loss, **{name: part.detach() for name, part in zip(named, parts)})
