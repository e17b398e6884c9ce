"""The paper's figures of photographs in files: read with what is known of them, drawn, written as PNG and PDF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from ..conventions import require
from ..data.beside import Beside
from ..data.files import read_photo
from ..data.photographs import MAX_PIXELS
from ..data.settings import DataSettings
from ..errors import DataError, SavingError, reason
from ..labels.evidence import MapSettings
from ..labels.kinds import kinds_of
from ..labels.settings import LabelSettings
from ..pictures.attention import TooManyCells
from ..pictures.figures import FIGURES, NUMBERS, Style, check_models, wanted, weights_figure
from ..pictures.panels import save
from ..pictures.seen import Models, Photograph, View, look
from ..pictures.sheets import DPI, caption_of
from ..runtime.progress import progress
from ..runtime.writing import whole, writable_folder
from .predict import labels_named, photos, sizes_of

WITHOUT_IS_MISSING = "compares with a model trained without AFA: --without CHECKPOINT"


@dataclass
class FigureSettings(MapSettings):
    """What the figures show.

    Args:
        labels: names of the classes that are in the photographs, such as cat,dog. None: those that label_file, the data
            set's own label file or the mask says, else those the classifier finds.
        label_file: with the classes of each photograph; None: the one in the data set that a photograph lies in.
        masks: folder of the ground truth, each mask called as its photograph; None: those of the data set that a
            photograph lies in, if it lies in one.
        point: the pixel X,Y whose attention and affinity are shown; None takes the CAM's peak.
        crf: figure 6 shows the segmentation after the dense CRF.
        rows: photographs on one page.
        exif: turn photographs as their EXIF orientation says (apply), or leave them as they are stored (ignore).
        max_pixels: refuse photographs of more pixels than this; null refuses none.
        progress: show a progress bar on a terminal.
    """

    labels: tuple[str, ...] | str | None = None
    label_file: str | None = None
    masks: str | None = None
    point: tuple[int, int] | str | None = None
    crf: bool = False
    rows: int = 6
    exif: Literal["apply", "ignore"] = "apply"
    max_pixels: int | None = MAX_PIXELS
    progress: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.exif in ("apply", "ignore"), "exif", "apply or ignore", self.exif)
        require(self.max_pixels is None or self.max_pixels >= 1, "max_pixels", "at least 1 or null", self.max_pixels)
        require(1 <= self.rows <= 12, "rows", "1 to 12 photographs", self.rows)
        if isinstance(self.labels, str):
            self.labels = tuple(name.strip() for name in self.labels.split(",") if name.strip())
        if isinstance(self.point, str):
            try:
                x, y = self.point.split(",")
                self.point = int(x), int(y)
            except ValueError:
                raise ValueError(f"point: expected a pixel X,Y such as 200,120, got {self.point!r}") from None


@dataclass
class Drawn:
    """What became of the figures.

    Attributes:
        files: those of each page, PNG and PDF, with its caption.
        left_out: number of a figure -> why it could not be drawn.
        problems: a line for each photograph that could not be read, or is too large.
    """

    files: list[tuple[tuple[Path, Path], str]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def numbers_of(figure: str) -> tuple[int, ...]:
    """The figures that ``figure`` names: 3 to 8, or all.

    Raises:
        ValueError: it names none.
    """
    known = {str(number): (number,) for number in NUMBERS} | {"all": NUMBERS}
    if figure not in known:
        raise ValueError(f"figure: expected {', '.join(list(known)[:-1])} or all, got {figure!r}")
    return known[figure]


def draw_figures(
    figure: str,
    models: Models,
    images: Iterable[str | Path],
    out: str | Path,
    class_names: Sequence[str],
    settings: FigureSettings | None = None,
    how: LabelSettings | None = None,
    data: DataSettings | None = None,
    trained: str = "",
) -> Drawn:
    """Write ``<out>/figure_<number>.png`` and ``.pdf``; of several pages ``figure_<number>_<page>``.

    Args:
        figure: 3 to 8, or all; of all those are left out for which a model is missing.
        models: on any device, in any mode (left as they were).
        images: photographs, folders of them or patterns, as for `predict`; not needed for figure 8.
        out: folder to write into; made if need be.
        class_names: K names, background first.
        settings: what is shown.
        how: labels and walks are made.
        data: settings of the data set that photographs may lie in: its folders, and what the values of masks mean.
        trained: how far the model was trained, for figure 8.

    Raises:
        DataError: images that do not exist, or of which none can be drawn; masks or a label file that cannot be read.
        ValueError: no such figure, unknown names in ``labels``, a point outside a photograph, or a model that does not
            do.
        ConfigError: ``out`` cannot be written into; SavingError: a file cannot.
    """
    settings, how = settings or FigureSettings(), how or LabelSettings()
    numbers, done = numbers_of(figure), Drawn()
    if models.without is None and 7 in numbers:
        if figure != "all":
            raise ValueError(f"without: figure 7 {WITHOUT_IS_MISSING}")
        done.left_out[7] = f"figure 7 {WITHOUT_IS_MISSING}"
        numbers = tuple(number for number in numbers if number != 7)
    if figure == "5" and models.without is None:
        raise ValueError(f"without: figure 5 {WITHOUT_IS_MISSING}")
    check_models(numbers, models)
    kinds_of(models.full, crf=settings.crf and 6 in numbers)
    of_photographs = [number for number in numbers if number in FIGURES]
    source = _source(images, out, class_names, settings, data) if of_photographs else None
    out = writable_folder(out, "out")
    if source is not None:
        result = "segmentation_crf" if settings.crf else "segmentation"
        style, parts = Style(class_names, how, result), wanted(of_photographs, result)
        pages = -(-len(source.paths) // settings.rows)
        for page, views in enumerate(_pages(source, models, parts, how, done), 1):
            for number in of_photographs:
                name = f"figure_{number}" if pages == 1 else f"figure_{number}_{page}"
                done.files.append(_write(FIGURES[number].drawn(views, style), out / name))
        if not done.files:
            raise DataError("images: none can be drawn", done.problems)
    if 8 in numbers:
        done.files.append(_write(weights_figure(models.full, trained), out / "figure_8"))
    return done


@dataclass
class _Source:
    """Photographs to be read: each of their files, the name it is shown by, and what is known of all."""

    paths: Mapping[Path, Path]
    settings: FigureSettings
    beside: Beside
    class_names: Sequence[str]

    def read(self, path: Path) -> Photograph:
        """
        Raises:
            DataError: it, its mask or its label cannot be read.
        """
        settings = self.settings
        pixels = read_photo(path, settings.exif, settings.max_pixels)
        known = self.beside.of(path, tuple(pixels.shape[1:]))
        labels, source = known.labels, known.source
        if settings.labels is not None:
            labels, source = labels_named(settings.labels, self.class_names), "--labels"
        point = None if settings.point is None else (settings.point[1], settings.point[0])
        given = {} if labels is None else {"cls_labels": labels, "source": source}
        return Photograph(path.name, pixels, mask=known.mask, point=point, **given)


def _source(
    images: Iterable[str | Path],
    out: str | Path,
    class_names: Sequence[str],
    settings: FigureSettings,
    data: DataSettings | None,
) -> _Source:
    """All that can be known to be wrong before the first photograph is worked on is."""
    if settings.labels is not None:
        labels_named(settings.labels, class_names)
    of_set = replace(data or DataSettings(), exif=settings.exif)
    beside = Beside(tuple(class_names), of_set, settings.masks, settings.label_file)
    paths = photos(images, out)
    if settings.point is not None:
        x, y = settings.point
        for path, (height, width) in sizes_of(paths, settings.exif, settings.max_pixels):
            if not (0 <= y < height and 0 <= x < width):
                raise ValueError(
                    f"point: expected a pixel X,Y inside {path.name} (0..{width - 1}, 0..{height - 1}), got {x},{y}"
                )
    return _Source(paths, settings, beside, class_names)


def _pages(source: _Source, models: Models, parts: object, how: LabelSettings, done: Drawn) -> Iterator[list[View]]:
    """Views of the photographs that can be read and drawn, a page at a time; what cannot is added to the problems."""
    views: list[View] = []
    for path in progress(list(source.paths), "looking", show=source.settings.progress):
        try:
            views.append(look(models, source.read(path), parts, source.settings, how))
        except (DataError, TooManyCells) as error:
            done.problems.append(str(error))
            continue
        if len(views) == source.settings.rows:
            yield views
            views = []
    if views:
        yield views


def _write(figure: Figure, path: Path) -> tuple[tuple[Path, Path], str]:
    """PNG and PDF of a figure, and its caption."""
    files = path.with_suffix(".png"), path.with_suffix(".pdf")
    for file in files:
        try:
            with whole(file) as temporary:
                save(figure, temporary, DPI)
        except OSError as error:
            raise SavingError(f"{file} cannot be written ({reason(error)})") from error
    return files, caption_of(figure)
