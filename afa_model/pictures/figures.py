"""The figures of the paper's supplement (3 to 8), drawn of any models and photographs.

    figure = draw(3, Models(model), [Photograph("cat.jpg", pixels)], class_names)
    figure.savefig("figure_3.pdf")

:func:`draw` does it all; where several figures show the same photographs, :func:`look` for what they want once, and
hand its views to :func:`drawn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from ..labels.evidence import MapSettings
from ..labels.kinds import title
from ..labels.settings import LabelSettings
from .overlays import AFFINITY_COLORS, CAM_COLORS, cell_of, heat_overlay, label_overlay
from .panels import Tile, affinity_tile, cam_tile, head_weights_figure
from .seen import CLASSIFIER, GIVEN, Models, Photograph, Seen, View, Wanted, look
from .sheets import PAGE_WIDTH, Key, Row, class_keys, sheet, with_caption
from .words import fitted

SOURCES = {  # where classes are from, in a caption
    "mask": "from the masks",
    "label file": "from the label file",
    "--labels": "given by --labels",
    GIVEN: "given",
    CLASSIFIER: "found by the classifier",
}
CNN_IS_LEFT_OUT = "The CNN's CAM is left out, for no CNN is given (--cnn)."
WITHOUT_IS_LEFT_OUT = "Labels of a model without AFA are left out, for none is given (--without)."


@dataclass(frozen=True)
class Style:
    """What the figures need to know besides the views.

    Attributes:
        names: K class names, background first.
        how: labels and walks are made.
        result: the kind of label map that figure 6 shows.
    """

    names: Sequence[str]
    how: LabelSettings
    result: str = "segmentation"


@dataclass(frozen=True)
class Kind:
    """One of the figures: what it wants of a photograph, and what draws it."""

    wanted: Wanted
    drawn: Callable[[Sequence[View], Style], Figure]


def cams_figure(views: Sequence[View], style: Style) -> Figure:
    """Figure 3: the CNN's CAM, the transformer's, and that after a walk along raw attention and learned affinity."""
    with_cnn = any(view.cnn is not None for view in views)
    parts = {"CNN CAM": "of a CNN", "transformer CAM": "of the transformer"} if with_cnn else {"transformer CAM": ""}
    titles = ["photograph", *parts, "CAM refined with raw attention", "CAM refined with learned affinity"]
    rows = []
    for view in views:
        cams = [view.cnn.cam] if view.cnn is not None else []
        cams += [view.full.cam, view.full.walked(style.how, raw=True), view.full.walked(style.how, raw=False)]
        tiles = [cam_tile(view.photo, cam, view.present, style.names) for cam in cams]
        rows.append(_row(view, style, [Tile(view.photo), *tiles]))
    made = "of a CNN, of the transformer, and the latter" if with_cnn else "of the transformer, and the same"
    caption = (
        f"Figure 3. CAM {made} after a random walk (radius {style.how.radius}) along the raw attention and along the"
        f" learned affinity; the largest value over the classes named. {_classes(views)}"
        f"{'' if with_cnn else ' ' + CNN_IS_LEFT_OUT}"
    )
    return sheet(titles, rows, caption, [Key("CAM", bar=CAM_COLORS)])


def refinement_figure(views: Sequence[View], style: Style) -> Figure:
    """Figure 4: the CAM's pseudo-label before and after its refinement."""
    after = title("refined_cam", style.how.refinement)
    titles = ["photograph", "pseudo-label of the CAM", after]
    with_mask, rows, labels = _has_masks(views), [], []
    for view in views:
        shown = [view.full.labels["cam"], view.full.labels["refined_cam"], *[view.mask] * with_mask]
        rows.append(_row(view, style, [Tile(view.photo), *_label_tiles(view, shown)]))
        labels += shown
    caption = (
        f"Figure 4. Pseudo-labels of the CAM (background score {style.how.bkg_score:g}) before and after"
        f" {after.removeprefix('CAM + ')}. {_classes(views)}{_truth_is_missing(views)}"
    )
    return sheet(titles + ["ground truth"] * with_mask, rows, caption, _class_keys(style, labels))


