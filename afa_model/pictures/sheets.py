"""Sheets for print: rows of tiles under common titles, as wide as a page's text, with keys and a caption below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..conventions import IGNORE
from ..data.classes import voc_palette
from .panels import Tile, draw_picture
from .words import fitted, width_of, wrapped, write

PAGE_WIDTH = 6.875  # inches: both columns of a conference paper
DPI = 300
CAPTION = "caption"  # gid of the texts it is made of

# inches
_MARGIN = 0.03
_WIDTH = PAGE_WIDTH - 2 * _MARGIN
_HEIGHT = 9.0
_GAP = 0.05
_BETWEEN = 0.16  # groups of columns
_STRIP = 0.16  # the line above a row
_LINE = 0.128
_LEAST = 0.3  # of a row of tiles
_TALLEST = 1.5  # times as tall as wide a tile may be; a taller picture becomes narrower

# points
_TITLE_SIZE = 7.5
_TEXT_SIZE = 7.0


@dataclass
class Row:
    """What is shown of one photograph.

    Attributes:
        name: above its tiles.
        tiles: one for each column; None leaves its place empty.
    """

    name: str
    tiles: Sequence[Tile | None]


@dataclass(frozen=True)
class Key:
    """What a colour means: of one patch, or with ``bar``, a colour map's name, of a bar from 0 to 1."""

    words: str
    color: tuple[float, ...] | None = None
    bar: str | None = None


def class_keys(classes: Sequence[int], names: Sequence[str]) -> list[Key]:
    """The colours of classes (0..K-1 and 255)."""
    palette = voc_palette() / 255
    return [Key("ignored" if i == IGNORE else names[i], tuple(palette[i])) for i in sorted(set(classes))]


def sheet(titles: Sequence[str], rows: Sequence[Row], caption: str, keys: Sequence[Key] = ()) -> Figure:
    """Draw a sheet. Two photographs stand side by side where there are three columns or fewer.

    Args:
        titles: of the columns.
        rows: one for each photograph.
        caption: below everything; :func:`caption_of` gives it back.
        keys: of the colours, above the caption.
    """
    groups = 2 if len(titles) <= 3 and len(rows) > 1 else 1
    columns = len(titles)
    tile = (_WIDTH - (groups - 1) * _BETWEEN - (columns - 1) * groups * _GAP) / (groups * columns)
    bands = [rows[start : start + groups] for start in range(0, len(rows), groups)]
    heads = [wrapped(title, _TITLE_SIZE, tile) for title in titles]
    lines = _flowed(keys)
    caption_lines = wrapped(caption, _TITLE_SIZE, _WIDTH)
    head = _LINE * max(map(len, heads)) + 0.04
    foot = 0.06 + (len(lines) * 0.17 + 0.05 if lines else 0) + _LINE * len(caption_lines) + 0.05
    heights = _heights(bands, tile, _HEIGHT - head - foot - len(bands) * _STRIP)
    height = head + sum(heights) + len(bands) * _STRIP + foot

    figure = Figure(figsize=(PAGE_WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    paper = _Paper(figure, height)
    for group in range(groups):
        left = group * (columns * (tile + _GAP) - _GAP + _BETWEEN)
        for column, head_lines in enumerate(heads):
            middle = left + column * (tile + _GAP) + tile / 2
            for number, line in enumerate(reversed(head_lines)):
                paper.text(middle, head - 0.04 - number * _LINE, line, _TITLE_SIZE, ha="center")
        top = head
        for band, tall in zip(bands, heights):
            if group < len(band):
                row = band[group]
                wide = columns * (tile + _GAP) - _GAP
                paper.text(left, top + _STRIP - 0.045, fitted(row.name, _TEXT_SIZE, wide), _TEXT_SIZE, color="0.25")
                for column, picture in enumerate(row.tiles):
                    if picture is not None:
                        axis = paper.axes(left + column * (tile + _GAP), top + _STRIP, tile, tall - _GAP)
                        draw_picture(axis, picture, _star(picture, tile, tall - _GAP))
            top += _STRIP + tall
    top += 0.06
    for line in lines:
        _draw_keys(paper, top, line)
        top += 0.17
    top += 0.05 if lines else 0
    for line in caption_lines:
        top += _LINE
        paper.text(0, top - 0.03, line, _TITLE_SIZE, gid=CAPTION)
    return figure


def with_caption(figure: Figure, caption: str) -> Figure:
    """A figure that matplotlib lays out, made taller by a caption below it."""
    width, height = figure.get_size_inches()
    lines = wrapped(caption, _TITLE_SIZE, width - 0.1)
    foot = _LINE * len(lines) + 0.08
    figure.set_size_inches(width, height + foot)
    share = foot / (height + foot)
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))
    paper = _Paper(figure, height + foot, width)
    for number, line in enumerate(lines):
        paper.text(0.02, height + (number + 1) * _LINE, line, _TITLE_SIZE, gid=CAPTION)
    return figure


