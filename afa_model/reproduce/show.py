"""Results to look at: a table for the terminal, the same in Markdown, a plot."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from ..labels.kinds import title as kind_title
from ..pictures.words import readable
from .paper import PerClass
from .results import Found, Results

OURS, PAPERS = "#1f5fa8", "#b2541a"


def heading(results: Results) -> str:
    """What the numbers are."""
    table = results.table
    measure = "IoU" if results.classes else "mIoU"
    what = kind_title(table.kinds[0]) if table.kinds else "label of the refined CAM"
    by = f", protocol {table.protocol}" if table.protocol else ", classes known"
    return f"{table.number}. {table.title}: {measure} in percent, {what} on {table.split}{by}"


def notes(results: Results) -> list[str]:
    """What a reader must know of the numbers."""
    found = []
    if results.seeds > 1:
        over = f"{results.seeds} seeds" if results.complete else "the seeds that are done"
        found.append(f"Mean and standard deviation over {over}.")
    if results.table.scaled:
        found.append(f"Scaled to the small pictures: {results.table.scaled}.")
    return found


def cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    head = ["", "here", *(f"here, {kind_title(kind)}" for kind in results.others), "paper"]
    rows = [
        [_named(row), row.text(), *(other[number].text() for other in results.others.values()), _number(row.paper)]
        for number, row in enumerate(results.rows)
    ]
    return head, rows


def class_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of classes, with the paper's methods where its classes are ours."""
    per_class, rows = results.table.per_class, results.classes
    with_paper = any(row.paper is not None for row in rows)
    # what it calls "Ours" is not ours
    methods = ["paper" if name == "Ours" else name for name in per_class.methods]
    head = ["class", "here", *(methods if with_paper else ())]
    lines = [[row.name, row.text(), *_papers(per_class, number, with_paper)] for number, row in enumerate(rows)]
    means = [_number(value) for value in per_class.miou.values()] if with_paper else []
    return head, [*lines, ["mIoU", results.rows[0].text(), *means]]


def _papers(per_class: PerClass, number: int, with_paper: bool) -> list[str]:
    return [_number(iou[number]) for iou in per_class.methods.values()] if with_paper else []


def _named(row: Found) -> str:
    return f"{row.name} (default)" if row.default else row.name


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def terminal_tables(results: Results) -> list[Table]:
    """For the terminal."""
    shown = [_terminal(heading(results), *cells(results))]
    if results.classes:
        shown.append(_terminal("", *class_cells(results)))
    return shown


def _terminal(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def markdown(results: Results) -> str:
    """The tables in Markdown."""
    parts = [_markdown(*cells(results))]
    if results.classes:
        parts.append(_markdown(*class_cells(results)))
    return "\n\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plot(results: Results) -> Figure:
    """Our numbers and the paper's side by side, a row each, either on a scale of its own: their order is compared.

    A diamond is the mean, a line the standard deviation, a dot each seed; the best diamond is filled.
    """
    rows = results.compared
    sides = [("here", [row.mean for row in rows], OURS)]
    if any(row.paper is not None for row in rows):
        sides.append(("paper", [row.paper for row in rows], PAPERS))
    figure = Figure(figsize=(3.2 + 2.9 * len(sides), 1.1 + 0.28 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axis, (side, means, colour) in zip(axes, sides):
        _points(axis, means, colour, rows if side == "here" else [])
        axis.set_xlabel(f"{side}, percent", fontsize=8)
    names = [readable(_named(row)) for row in rows]
    axes[0].set_yticks(range(len(rows)), [name for name, _ in names], fontsize=8)
    for label, (_, families) in zip(axes[0].get_yticklabels(), names):
        label.set_parse_math(False)
        label.set_fontfamily(families)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(heading(results), fontsize=8.5, wrap=True)
    return figure


def _points(axis: Axes, means: Sequence[float | None], colour: str, seeds: Sequence[Found]) -> None:
    """The numbers of one side; ``seeds``: the rows where each seed's is shown, too."""
    best = max((mean for mean in means if mean is not None), default=None)
    for place, mean in enumerate(means):
        if mean is None:
            continue
        end, row = mean, seeds[place] if seeds else None
        if row is not None and row.spread is not None:
            axis.plot([mean - row.spread, mean + row.spread], [place, place], color="black", linewidth=1)
            axis.plot(row.values, [place] * len(row.values), "o", color="black", markersize=2.5)
            end = max(mean + row.spread, *row.values)
        axis.plot(mean, place, "D", color=colour, markersize=6, markerfacecolor=colour if mean == best else "white")
        axis.annotate(f"{mean:.1f}", (end, place), (7, 0), textcoords="offset points", va="center", fontsize=8)
    axis.margins(x=0.22)
    axis.grid(axis="both", alpha=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
