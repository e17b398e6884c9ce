"""Pictures people look at: the panel of one prediction, the rows of a training step, the weights of the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..conventions import IGNORE, SOFTWARE, denormalize, resize
from ..data.classes import voc_palette
from .overlays import (
    AFFINITY_COLORS,
    CAM_COLORS,
    affinity_of_point,
    cell_of,
    heat_overlay,
    label_overlay,
    photo_of,
)
from .words import write

# inches
_TILE_AREA = 12.0
_TITLE = 0.32
_GAP = 0.08
_DPI = 120


@dataclass
class Tile:
    """One picture of a panel.

    Args:
        picture: uint8 [H, W, 3].
        title: above it.
        star: a point (y, x) in pixels to mark.
        colors: colour map of the heat it shows, for its colour bar.
    """

    picture: np.ndarray
    title: str = ""
    star: tuple[int, int] | None = None
    colors: str | None = None


def cam_tile(
    photo: np.ndarray, cam: Tensor, classes: Sequence[int], names: Sequence[str], title: str = "CAM"
) -> Tile:
    """The largest CAM value over ``classes`` (1..K-1) of ``cam`` [K-1, h, w] in 0..1."""
    heat = cam[[index - 1 for index in classes]].amax(0) if classes else torch.zeros_like(cam[0])
    shown = ", ".join(names[index] for index in classes[:3]) + (", ..." if len(classes) > 3 else "")
    return Tile(heat_overlay(photo, heat), f"{title}: {shown}" if shown else title, colors=CAM_COLORS)


def affinity_tile(
    photo: np.ndarray, affinity: Tensor, point: tuple[int, int], size: tuple[int, int] | None = None
) -> Tile:
    """What the grid cell that holds the pixel ``point`` (y, x) says about its window, [(2r+1)^2, h, w].

    size: (height, width) of the photograph that the point is a pixel of, if it is drawn smaller.
    """
    size = size or photo.shape[:2]
    shown = affinity_of_point(affinity, cell_of(point, size, tuple(affinity.shape[1:])))
    title = f"affinity of ({point[0]}, {point[1]})"
    star = cell_of(point, size, photo.shape[:2])
    return Tile(heat_overlay(photo, shown, AFFINITY_COLORS), title, star=star, colors=AFFINITY_COLORS)


def peak_of(cam: Tensor, classes: Sequence[int], size: Sequence[int] | None = None) -> tuple[int, int]:
    """The pixel (y, x) where the CAM [K-1, h, w] of ``classes`` (1..K-1; all if there is none) is largest.

    size: (height, width) of the image whose pixel is meant, if it is not the CAM's.
    """
    heat = cam[[index - 1 for index in classes]].amax(0) if classes else cam.amax(0)
    place, (height, width) = int(heat.argmax()), heat.shape
    rows, columns = size or heat.shape
    y, x = place // width, place % width
    return int((y + 0.5) * rows / height), int((x + 0.5) * columns / width)


def prediction_panel(
    photo: np.ndarray,
    *,
    title: str,
    cam: Tensor,
    affinity: Tensor | None,
    point: tuple[int, int],
    pseudo_label: Tensor,
    prediction: Tensor | None,
    class_names: Sequence[str],
    probabilities: Tensor | None = None,
    present: Sequence[int] = (),
    mask: Tensor | None = None,
    size: tuple[int, int] | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> Figure:
    """Photograph, CAM, affinity of a point, pseudo-label, prediction, mask if there is one, and the legend.

    Args:
        photo: uint8 [H, W, 3].
        title: of the whole panel.
        cam: [K-1, H, W] in 0..1; the largest value over the present classes is shown.
        affinity: [(2r+1)^2, h, w] in 0..1, or None for a model without attention.
        point: (y, x) in pixels: whose affinity is shown.
        pseudo_label: [H, W], 0..K-1 and 255.
        prediction: [H, W] in 0..K-1, or None for a model without a decoder.
        class_names: K names, background first.
        probabilities: [K-1] in 0..1, shown in the legend.
        present: classes (1..K-1) taken as present in the image; bold in the legend.
        mask: [H, W], 0..K-1 and 255: the truth, where it is known.
        size: (height, width) of the photograph that ``point`` is a pixel of, if all is drawn smaller.
        more: title -> a label [H, W] that is shown too, before the ground truth.
    """
    more = more or {}
    tiles = [Tile(photo, "photograph"), cam_tile(photo, cam, list(present), class_names)]
    if affinity is not None:
        tiles.append(affinity_tile(photo, affinity, point, size))
    tiles.append(Tile(label_overlay(photo, pseudo_label), "pseudo-label"))
    if prediction is not None:
        tiles.append(Tile(label_overlay(photo, prediction), "prediction"))
    tiles += [Tile(label_overlay(photo, label), name) for name, label in more.items()]
    if mask is not None:
        tiles.append(Tile(label_overlay(photo, mask), "ground truth"))

    columns = min(3, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    used = _classes_in(pseudo_label, prediction, mask, *more.values())
    return _draw(rows, columns, sorted({*used, *present}), class_names, title, probabilities, present)


@torch.no_grad()
def training_panel(
    images: Tensor,
    names: Sequence[str],
    cls_labels: Tensor,
    class_names: Sequence[str],
    *,
    cam: Tensor,
    affinity: Tensor | None = None,
    refined_label: Tensor | None = None,
    aff_label: Tensor | None = None,
    seg_logits: Tensor | None = None,
    title: str = "",
    max_images: int = 4,
) -> Figure:
    """What a training step works with, one row per image: crop, CAM, affinity, pseudo-labels, prediction.

    Args:
        images: float32 [B, 3, H, W], normalised.
        names: of the images.
        cls_labels: [B, K-1] multi-hot.
        class_names: K names, background first.
        cam: [B, K-1, h, w] in 0..1.
        affinity: [B, (2r+1)^2, h, w] in 0..1; that of the CAM's peak is shown.
        refined_label: [B, H, W], 0..K-1 and 255: the CAM's label, refined by PAR.
        aff_label: [B, H, W]: the random-walk label, once there is one.
        seg_logits: [B, K, h, w].
        title: of the whole picture.
        max_images: rows at most.
    """
    size = images.shape[-2:]
    rows, used, all_present = [], set(), set()
    for b in range(min(len(images), max_images)):
        photo = photo_of(denormalize(images[b].float()))
        present = (cls_labels[b].nonzero().flatten() + 1).tolist()
        large_cam = resize(cam[b : b + 1].float(), size)[0]
        row = [Tile(photo, names[b]), cam_tile(photo, large_cam, present, class_names)]
        if affinity is not None:
            row.append(affinity_tile(photo, affinity[b], peak_of(large_cam, present)))
        labels = {"CAM label, refined": refined_label, "random-walk label": aff_label}
        shown = {name: label[b].cpu() for name, label in labels.items() if label is not None}
        if seg_logits is not None:
            logits = resize(seg_logits[b : b + 1].float(), size)
            shown["prediction"] = logits.argmax(1)[0].cpu()
        row += [Tile(label_overlay(photo, label), name) for name, label in shown.items()]
        rows.append(row)
        used.update(_classes_in(*shown.values()), present)
        all_present.update(present)
    return _draw(
        rows, max(map(len, rows)), sorted(used), class_names, title, present=sorted(all_present), area=6.0
    )


def _classes_in(*labels: Tensor | None) -> list[int]:
    return sorted(
        {int(value) for label in labels if label is not None for value in torch.as_tensor(label).unique()}
    )


def _draw(
    rows: Sequence[Sequence[Tile]],
    columns: int,
    classes: Sequence[int],
    class_names: Sequence[str],
    title: str,
    probabilities: Tensor | None = None,
    present: Sequence[int] = (),
    area: float = _TILE_AREA,
) -> Figure:
    """Tiles of one size in a grid; the legend in the free cell of the last row, or below if there is none."""
    height, width = rows[0][0].picture.shape[:2]
    tile_width = float(np.clip((area * width / height) ** 0.5, 2.2, 6.0))
    tile_height = float(np.clip(tile_width * height / width, 1.2, 8.0))
    head = 0.34 if title else 0.04
    free = len(rows[-1]) < columns
    lines = -(-len(classes) // max(1, int(columns * tile_width / 1.7)))
    foot = _GAP if free else 0.40 + 0.235 * lines
    full_width = columns * (tile_width + _GAP) + _GAP
    full_height = head + len(rows) * (tile_height + _TITLE) + foot

    figure = Figure(figsize=(full_width, full_height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def cell(row: int, column: int, wide: float = tile_width, high: float = tile_height) -> Axes:
        left = _GAP + column * (tile_width + _GAP)
        bottom = full_height - head - row * (tile_height + _TITLE) - _TITLE - high
        return figure.add_axes(
            (left / full_width, bottom / full_height, wide / full_width, high / full_height)
        )

    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            _draw_tile(cell(number, column), tile)
    if title:
        y = 1 - 0.22 / full_height
        write(figure.text(_GAP / full_width, y, "", fontsize=13, fontweight="bold", va="center"), title)
    if free:
        axis = cell(len(rows) - 1, len(rows[-1]))
        legend_columns = 1 + (len(classes) > tile_height / 0.24 - 1)
    else:
        axis = figure.add_axes((_GAP / full_width, 0, 1 - 2 * _GAP / full_width, (foot - _GAP) / full_height))
        legend_columns = -(-len(classes) // lines)
    _draw_legend(axis, classes, class_names, probabilities, set(present), legend_columns)
    return figure


def draw_picture(axis: Axes, tile: Tile, star: float = 15) -> None:
    """A tile's picture, as large as the axes hold, and its star, of so many points."""
    small = max(tile.picture.shape) < 200
    axis.imshow(tile.picture, interpolation="nearest" if small else "antialiased")
    axis.set_axis_off()
    if tile.star is not None:
        y, x = tile.star
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.06 * star}
        axis.plot(x, y, marker="*", markersize=star, color="#ffd400", clip_on=False, **edge)