def affinity_figure(views: Sequence[View], style: Style) -> Figure:
    """Figure 5: attention and affinity of a point; pseudo-labels without AFA, without propagation, and with all of it.

    Where no model without AFA is given its column is left out.
    """
    with_other, with_mask = any(view.without is not None for view in views), _has_masks(views)
    titles = ["photograph", "raw attention", "learned affinity", *["label without AFA"] * with_other,
              "label without propagation", "label with AFA", *["ground truth"] * with_mask]  # fmt: skip
    rows, labels = [], []
    for view in views:
        shown = [view.without and view.without.labels["refined_cam"]] if with_other else []
        shown += [view.full.labels[kind] for kind in ("refined_cam", "refined_random_walk")]
        shown += [view.mask] * with_mask
        affinity = affinity_tile(view.photo, view.full.affinity, view.point, view.size)
        tiles = [_starred(view), _attention(view, view.full), affinity, *_label_tiles(view, shown)]
        rows.append(_row(view, style, tiles))
        labels += shown
    by = title("refined_cam", style.how.refinement).removeprefix("CAM + ")
    other = " of the model without AFA," if with_other else ""
    caption = (
        f"Figure 5. Raw attention (mean of the heads, over its largest value) and learned affinity (in a window of"
        f" radius {style.how.radius}) of the point ★, and pseudo-labels, all after {by}:{other} of the CAM with AFA but"
        f" without propagation, and with all of AFA. {_classes(views)}{_truth_is_missing(views)}"
        f"{'' if with_other else ' ' + WITHOUT_IS_LEFT_OUT}"
    )
    keys = [Key("attention, affinity", bar=AFFINITY_COLORS), *_class_keys(style, labels)]
    return sheet(titles, rows, caption, keys)


def results_figure(views: Sequence[View], style: Style) -> Figure:
    """Figure 6: the segmentation beside the ground truth, where there is one."""
    with_mask, rows, labels = _has_masks(views), [], []
    for view in views:
        shown = [*[view.mask] * with_mask, view.full.labels[style.result]]
        rows.append(Row(view.name, [Tile(view.photo), *_label_tiles(view, shown)]))
        labels += shown
    what = title(style.result)
    beside = ", beside the ground truth" if with_mask else ""
    caption = f"Figure 6. The {what}, which knows no image-level labels{beside}.{_truth_is_missing(views)}"
    titles = ["photograph", *["ground truth"] * with_mask, what]
    return sheet(titles, rows, caption, _class_keys(style, labels))


def attention_figure(views: Sequence[View], style: Style) -> Figure:
    """Figure 7: raw attention of a point, of the models without and with AFA.

    Raises:
        ValueError: a view of no model without AFA.
    """
    if any(view.without is None for view in views):
        raise ValueError("without: figure 7 compares with a model trained without AFA, and none is given")
    rows = [
        _row(view, style, [_starred(view), _attention(view, view.without), _attention(view, view.full)])
        for view in views
    ]
    caption = (
        "Figure 7. Raw attention (mean of the heads of the last blocks, over its largest value) of the point ★, of the"
        " models trained without and with AFA."
    )
    titles = ["photograph", "attention without AFA", "attention with AFA"]
    return sheet(titles, rows, caption, [Key("attention", bar=AFFINITY_COLORS)])


def weights_figure(model: nn.Module, trained: str = "") -> Figure:
    """Figure 8: the learned weight of each head.

    trained: how far the model was trained, for the title.

    Raises:
        ValueError: a model without attention.
    """
    model.require_attention("figure 8")
    weights, bias = model.affinity_head()
    heading = fitted(trained, 12, PAGE_WIDTH - 2.6)
    figure = head_weights_figure(weights, bias, model.abilities.affinity_blocks, heading, PAGE_WIDTH)
    against = int((weights < 0).sum())
    caption = (
        f"Figure 8. The learned weight of each attention head in the affinity. {against} of {len(weights)} (red) speak"
        " against it where they attend. The paper shows the heads of the last block only."
    )
    return with_caption(figure, caption)


FIGURES: Mapping[int, Kind] = {
    3: Kind(Wanted(("cam",), attention=True, cnn=True), cams_figure),
    4: Kind(Wanted(("cam", "refined_cam")), refinement_figure),
    5: Kind(Wanted(("refined_cam", "refined_random_walk"), ("refined_cam",), attention=True), affinity_figure),
    6: Kind(Wanted(("cam", "segmentation")), results_figure),
    7: Kind(Wanted(("cam",), ("cam",), attention=True), attention_figure),
}  # 8 shows no photograph
NUMBERS = (*FIGURES, 8)


