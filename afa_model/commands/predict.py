"""`afa predict`: label photographs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..config import section
from ..config.renamed import flatten
from ..evaluation.predict import PredictSettings, draw_head_weights, predict
from ..labels.evidence import MapSettings
from ..labels.settings import LabelSettings
from ..runtime.processes import processes
from ..runtime.writing import writable_file
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
    """`afa predict IMAGE... --checkpoint RUN --out DIR [--crf] [--head_weights FILE]`."""
    parser = parser_of(
        "afa predict",
        "Label photographs. For each one a PNG of class indices with the VOC palette, and a panel:"
        " photograph, CAM, affinity of a point, pseudo-label, prediction. Settings that are not given are"
        " those of the run.",
    )
    parser.add_argument(
        "images",
        nargs="*",
        type=str,
        metavar="IMAGE",
        help="photographs, folders of them (with their sub-folders), or patterns such as 'photos/*.jpg'",
    )
    parser.add_argument("--out", type=str, default="predictions", help="folder to write into")
    parser.add_argument(
        "--head_weights",
        type=str,
        default=None,
        metavar="FILE",
        help="draw how much each attention head counts in the affinity as this PNG; photographs may then be left out",
    )
    parser.add_class_arguments(PredictSettings)
    parser.add_class_arguments(LabelSettings)
    run = restored(argv)
    if asks_for_help(argv):
        parser.of_the_run(["batch", *(item.name for kind in (MapSettings, LabelSettings) for item in fields(kind))])
    if run is not None:
        sizes = {**asdict(run.config.eval.by("test").maps()), "batch": run.config.eval.batch}
        set_defaults(parser, {**sizes, **flatten(asdict(run.config.eval.labels(run.config.labels)))})
    options = parser.parse_args(positionals_first(switched_on(argv, "--crf")))
    settings = section(PredictSettings, part(PredictSettings, options))
    how = section(LabelSettings, part(LabelSettings, options))
    out = Path(options.out).expanduser()
    if options.head_weights is not None:
        options.head_weights = writable_file(options.head_weights, "head_weights")
    with processes(options.device) as here, mistakes_named():
        model = run.model.to(here.device)
        if options.head_weights is not None:
            title = f"{run.path.name}, {run.trained}"
            print(f"wrote {draw_head_weights(model, options.head_weights, title)}")
            if not options.images:
                return 0
        done = predict(model, options.images, out, run.class_names, settings, how)
    labelled = [item for item in done if item.label is not None]
    names = [str(item.label.relative_to(out).with_name(item.image.name)) for item in labelled]
    width = max(map(len, names))
    for name, item in zip(names, labelled):
        found = ", ".join(f"{what} {100 * score:.0f} %" for what, score in item.found) or "nothing"
        print(f"{name:{width}}  {found}")
    files = "labels and panels" if settings.panels else "labels"
    print(f"wrote {files} of {len(labelled)} photograph{'s' * (len(labelled) != 1)} to {out}")
    problems = [item.problem for item in done if item.problem is not None]
    if not problems:
        return 0
    print(f"{len(problems)} could not be labelled:", *problems, sep="\n  ", file=sys.stderr)
    return 1