def caption_of(figure: Figure) -> str:
    """The caption of a sheet, in one line."""
    return " ".join(text.get_text() for text in figure.texts if text.get_gid() == CAPTION)


@dataclass
class _Paper:
    """A figure in inches from its upper left corner, but for a margin."""

    figure: Figure
    height: float
    width: float = PAGE_WIDTH

    def axes(self, left: float, top: float, wide: float, high: float) -> Axes:
        bottom = self.height - top - high
        return self.figure.add_axes(
            ((_MARGIN + left) / self.width, bottom / self.height, wide / self.width, high / self.height), anchor="N"
        )

    def patch(self, left: float, top: float, wide: float, high: float, color: tuple[float, ...]) -> None:
        corner = (_MARGIN + left) / self.width, 1 - (top + high) / self.height
        size = wide / self.width, high / self.height
        self.figure.add_artist(Rectangle(corner, *size, facecolor=color, edgecolor="0.3", linewidth=0.5))

    def text(self, left: float, base: float, words: str, size: float, **how: object) -> None:
        place = (_MARGIN + left) / self.width, 1 - base / self.height
        write(self.figure.text(*place, "", fontsize=size, va="baseline", **how), words)


def _star(tile: Tile, wide: float, high: float) -> float:
    """Points that a star may have: less in a picture that is narrow or flat, beside which other things stand."""
    height, width, _ = tile.picture.shape
    scale = min(wide / width, high / height)
    return max(3.5, min(4 + 3 * wide, 72 * 0.4 * scale * min(height, width), 9))


def _heights(bands: Sequence[Sequence[Row]], tile: float, room: float) -> list[float]:
    """How tall each band of tiles is: as its tallest picture wants at this width, but all no more than there is room
    for; where there is not enough, the tallest are made less.
    """
    wanted = []
    for band in bands:
        shapes = [picture.picture.shape for row in band for picture in row.tiles if picture is not None]
        share = max((height / width for height, width, _ in shapes), default=1)
        wanted.append(max(tile * min(share, _TALLEST) + _GAP, _LEAST))
    room = max(room, _LEAST * len(bands))
    low, high = _LEAST, max(wanted)
    if sum(wanted) <= room:
        return wanted
    for _ in range(30):
        middle = (low + high) / 2
        fits = sum(min(each, middle) for each in wanted) <= room
        low, high = (middle, high) if fits else (low, middle)
    return [min(each, low) for each in wanted]


_PATCH, _BAR = 0.13, 0.5


def _room_of(key: Key) -> float:
    """Inches that a key takes, with the distance to the next one."""
    before = _PATCH if key.bar is None else _BAR + 0.24
    return before + 0.05 + width_of(key.words, _TEXT_SIZE) + 0.16


def _flowed(keys: Sequence[Key]) -> list[list[Key]]:
    """Keys in lines that fit the sheet; what one says is cut where it alone would be too wide."""
    lines: list[list[Key]] = []
    left = _WIDTH
    for key in keys:
        key = Key(fitted(key.words, _TEXT_SIZE, _WIDTH - 1.2), key.color, key.bar)
        if not lines or left + _room_of(key) > _WIDTH + 0.16:
            lines.append([])
            left = 0.0
        lines[-1].append(key)
        left += _room_of(key)
    return lines


def _draw_keys(paper: _Paper, top: float, line: Sequence[Key]) -> None:
    left = 0.0
    for key in line:
        if key.bar is None:
            paper.patch(left, top, _PATCH, 0.1, key.color)
            before = _PATCH
        else:
            paper.text(left, top + 0.095, "0", _TEXT_SIZE)
            axis = paper.axes(left + 0.09, top, _BAR, 0.11)
            axis.imshow([[i / 127 for i in range(128)]], aspect="auto", cmap=colormaps[key.bar], vmin=0, vmax=1)
            axis.set_axis_off()
            paper.text(left + 0.12 + _BAR, top + 0.095, "1", _TEXT_SIZE)
            before = _BAR + 0.24
        paper.text(left + before + 0.05, top + 0.095, key.words, _TEXT_SIZE)
        left += _room_of(key)
