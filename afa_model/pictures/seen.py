"""What models see in one photograph, made small enough to draw: what the figures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..data.transforms import normalize
from ..labels.evidence import MapSettings, affinity_image
from ..labels.label_maps import label_maps
from ..labels.settings import LabelSettings
from .attention import attention_of, attention_window, cells_of, check_cells, walked_cam
from .overlays import thumbnail
from .panels import peak_of

CLASSIFIER = "classifier"  # where an image's classes are from if nobody knows them
GIVEN = "given"  # if whoever calls knows them
SIDE = 800  # pixels along the longer side of what is drawn


@dataclass(frozen=True)
class Photograph:
    """One photograph and what is known of it.

    Attributes:
        name: what it is called in the figure.
        pixels: uint8 [3, H, W].
        cls_labels: [K - 1] of 0 and 1, the classes it is known to show; None: those the classifier finds count.
        source: where those are from: ``mask``, ``label file``, ``--labels``; for captions.
        mask: uint8 [H, W], 0..K-1 and 255: the truth, where it is known.
        point: (y, x), the pixel whose attention and affinity are shown; None: the CAM's peak.
    """

    name: str
    pixels: Tensor
    cls_labels: Tensor | None = None
    source: str = GIVEN
    mask: np.ndarray | None = None
    point: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        height, width = self.pixels.shape[1:]
        if self.point is not None and not (0 <= self.point[0] < height and 0 <= self.point[1] < width):
            y, x = self.point
            raise ValueError(
                f"point: expected a pixel X,Y inside {self.name} (0..{width - 1}, 0..{height - 1}), got {x},{y}"
            )


@dataclass(frozen=True)
class Models:
    """Whose pictures are drawn.

    Attributes:
        full: an :class:`~afa_model.networks.afa.AFA`, trained with everything.
        without: one trained without AFA (the affinity's loss has weight 0), to compare with; or None.
        cnn: one with a CNN, whose CAM is compared with the transformer's; or None.
    """

    full: nn.Module
    without: nn.Module | None = None
    cnn: nn.Module | None = None


@dataclass
class Seen:
    """What one model sees in a photograph.

    Attributes:
        cam: [K - 1, h, w] in 0..1, 0 for classes that are not there.
        labels: kind -> uint8 [h, w], as large as the photograph is drawn.
        affinity: the learned one, [(2r + 1)^2, h, w] in 0..1; None without attention.
        attention: the raw one, [N, N], whose rows sum to 1; None where it is not wanted.
        grid: (h, w) of both.
    """

    cam: Tensor
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    affinity: Tensor | None = None
    attention: Tensor | None = None
    grid: tuple[int, int] = (0, 0)

    def attention_of_cell(self, cell: tuple[int, int]) -> Tensor:
        """What the cell (y, x) of the grid attends to, over the largest of it: [h, w] in 0..1."""
        row = self.attention[cell[0] * self.grid[1] + cell[1]].view(self.grid)
        return row / row.max()

    def walked(self, how: LabelSettings, raw: bool) -> Tensor:
        """The CAM after the random walk along the raw attention or the learned affinity: [K - 1, h, w] in 0..1."""
        along = attention_window(self.attention, self.grid, how.radius) if raw else self.affinity
        return walked_cam(along, self.cam, how)


@dataclass
class View:
    """What all models see in a photograph.

    Attributes:
        name, source: the photograph's.
        photo: uint8 [h, w, 3], as it is drawn.
        size: (height, width) of the photograph itself.
        mask: uint8 [h, w], 0..K-1 and 255; or None.
        present: the classes (1..K-1) taken as present.
        point: (y, x), a pixel of the photograph itself.
        full, without, cnn: what each of the models sees; None for one that is not there.
    """

    name: str
    source: str
    photo: np.ndarray
    size: tuple[int, int]
    mask: np.ndarray | None
    present: list[int]
    point: tuple[int, int]
    full: Seen
    without: Seen | None = None
    cnn: Seen | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a photograph, for one figure or for several.

    Attributes:
        kinds: the full model's label maps; one that is made of a CAM is among them.
        without: those of the model without AFA; none: it is not asked.
        attention: raw attention, of both models.
        cnn: the CNN's CAM.
    """

    kinds: tuple[str, ...] = ("cam",)
    without: tuple[str, ...] = ()
    attention: bool = False
    cnn: bool = False

    def __or__(self, other: Wanted) -> Wanted:
        return Wanted(
            tuple(dict.fromkeys(self.kinds + other.kinds)),
            tuple(dict.fromkeys(self.without + other.without)),
            self.attention or other.attention,
            self.cnn or other.cnn,
        )


def look(
    models: Models, photograph: Photograph, wanted: Wanted, settings: MapSettings, how: LabelSettings
) -> View:
    """What the models see in a photograph. All are asked for the same classes, in the same sizes.

    settings, how: as for :func:`~afa_model.labels.label_maps.label_maps`.

    Raises:
        TooManyCells: attention is wanted, and its map would be too large; before any work.
    """
    if wanted.attention:
        shape = torch.empty(1, 1, *photograph.pixels.shape[1:], device="meta")
        seen = affinity_image(shape, settings, how).shape[2:]
        for model in (models.full, *[models.without] * bool(models.without is not None and wanted.without)):
            check_cells(cells_of(model, seen), photograph.name)
    image, size = normalize(photograph.pixels), tuple(photograph.pixels.shape[1:])
    full, cls_labels = _seen(models.full, image, photograph.cls_labels, wanted.kinds, wanted.attention, settings, how)
    present = (cls_labels.nonzero().flatten() + 1).tolist()
    view = View(
        name=photograph.name,
        source=photograph.source if photograph.cls_labels is not None else CLASSIFIER,
        photo=thumbnail(photograph.pixels, SIDE),
        size=size,
        mask=None if photograph.mask is None else thumbnail(torch.tensor(np.asarray(photograph.mask)), SIDE),
        present=present,
        point=photograph.point or peak_of(full.cam, present, size),
        full=full,
    )
    if models.without is not None and wanted.without:
        kinds = wanted.without, wanted.attention
        view.without, _ = _seen(models.without, image, cls_labels, *kinds, settings, how)
    if models.cnn is not None and wanted.cnn:
        view.cnn, _ = _seen(models.cnn, image, cls_labels, ("cam",), False, settings, how)
    return view


def _seen(
    model: nn.Module,
    image: Tensor,
    cls_labels: Tensor | None,
    kinds: Sequence[str],
    attention: bool,
    settings: MapSettings,
    how: LabelSettings,
) -> tuple[Seen, Tensor]:
    """What a model sees in an image [3, H, W], normalised; and the classes it was asked for, or found."""
    maps = label_maps(model, image, settings, how, cls_labels, kinds)
    seen = Seen(
        cam=maps.cam.cpu(),
        labels={kind: thumbnail(label, SIDE) for kind, label in maps.labels.items()},
        affinity=None if maps.affinity is None else maps.affinity.cpu(),
    )
    if attention:
        device = next(model.parameters()).device
        weights, seen.grid = attention_of(model, affinity_image(image[None].to(device), settings, how))
        seen.attention = weights.cpu()
    elif seen.affinity is not None:
        seen.grid = tuple(seen.affinity.shape[1:])
    return seen, maps.cls_labels.cpu()
