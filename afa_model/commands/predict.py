"""`afa predict`: label photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..config import section
from ..evaluation.predict import PredictSettings, draw_head_weights, predict
from ..labels.settings import LabelSettings
from ..runtime.processes import processes
from .options import mistakes_named, parser_of, part, restored, set_defaults


def main(argv: Sequence[str]) -> None:
    """`afa predict IMAGE... --checkpoint RUN --out DIR [--head_weights FILE]`."""
    parser = parser_of(
        "afa predict",
        "Label photographs. For each one a PNG of class indices with the VOC palette, and a panel:"
        " photograph, CAM, affinity of a point, pseudo-label, prediction. Settings that are not given are"
        " those of the run.",
    )
    parser.add_argument(
        "images", nargs="*", type=str, metavar="IMAGE", help="photographs, or folders of them"
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
    if run is not None:
        sizes = asdict(run.config.eval.by("test").maps())
        set_defaults(parser, {**sizes, **asdict(run.config.eval.labels(run.config.labels))})
    options = parser.parse_args(argv)
    settings = section(PredictSettings, part(PredictSettings, options))
    how = section(LabelSettings, part(LabelSettings, options))
    with processes(options.device) as here, mistakes_named():
        model = run.model.to(here.device)
        if options.head_weights is not None:
            title = f"{run.path.name}, step {run.iteration}"
            print(f"wrote {draw_head_weights(model, options.head_weights, title)}")
            if not options.images:
                return
        done = predict(model, options.images, options.out, run.class_names, settings, how)
    width = max(len(item.image.name) for item in done)
    for item in done:
        found = ", ".join(f"{name} {100 * score:.0f} %" for name, score in item.found) or "nothing"
        print(f"{item.image.name:{width}}  {found}")
    files = "labels and panels" if settings.panels else "labels"
    print(f"wrote {files} of {len(done)} photograph{'s' * (len(done) > 1)} to {Path(options.out)}")
