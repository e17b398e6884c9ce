"""AFA: a transformer backbone, its class activation maps, segmentation decoder and affinity from attention.

Source: Ru et al., AFA (CVPR 2022), section 3 and Figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_kernels import window_affinity

from .backbone import Abilities, Pyramid, cropped, pyramid
from .create import create_backbone
from .decoder import DECODERS
from .hub import HubModel


class AFAResult(NamedTuple):
    """What ``AFA.forward`` gives. For a CNN only ``cls_logits`` and ``grid`` are there, the rest is None.

    cls_logits  [B, K - 1] image-level scores of the foreground classes, before the sigmoid
    seg_logits  [B, K, h4, w4] pixel scores, background first: at a quarter of the image of a MiT (``largefov``: on the
                grid), of a Vision Transformer on the grid (:meth:`AFA.cropped` where the image is not whole patches)
    query, key  [B, heads, h w, d] of the last ``affinity_blocks`` blocks side by side, unscaled
    grid        (h, w) of the last stage: ceil(H / 16), ceil(W / 16) with the default stride, or patches of 16
    last_map    [B, dim, h, w] the last stage's output, from which class scores and CAM are made
    aux_logits  [B, K - 1] image-level scores of the auxiliary classifier; None without ``aux_layer``
    aux_map     [B, dim, h, w] the tokens it sees
    """

    cls_logits: Tensor
    seg_logits: Tensor | None
    query: Tensor | None
    key: Tensor | None
    grid: tuple[int, int]
    last_map: Tensor | None = None
    aux_logits: Tensor | None = None
    aux_map: Tensor | None = None


class Attended(NamedTuple):
    """What ``AFA.cam_and_attention`` gives: CAM [B, K - 1, h, w] before ReLU, query and key as above, and the auxiliary
    classifier's CAM, of the same shape, or None."""

    cam: Tensor
    query: Tensor | None
    key: Tensor | None
    aux_cam: Tensor | None = None