def _draw_tile(axis: Axes, tile: Tile) -> None:
    draw_picture(axis, tile)
    write(axis.set_title("", fontsize=10.5, loc="left", pad=4), tile.title)
    if tile.colors is not None:
        bar = axis.inset_axes((0.70, 0.935, 0.27, 0.03))
        bar.imshow(np.linspace(0, 1, 128)[None], aspect="auto", cmap=tile.colors, vmin=0, vmax=1)
        for text in bar.set_xticks([0, 127], ["0", "1"], fontsize=8, color="white"):
            text.label1.set_path_effects([withStroke(linewidth=1.6, foreground="black")])
        bar.tick_params(length=0, pad=1.5)
        bar.set_yticks([])
        for spine in bar.spines.values():
            spine.set(color="white", linewidth=0.6)


def _draw_legend(
    axis: Axes,
    classes: Sequence[int],
    names: Sequence[str],
    probabilities: Tensor | None,
    present: set[int],
    columns: int,
) -> None:
    axis.set_axis_off()
    palette = voc_palette() / 255
    entries, words = [], []
    for index in classes:
        text = "ignored" if index == IGNORE else names[index]
        if probabilities is not None and 0 < index < len(names):
            text += f"  {100 * float(probabilities[index - 1]):.0f} %"
        words.append(text)
        # A label of its own would be left out where it begins with an underscore.
        entries.append(Patch(facecolor=palette[index], edgecolor="0.3", linewidth=0.6, label=" "))
    legend = axis.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        fontsize=10 if columns == 1 else 9,
        frameon=False,
        ncols=columns,
        title="classes and the classifier's score" if probabilities is not None else "classes",
        title_fontsize=10.5,
        alignment="left",
        borderaxespad=0,
    )
    for text, index, shown in zip(legend.get_texts(), classes, words):
        write(text, shown)
        text.set_fontweight("bold" if index in present else "normal")


