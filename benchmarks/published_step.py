"""The training step the way it was published: the yardstick of ``bench_train_step.py``.

Same weights, same results as :class:`afa_model.training.step.TrainingStep` (the benchmark checks that), other means:

- every block forms its raw attention maps and keeps them all; those with reduced keys are pooled over the queries
  to a square, and thrown away; the 16 of the last stage are added to their transposes and projected to one
  dense affinity [B, N, N], in every pass;
- a CAM pass is a whole forward pass, decoder included, of the image and its mirror image, at three scales;
- the decoder upsamples four projections to a quarter of the image and fuses their concatenation;
- pseudo-labels image by image, each background score on its own, with PAR's reference operator;
- random walk and affinity loss on dense N x N matrices, the window as a mask.

One difference: as published the CAM passes run in train mode, so drop path is noise in the labels and they move the
decoder's batch norm; here they run in eval mode, which costs the same and makes the results comparable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afa_kernels
from afa_kernels.bench.published import affinity_loss, transition
from afa_kernels.ops.affinity.reference import dense_affinity, window_mask
from afa_model.conventions import IGNORE, MEAN, STD
from afa_model.labels.cams import evaluating
from afa_model.labels.pseudo_labels import PseudoLabels
from afa_model.labels.settings import LabelSettings
from afa_model.networks.afa import AFA
from afa_model.runtime.phases import phase
from afa_model.training.losses import classification_loss
from afa_model.training.step import StepResult, StepSettings


def bilinear(x: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


# --- the network ----------------------------------------------------------------------------------------------


class Passed(NamedTuple):
    """cls_logits [B, K - 1], seg_logits [B, K, h4, w4], cam [B, K - 1, h, w], affinity [B, N, N], grid (h, w)."""

    cls_logits: Tensor
    seg_logits: Tensor
    cam: Tensor
    affinity: Tensor
    grid: tuple[int, int]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def image_of(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def attention(layer: nn.Module, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """-> attended tokens [B, N, C]; raw maps [B, heads, M, M] of M keys, pooled over the queries."""
    batch, count, dim = x.shape
    heads = layer.heads
    query = linear(layer.q, x).view(batch, count, heads, -1).transpose(1, 2)
    source, ratio = x, layer.sr_ratio
    if ratio > 1:
        source = layer.norm(layer.sr(image_of(x, height, width)).flatten(2).transpose(1, 2))
    key, value = linear(layer.kv, source).view(batch, -1, 2, heads, dim // heads).permute(2, 0, 3, 1, 4)
    maps = query @ key.transpose(2, 3)
    x = (maps / (dim // heads) ** 0.5).softmax(3) @ value
    x = linear(layer.proj, x.transpose(1, 2).reshape(batch, count, dim))
    if ratio > 1:
        rows, columns = height // ratio, width // ratio
        cells = maps.view(batch, heads, height, width, -1)[:, :, : rows * ratio, : columns * ratio]
        cells = cells.reshape(batch, heads, rows, ratio, columns, ratio, -1)
        maps = cells.mean((3, 5)).flatten(2, 3)
    return x, maps


def block(layer: nn.Module, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    attended, maps = attention(layer.attn, layer.norm1(x), height, width)
    x = x + layer.drop_path(attended)
    hidden = linear(layer.mlp.fc1, layer.norm2(x))
    hidden = layer.mlp.dwconv.dwconv(image_of(hidden, height, width)).flatten(2).transpose(1, 2)
    return x + layer.drop_path(linear(layer.mlp.fc2, F.gelu(hidden))), maps


def decode(decoder: nn.Module, pyramid: list[Tensor]) -> Tensor:
    size = pyramid[0].shape[2:]
    layers = decoder.linear_c4.proj, decoder.linear_c3.proj, decoder.linear_c2.proj, decoder.linear_c1.proj
    wide = []
    for x, layer in zip(reversed(pyramid), layers):
        projected = image_of(linear(layer, x.flatten(2).transpose(1, 2)), *x.shape[2:])
        wide.append(projected if projected.shape[2:] == size else bilinear(projected, size))
    fused = decoder.linear_fuse.conv(torch.cat(wide, 1))
    return decoder.linear_pred(decoder.dropout(F.relu(decoder.linear_fuse.bn(fused))))


def whole_pass(model: AFA, images: Tensor) -> Passed:
    """A forward pass with everything in it."""
    x, pyramid, maps = images, [], []
    for stage in range(1, 5):
        x = getattr(model.encoder, f"patch_embed{stage}").proj(x)
        height, width = x.shape[2:]
        x = getattr(model.encoder, f"patch_embed{stage}").norm(x.flatten(2).transpose(1, 2))
        for layer in getattr(model.encoder, f"block{stage}"):
            x, own = block(layer, x, height, width)
            maps.append(own)
        x = image_of(getattr(model.encoder, f"norm{stage}")(x), height, width)
        pyramid.append(x)
    affinity = dense_affinity(torch.cat(maps[-model.encoder.affinity_blocks :], 1), *model.affinity_head())
    cls_logits = model.classifier(F.adaptive_max_pool2d(x, 1)).flatten(1)
    cam = F.conv2d(x, model.classifier.weight)
    return Passed(cls_logits, decode(model.decoder, pyramid), cam, affinity, (height, width))


@torch.no_grad()
def multi_scale_cam(model: AFA, images: Tensor, scales: tuple[float, ...]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """-> CAM [B, K - 1, H, W] in 0..1, affinity [B, N, N] of the largest scale, its grid."""
    size, total = images.shape[2:], []
    with evaluating(model):
        for scale in scales:
            x = images if scale == 1 else bilinear(images, [int(side * scale) for side in size])
            out = whole_pass(model, torch.cat([x, x.flip(3)]))
            if scale == max(scales):
                affinity, grid = out.affinity[: len(x)], out.grid
            plain, mirrored = bilinear(out.cam, size).chunk(2)
            total.append(F.relu(torch.maximum(plain, mirrored.flip(3))))
    cam = torch.stack(total).sum(0)
    cam = cam - cam.amin((2, 3), keepdim=True)
    return cam / (cam.amax((2, 3), keepdim=True) + 1e-5), affinity, grid


# --- pseudo-labels --------------------------------------------------------------------------------------------


def halves(x: Tensor) -> Tensor:
    return bilinear(x, [side // 2 for side in x.shape[2:]])


def decide(low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high > 0, high, torch.where(low > 0, IGNORE, 0))


def strongest(refined: Tensor, size: tuple[int, int], keys: Tensor) -> Tensor:
    return keys[bilinear(refined, size).argmax(1)[0]]


def with_background(cam: Tensor, score: float) -> Tensor:
    return torch.cat([torch.full_like(cam[:, :1], score), cam], 1).softmax(1)


def refine(image01: Tensor, stack: Tensor, settings: LabelSettings) -> Tensor:
    return afa_kernels.par(
        image01, stack, settings.dilations, settings.num_iter, backend="reference"
    )


def refined_labels(
    images01: Tensor, cam: Tensor, cls_labels: Tensor, boxes: list[list[int]], settings: LabelSettings
) -> Tensor:
    labels = torch.full((len(cam), *cam.shape[2:]), IGNORE, device=cam.device)
    for i, (y0, y1, x0, x1) in enumerate(boxes):
        valid = cls_labels[i].nonzero()[:, 0]
        keys = F.pad(valid + 1, (1, 0))
        image, small = halves(images01[i : i + 1]), halves(cam[i : i + 1, valid])
        made = []
        for score in (settings.low_score, settings.high_score):
            refined = refine(image, with_background(small, score), settings)
            made.append(strongest(refined, cam.shape[2:], keys))
        labels[i, y0:y1, x0:x1] = decide(*made)[y0:y1, x0:x1]
    return labels


def walked_stacks(
    affinity: Tensor, grid: tuple[int, int], cam: Tensor, cls_labels: Tensor, settings: LabelSettings
) -> list[list[Tensor]]:
    """For each image and score: [1, 1 + classes, h, w] after the random walk."""
    window = window_mask(*grid, settings.radius, affinity.device)
    result = []
    for i in range(len(cam)):
        valid = cls_labels[i].nonzero()[:, 0]
        small = bilinear(cam[i : i + 1, valid], grid)
        stacks = []
        for score in (settings.low_score, settings.high_score):
            matrix = transition(affinity[i], window, settings.walk_power, settings.walk_eps)
            walked = matrix @ with_background(small, score)[0].flatten(1).t()
            stacks.append(walked.t().unflatten(1, grid)[None])
        result.append(stacks)
    return result


def walked_labels(
    images01: Tensor,
    stacks: list[list[Tensor]],
    cls_labels: Tensor,
    boxes: list[list[int]],
    settings: LabelSettings,
) -> Tensor:
    size = images01.shape[2:]
    labels = torch.full((len(images01), *size), IGNORE, device=images01.device)
    for i, (y0, y1, x0, x1) in enumerate(boxes):
        keys = F.pad(cls_labels[i].nonzero()[:, 0] + 1, (1, 0))
        image = halves(images01[i : i + 1, :, y0:y1, x0:x1])
        made = []
        for stack in stacks[i]:
            refined = refine(image, bilinear(stack, size)[:, :, y0:y1, x0:x1], settings)
            made.append(strongest(refined, (y1 - y0, x1 - x0), keys))
        labels[i, y0:y1, x0:x1] = decide(*made)
    return labels


# --- losses ---------------------------------------------------------------------------------------------------


def segmentation_loss(seg_logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over an empty half is NaN here, as published."""
    logits = bilinear(seg_logits, labels.shape[1:])
    background = torch.where(labels == 0, labels, IGNORE)
    foreground = torch.where(labels == 0, IGNORE, labels)
    halves = [F.cross_entropy(logits, half, ignore_index=IGNORE) for half in (background, foreground)]
    return 0.5 * (halves[0] + halves[1])