class AFA(nn.Module, HubModel):
    """AFA with a MiT or a Vision Transformer, or the CAM-only baseline of the paper's Figure 3a with a CNN of timm's.

    Args:
        backbone: ``mit_b0`` .. ``mit_b5``; a Vision Transformer of timm's (:mod:`.vit` says what it must have); or a
            convolutional timm model such as ``resnet50``. The latter has no attention: it classifies and gives CAMs;
            ``seg_logits``, ``query`` and ``key`` are None and :meth:`affinity` raises ValueError.
        num_classes: K, background included (21 for VOC, 81 for COCO).
        stride: of the four patch embeddings: (4, 2, 2, 1) in AFA, (4, 2, 2, 2) in SegFormer. A CNN takes the
            product; of a Vision Transformer the patches decide, and another product is an error.
        pooling: ``gmp`` (max, as published) or ``gap`` (average) over the last map, before the classifier.
        pretrained: False for random weights; a file of ImageNet weights (for MiT in the public or the Hugging
            Face layout, for a Vision Transformer as :mod:`.vit_weights` reads them, for a CNN in timm's); True to let
            timm fetch them.
        embedding: width of the decoder; None: 256 of ``segformer``, 512 of ``largefov``.
        decoder_dropout: probability of dropping a whole channel of it.
        backbone_args: further arguments for ``timm.create_model``, e.g. ``{"drop_path_rate": 0.1}``.
        decoder: ``segformer`` or ``largefov`` (:mod:`.decoder`).
        aux_layer: block of a Vision Transformer whose tokens a second classifier sees, ``aux_classifier``, pooled as
            the last map is; negative counts from the end. Source: Ru et al., ToCo (CVPR 2023), section 3.2, where it
            is -3: CAM of an intermediate block keeps the last tokens from becoming uniform.
        affinity_blocks: how many of the last blocks give queries and keys (2 in AFA; all if there are fewer).
        freeze_backbone: the backbone runs without gradients and in eval mode, whatever mode the model is in.

    ``AFA.from_pretrained``, ``save_pretrained`` and ``push_to_hub`` are the Hugging Face Hub's: see :mod:`.hub`.

    Raises:
        ValueError: an argument is out of range, timm has no such backbone, or the weights do not fit it.
        FileNotFoundError: no file at ``pretrained``.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        stride: Sequence[int] = (4, 2, 2, 1),
        pooling: str = "gmp",
        pretrained: bool | str | Path = False,
        *,
        embedding: int | None = None,
        decoder_dropout: float = 0.1,
        backbone_args: Mapping[str, Any] | None = None,
        decoder: str = "segformer",
        aux_layer: int | None = None,
        affinity_blocks: int = 2,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more (background included), got {num_classes}")
        if pooling not in ("gmp", "gap"):
            raise ValueError(f"pooling: expected 'gmp' or 'gap', got {pooling!r}")
        if len(stride) != 4:
            raise ValueError(f"stride: expected four integers such as (4, 2, 2, 1), got {tuple(stride)}")
        if decoder not in DECODERS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {decoder!r}")
        if affinity_blocks < 1:
            raise ValueError(f"affinity_blocks: expected at least 1, got {affinity_blocks}")
        embedding = DECODERS[decoder].EMBEDDING if embedding is None else embedding
        self.backbone, self.num_classes, self.pooling = backbone, num_classes, pooling
        self.stride = tuple(int(s) for s in stride)
        self.arguments = {
            "backbone": backbone,
            "num_classes": int(num_classes),
            "stride": list(self.stride),
            "pooling": pooling,
            "embedding": int(embedding),
            "decoder_dropout": float(decoder_dropout),
            "backbone_args": dict(backbone_args or {}),
            "decoder": decoder,
            "aux_layer": None if aux_layer is None else int(aux_layer),
            "affinity_blocks": int(affinity_blocks),
            "freeze_backbone": bool(freeze_backbone),
        }
        self.encoder = create_backbone(
            backbone, self.stride, pretrained, dict(backbone_args or {}), affinity_blocks, aux_layer
        )
        abilities = self.abilities = Abilities.of(self.encoder)
        dim = abilities.widths[-1]
        self.decoder = self.attn_proj = None
        if abilities.affinity_heads is not None:
            self.decoder = DECODERS[decoder](abilities.widths, num_classes, embedding, decoder_dropout)
            self.attn_proj = nn.Conv2d(abilities.affinity_heads, 1, 1)
            # As published, and four times what a convolution starts with: scores spread over the sigmoid.
            nn.init.kaiming_normal_(self.attn_proj.weight, a=5**0.5, mode="fan_out")
        self.classifier = nn.Conv2d(dim, num_classes - 1, 1, bias=False)
        self.aux_classifier = None if aux_layer is None else nn.Conv2d(dim, num_classes - 1, 1, bias=False)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.encoder.requires_grad_(False).eval()

    @property
    def has_affinity(self) -> bool:
        """Whether there is attention to make an affinity of; else the model classifies and gives CAMs only."""
        return self.attn_proj is not None

    @property
    def cell(self) -> int:
        """Pixels of the image's side to a cell of the grid."""
        return getattr(self.encoder, "cell", math.prod(self.stride))

    def train(self, mode: bool = True) -> AFA:
        """As of any module, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.encoder.eval()
        return self

    def _encode(self, images: Tensor) -> Pyramid:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            return pyramid(self.encoder, images)

    def _scores(self, last: Tensor, classifier: nn.Conv2d) -> Tensor:
        pooled = last.amax((2, 3)) if self.pooling == "gmp" else last.mean((2, 3))
        return F.linear(pooled, classifier.weight.flatten(1))

    def forward(self, images: Tensor, decode: bool = True) -> AFAResult:
        """images [B, 3, H, W], normalised with ImageNet's mean and deviation -> :class:`AFAResult`.

        ``decode=False`` leaves the decoder out and ``seg_logits`` None.
        """
        maps, query, key, aux = self._encode(images)
        last = maps[-1]
        seg_logits = None
        if decode and self.decoder is not None:
            seg_logits = self.cropped(self.decoder(maps), (images.shape[2], images.shape[3]))
        grid = (last.shape[2], last.shape[3])
        aux_logits = None if aux is None else self._scores(aux, self.aux_classifier)
        return AFAResult(self._scores(last, self.classifier), seg_logits, query, key, grid, last, aux_logits, aux)

    def cam(self, images: Tensor) -> Tensor:
        """Class activation maps [B, K - 1, h, w] of the last map, before ReLU; the decoder does not run."""
        return self.cam_and_attention(images).cam

    def cam_and_attention(self, images: Tensor, decode: bool = False) -> Attended:
        """The CAM and the queries and keys of the same pass, for when the affinity is wanted too.

        ``decode``: run the decoder as well, for what its batch norm learns from the pass.
        """
        maps, query, key, aux = self._encode(images)
        if decode and self.decoder is not None:
            self.decoder(maps)
        aux_cam = None if aux is None else F.conv2d(aux, self.aux_classifier.weight)
        return Attended(F.conv2d(maps[-1], self.classifier.weight), query, key, aux_cam)

    def cropped(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps on the grid of images of ``size`` (height, width), such as CAMs, without what lies over padding: resized
        to the images they are where they belong. A MiT and a CNN pad nothing: theirs stay as they are.
        """
        return cropped(self.encoder, maps, size)

    def affinity(self, result: AFAResult, radius: int = 8) -> Tensor:
        """Affinity of each grid pixel with its window: [B, (2 radius + 1)^2, h, w] in 0..1 (section 3.2).

        Taps are row-major in (dy, dx); pairs outside the grid are 0. ValueError where there is no attention.
        """
        self.require_attention("affinity")
        return window_affinity(result.query, result.key, *self.affinity_head(), *result.grid, radius)

    def affinity_head(self) -> tuple[Tensor, Tensor]:
        """Weight [heads] and bias [1] that turn the scores of all heads into one affinity."""
        self.require_attention("affinity_head")
        return self.attn_proj.weight.flatten(), self.attn_proj.bias

    def require_attention(self, what: str) -> None:
        """ValueError naming ``what`` if the backbone is a CNN."""
        if not self.has_affinity:
            raise ValueError(
                f"{what}: {self.backbone} has no attention and gives CAMs only; take mit_b0 .. mit_b5 or a Vision"
                " Transformer instead"
            )