def wanted(numbers: Sequence[int], result: str = "segmentation") -> Wanted:
    """What these figures want of each photograph; ``result``: the kind of label map that figure 6 shows."""
    total = Wanted(kinds=())
    for number in numbers:
        total |= FIGURES[number].wanted
    return replace(total, kinds=tuple(result if kind == "segmentation" else kind for kind in total.kinds))


def draw(
    number: int,
    models: Models,
    photographs: Sequence[Photograph],
    class_names: Sequence[str],
    settings: MapSettings | None = None,
    how: LabelSettings | None = None,
) -> Figure:
    """One of the paper's figures.

    Args:
        number: 3..8.
        models: on any device, in any mode (left as they were).
        photographs: a row for each; none are needed for figure 8.
        class_names: K names, background first.
        settings: in which sizes photographs go through the models.
        how: labels and walks are made.

    Raises:
        ValueError: no such figure, no photograph, or a model that the figure needs and that is not there or has no
            attention.
    """
    if number not in NUMBERS:
        raise ValueError(f"figure: expected one of {', '.join(map(str, NUMBERS))}, got {number!r}")
    if number == 8:
        return weights_figure(models.full)
    if not photographs:
        raise ValueError(f"photographs: figure {number} needs at least one")
    check_models([number], models)
    settings, how = settings or MapSettings(), how or LabelSettings()
    views = [look(models, photograph, wanted([number]), settings, how) for photograph in photographs]
    return FIGURES[number].drawn(views, Style(class_names, how))


def check_models(numbers: Sequence[int], models: Models) -> None:
    """
    Raises:
        ValueError: a model without the attention or decoder that these figures need, one that is to be compared with
            and is not there, or of another number of classes.
    """
    for number in numbers:
        if number != 4:
            models.full.require_attention(f"figure {number}")
    for name, other in (("without", models.without), ("cnn", models.cnn)):
        if other is not None and other.num_classes != models.full.num_classes:
            raise ValueError(
                f"{name}: a model of {other.num_classes} classes, but checkpoint has {models.full.num_classes}"
            )
    if models.without is not None:
        models.without.require_attention("without")
    if models.cnn is not None and models.cnn.has_affinity:
        raise ValueError(f"cnn: expected a model with a CNN such as resnet50, got one with {models.cnn.backbone}")
    if 7 in numbers and models.without is None:
        raise ValueError("without: figure 7 compares with a model trained without AFA, and none is given")


def _row(view: View, style: Style, tiles: Sequence[Tile | None]) -> Row:
    """A photograph's row, with its name and classes above it."""
    shown = ", ".join(style.names[index] for index in view.present) or "no class"
    return Row(f"{view.name}: {shown}", tiles)


def _label_tiles(view: View, labels: Sequence[np.ndarray | None]) -> list[Tile | None]:
    return [None if label is None else Tile(label_overlay(view.photo, label)) for label in labels]


def _starred(view: View) -> Tile:
    return Tile(view.photo, star=cell_of(view.point, view.size, view.photo.shape[:2]))


def _attention(view: View, seen: Seen) -> Tile:
    heat = seen.attention_of_cell(cell_of(view.point, view.size, seen.grid))
    return replace(_starred(view), picture=heat_overlay(view.photo, heat, AFFINITY_COLORS))


def _has_masks(views: Sequence[View]) -> bool:
    return any(view.mask is not None for view in views)


def _truth_is_missing(views: Sequence[View]) -> str:
    missing = [_called(view) for view in views if view.mask is None]
    if not missing:
        return ""
    if len(missing) == len(views):
        return " Ground truth is left out, for there are no masks."
    return f" There is no mask of {', '.join(missing)}."


def _called(view: View, most: int = 32) -> str:
    """A photograph's name in a caption."""
    return view.name if len(view.name) <= most else f"{view.name[: most - 1]}…"


def _classes(views: Sequence[View]) -> str:
    """Where the classes are from that the models were asked for, for a caption."""
    by_source: dict[str, list[str]] = {}
    for view in views:
        by_source.setdefault(view.source, []).append(_called(view))
    alone = len(by_source) == 1
    parts = [SOURCES.get(source, source) + ("" if alone else f" ({', '.join(of)})") for source, of in by_source.items()]
    return f"Classes: {', '.join(parts)}."


def _class_keys(style: Style, labels: Iterable[np.ndarray | None]) -> list[Key]:
    """The classes that these label maps hold."""
    return class_keys({int(index) for label in labels if label is not None for index in np.unique(label)}, style.names)