def head_weights_figure(
    weights: Tensor, bias: Tensor, blocks: int, title: str = "", width: float | None = None
) -> Figure:
    """How much each attention head counts in the affinity, a bar for each (paper's supplement, Figure 8).

    Args:
        weights: [heads], of all blocks side by side; negative ones speak against an affinity.
        bias: [1].
        blocks: how many blocks the heads come from, the last blocks of the backbone.
        title: of the whole picture.
        width: of the picture in inches; None: as many as make the bars wide.
    """
    heads = len(weights)
    if blocks < 1 or heads % blocks:
        raise ValueError(f"blocks: expected a divisor of the {heads} heads, got {blocks}")
    values = weights.detach().float().cpu().numpy()
    each = heads // blocks
    width = width or max(5.0, 0.55 * heads + 1.2)
    figure = Figure(figsize=(width, 3.4), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    bars = axis.bar(range(heads), values, width=0.7, color=np.where(values < 0, "#c0392b", "#2c6fbb"))
    # a number is as wide as five digits, and may take its bar's place and no more
    numbers = min(7.5, 72 * (width - 0.8) / heads / 3.2)
    axis.bar_label(bars, [f"{value:+.2g}" for value in values], fontsize=numbers, padding=2)
    axis.axhline(0, color="black", linewidth=0.8)
    for block in range(1, blocks):
        axis.axvline(block * each - 0.5, color="0.6", linewidth=0.8, linestyle="dashed")
    names = ["last block", *(f"last block but {'one' if i == 1 else i}" for i in range(1, blocks))][::-1]
    axis.set_xticks(range(heads), [str(head % each + 1) for head in range(heads)])
    axis.set_xlabel("head")
    for block, name in enumerate(names):
        axis.text((block + 0.5) / blocks, 1.02, name, transform=axis.transAxes, ha="center", fontsize=9.5)
    axis.set_ylabel("weight in the affinity")
    axis.set_xlim(-0.5, heads - 0.5)
    axis.margins(y=0.15)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    text = f"{title}: " if title else ""
    heading = figure.suptitle("", fontsize=11, fontweight="bold")
    write(heading, f"{text}affinity head, bias {float(bias.detach()):+.3g}")
    return figure


def to_array(figure: Figure) -> np.ndarray:
    """The drawn figure as uint8 [H, W, 3], for TensorBoard (``dataformats="HWC"``)."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: Figure, path: str | Path, dpi: float | None = None) -> Path:
    """Write a figure as PNG, or as PDF if the path ends so; its folder is made if need be.

    dpi: pixels in an inch, of a PDF those of its pictures; None: the figure's own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, by = "png", {"Software": SOFTWARE}
    if path.suffix.lower() == ".pdf":
        kind, by = "pdf", {"Creator": SOFTWARE, "CreationDate": None}  # the same figure is the same file
    with rc_context({"pdf.fonttype": 42}):  # letters that can be searched and edited
        figure.savefig(path, facecolor="white", format=kind, metadata=by, dpi=dpi or "figure")
    return path
