"""`afa figures`: the figures of the paper's supplement, of one's own models and photographs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..config import section
from ..config.renamed import flatten
from ..errors import ConfigError
from ..evaluation.figures import FigureSettings, draw_figures, numbers_of
from ..labels.evidence import MapSettings
from ..labels.settings import LabelSettings
from ..pictures.seen import Models
from ..runs.restore import Restored, load_model
from ..runtime.notices import notice
from ..runtime.processes import processes
from .options import (
    asks_for_help,
    mistakes_named,
    parser_of,
    part,
    positionals_first,
    restored,
    set_defaults,
    switched_on,
)


def main(argv: Sequence[str]) -> int:
    """`afa figures 3|4|5|6|7|8|all --checkpoint RUN [--without RUN] [--cnn RUN] IMAGE... [--out DIR]`."""
    parser = parser_of(
        "afa figures",
        "Draw the figures of the paper's supplement, for print, as PNG and PDF: CAM of a CNN, of the transformer, and"
        " refined with raw attention and learned affinity (3); pseudo-labels before and after PAR (4); attention,"
        " affinity and pseudo-labels of a point without and with AFA (5); results beside the ground truth (6);"
        " attention without and with AFA (7); weights of the heads (8). Settings that are not given are those of the"
        " run.",
    )
    parser.add_argument("figure", type=str, metavar="FIGURE", help="3, 4, 5, 6, 7, 8 or all")
    parser.add_argument(
        "images",
        nargs="*",
        type=str,
        metavar="IMAGE",
        help="photographs, folders of them (with their sub-folders), or patterns such as 'photos/*.jpg'",
    )
    told = "the run or checkpoint of a model trained without AFA (--step.aff_weight 0), for figures 5 and 7"
    parser.add_argument("--without", type=str, default=None, metavar="CHECKPOINT", help=told)
    told = "the run or checkpoint of a CNN (--model.backbone resnet50), whose CAM figure 3 shows too"
    parser.add_argument("--cnn", type=str, default=None, metavar="CHECKPOINT", help=told)
    parser.add_argument("--out", type=str, default="figures", help="folder to write into")
    parser.add_class_arguments(FigureSettings)
    parser.add_class_arguments(LabelSettings)
    run = restored(argv)
    if asks_for_help(argv):
        parser.of_the_run(["exif", *(item.name for kind in (MapSettings, LabelSettings) for item in fields(kind))])
    if run is not None:
        sizes = asdict(run.config.eval.by("test").maps())
        labels = flatten(asdict(run.config.eval.labels(run.config.labels)))
        set_defaults(parser, {**sizes, **labels, "exif": run.config.data.exif})
    options = parser.parse_args(positionals_first(switched_on(argv, "--crf")))
    settings = section(FigureSettings, part(FigureSettings, options))
    how = section(LabelSettings, part(LabelSettings, options))
    with processes(options.device) as here, mistakes_named():
        numbers_of(options.figure)
        others = {name: _other(name, options[name], run) for name in ("without", "cnn")}
        _tell_of_afa(others["without"])
        models = {name: other and other.model.to(here.device) for name, other in others.items()}
        done = draw_figures(
            options.figure,
            Models(run.model.to(here.device), **models),
            options.images,
            Path(options.out).expanduser(),
            run.class_names,
            settings,
            how,
            run.config.data,
            f"{run.path.name}, {run.trained}",
        )
    for (png, pdf), caption in done.files:
        print(f"{png} and {pdf.name}", f"  {caption}", sep="\n")
    for why in done.left_out.values():
        print(f"left out: {why}")
    if not done.problems:
        return 0
    print(f"{len(done.problems)} could not be drawn:", *done.problems, sep="\n  ", file=sys.stderr)
    return 1


def _other(name: str, path: str | None, run: Restored) -> Restored | None:
    """The model to compare with.

    Raises:
        ConfigError: it was trained for other classes.
    """
    if path is None:
        return None
    other = load_model(path)
    ours, theirs = run.class_names, other.class_names
    if len(ours) != len(theirs):
        raise ConfigError(f"{name}: {other.path} has {len(theirs)} classes, {run.path} has {len(ours)}")
    if ours != theirs:
        mine, its = next(pair for pair in zip(ours, theirs) if pair[0] != pair[1])
        raise ConfigError(f"{name}: {other.path} names other classes than {run.path}: {its!r} in the place of {mine!r}")
    return other


def _tell_of_afa(without: Restored | None) -> None:
    if without is not None and without.config.step.aff_weight > 0:
        weight = without.config.step.aff_weight
        notice("without", f"{without.path} was trained with AFA (step.aff_weight {weight:g}), not without")
