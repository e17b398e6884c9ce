"""The report: a Markdown file whose marked parts are written from the results, with a plot for each table beside it."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch

from ..pictures.panels import save
from ..runtime.writing import whole
from .paper import PaperTable
from .results import Results, in_words
from .show import heading, markdown, notes, plot
from .sweep import Sweep

BEGIN, END = "<!-- afa reproduce: {} -->", "<!-- end of {} -->"
HEAD = "# The paper's tables, reproduced\n"


def write_report(path: Path, sweep: Sweep, found: Sequence[Results], command: str) -> list[Path]:
    """Write or update the report. What stands outside the marks of a part stays as it is; a part that the file does not
    have yet is added at its end.

    -> the files written, the report first.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else HEAD
    written = [path]
    for results in found:
        name = results.table.name
        picture = path.parent / path.stem / f"{name}.png"
        written.append(save(plot(results), picture))
        link = quote(f"{path.stem}/{picture.name}")  # else a space would end it
        text = _with(text, name, _part(results, link, _run(sweep, results.table, command)))
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return written


def _with(text: str, name: str, part: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    block = f"{begin}\n\n{part}\n\n{end}"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if marked.search(text):
        return marked.sub(lambda _: block, text, count=1)
    return f"{text.rstrip()}\n\n{block}\n"


def _part(results: Results, picture: str, run: str) -> str:
    said = " ".join([in_words(results), *notes(results)])
    return f"**{heading(results)}.**\n\n{markdown(results)}\n\n![{results.table.number}]({picture})\n\n{said}\n\n{run}"


def _run(sweep: Sweep, table: PaperTable, command: str) -> str:
    """What made the numbers."""
    limit = sweep.base.eval.limit
    scored = "all pictures" if limit is None else f"the first {limit} pictures of each list"
    return (
        f"By `{command}`: {_networks(sweep, table)}; scored on {scored}; torch {torch.__version__} on"
        f" {platform.machine()}."
    )


def _networks(sweep: Sweep, table: PaperTable) -> str:
    """Which networks they are of."""
    if table.refines and sweep.checkpoint is not None:
        return f"the CAM of the network that is given, {sweep.checkpoint.name}"
    config = sweep.base
    schedule, step = config.schedule, config.step
    seeds = ", ".join(map(str, sweep.seeds))
    return (
        f"{config.model.backbone}, crop {config.augment.crop}, batch {config.loader.batch_size},"
        f" {schedule.max_iters} steps (classifier alone until {step.cam_iters}, random walk from {step.aff_iters}),"
        f" {'from scratch' if config.model.pretrained is False else 'from ImageNet weights'}; seed"
        f"{'s' * (len(sweep.seeds) > 1)} {seeds}"
    )