class PublishedStep:
    """Called like :class:`afa_model.training.step.TrainingStep`; all phases are computed at every iteration."""

    def __init__(self, model: AFA, settings: StepSettings | None = None, labels: LabelSettings | None = None) -> None:
        self.model, self.settings, self.labels = model, settings or StepSettings(), labels or LabelSettings()

    def __call__(self, batch: Mapping[str, Any], iteration: int) -> StepResult:
        s, how, images, cls_labels = self.settings, self.labels, batch["image"], batch["cls_labels"]
        with phase("forward"):
            out = whole_pass(self.model, images)
        with torch.no_grad():
            with phase("CAM"):
                mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
                images01 = images * std + mean
                cam, affinity, grid = multi_scale_cam(self.model, images, how.cam_scales)
            boxes = batch["img_box"].tolist()
            with phase("random walk"):
                stacks = walked_stacks(affinity, grid, cam, cls_labels, how)
            with phase("PAR"):
                refined_label = refined_labels(images01, cam, cls_labels, boxes, how)
                aff_label = walked_labels(images01, stacks, cls_labels, boxes, how)
        with phase("losses"):
            cls_loss = classification_loss(out.cls_logits, cls_labels)
            seg_loss = segmentation_loss(out.seg_logits, aff_label if iteration > s.aff_iters else refined_label)
            labels = F.interpolate(refined_label[:, None].float(), out.grid, mode="nearest")[:, 0].long()
            window = window_mask(*out.grid, how.radius, images.device)
            aff_loss, pos_count, neg_count = affinity_loss(out.affinity, labels, window)
            learns = float(iteration > s.cam_iters)
            loss = cls_loss + learns * (s.seg_weight * seg_loss + s.aff_weight * aff_loss)
        return StepResult(
            loss,
            *(part.detach() for part in (cls_loss, seg_loss, aff_loss, pos_count, neg_count)),
            seg_logits=out.seg_logits.detach(),
            labels=PseudoLabels(cam, refined_label, affinity, None, aff_label),
        )
