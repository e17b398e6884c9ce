"""`afa evaluate`: score a checkpoint against masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from ..config import section, to_dict
from ..config.renamed import flatten
from ..data.datasets import DataSettings, EvaluationSet
from ..evaluation.evaluate import EvaluateSettings, evaluate
from ..labels.settings import LabelSettings
from ..runtime.processes import processes
from .options import mistakes_named, parser_of, restored, set_defaults


def main(argv: Sequence[str]) -> None:
    """`afa evaluate --checkpoint RUN [--data.root DIR] [--json FILE] [--csv FILE]`."""
    parser = parser_of(
        "afa evaluate",
        "Score a checkpoint against masks: IoU per class, mIoU and pixel accuracy of the CAM, the CAM refined,"
        " the random-walk label (these know the image-level labels) and the segmentation. Settings"
        " that are not given are those of the run.",
    )
    parser.add_argument("--json", type=str, default=None, help="also write the scores to this JSON file")
    parser.add_argument("--csv", type=str, default=None, help="also write the scores to this CSV file")
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(EvaluateSettings, "eval")
    parser.add_class_arguments(LabelSettings, "labels")
    run = restored(argv)
    if run is not None:
        # As the run scores: where its evaluation differs from its training, that is the default here, and an option
        # --labels.KEY comes before it. A protocol that is asked for is not mixed with what the run said of another.
        settings = run.config.eval
        if any(word.partition("=")[0] == "--eval.protocol" for word in argv):
            settings = settings.without_rows()
        scoring = replace(run.config, labels=settings.said(run.config.labels), eval=settings.as_in_training())
        config = to_dict(scoring)
        set_defaults(parser, flatten({name: config[name] for name in ("data", "eval", "labels")}))
    options = parser.parse_args(argv)
    data = section(DataSettings, options.data, "data.")
    settings = section(EvaluateSettings, options.eval, "eval.")
    labels = section(LabelSettings, options.labels, "labels.")
    with processes(options.device) as here, mistakes_named():
        dataset = EvaluationSet(data)
        result = evaluate(run.model.to(here.device), dataset, settings, labels)
        if not here.first:
            return
        result.about.update(checkpoint=str(run.path), iteration=run.iteration, root=data.root)
        print(f"{run.path}, trained for {run.iteration} steps, on {data.val_split} of {data.root}")
        console = Console()
        result.print(console if console.is_terminal else Console(width=120))
        for kind, path in (("json", options.json), ("csv", options.csv)):
            if path is not None:
                getattr(result, f"write_{kind}")(path)
                print(f"wrote {path}")
