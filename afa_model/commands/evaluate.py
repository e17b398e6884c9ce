"""`afa evaluate`: score a checkpoint against masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..config import section, to_dict
from ..config.renamed import flatten
from ..data.classes import other_name
from ..data.datasets import EvaluationSet
from ..data.settings import DataSettings
from ..errors import DataError, SavingError
from ..evaluation.evaluate import EvaluateSettings, evaluate
from ..evaluation.scores import EvaluationResult
from ..labels.settings import LabelSettings
from ..runs.restore import Restored
from ..runtime.notices import notice
from ..runtime.processes import processes
from ..runtime.writing import writable_file
from .options import asks_for_help, mistakes_named, parser_of, restored, set_defaults, switched_on, told_of_the_run


def main(argv: Sequence[str]) -> None:
    """`afa evaluate --checkpoint RUN [--data.root DIR] [--crf] [--json FILE] [--csv FILE]`."""
    parser = parser_of(
        "afa evaluate",
        "Score a checkpoint against masks: IoU per class, mIoU and pixel accuracy of the CAM, the CAM refined,"
        " the random-walk label (these know the image-level labels) and the segmentation. Settings"
        " that are not given are those of the run.",
    )
    parser.add_argument("--json", type=str, default=None, help="also write the scores to this JSON file")
    parser.add_argument("--csv", type=str, default=None, help="also write the scores to this CSV file")
    told = "also score the segmentation after the dense CRF: --eval.crf true, with --labels.dense_crf.KEY"
    parser.add_argument("--crf", type=bool, default=None, help=told)
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(EvaluateSettings, "eval")
    parser.add_class_arguments(LabelSettings, "labels")
    run = restored(argv)
    if asks_for_help(argv):
        parser.of_the_run(["data", "eval", "labels"])
    if run is not None:
        # As the run scores: where its evaluation differs from its training, that is the default here, and an option
        # --labels.KEY comes before it. A protocol that is asked for is not mixed with what the run said of another.
        settings = run.config.eval
        if any(word.partition("=")[0] == "--eval.protocol" for word in argv):
            settings = settings.without_rows()
        scoring = replace(run.config, labels=settings.said(run.config.labels), eval=settings.as_in_training())
        config = to_dict(scoring)
        set_defaults(parser, flatten({name: config[name] for name in ("data", "eval", "labels")}))
    options = parser.parse_args(switched_on(argv, "--crf"))
    if options.crf is not None:
        options.eval.crf = options.crf
    data = section(DataSettings, options.data, "data.")
    settings = section(EvaluateSettings, options.eval, "eval.")
    labels = section(LabelSettings, options.labels, "labels.")
    outputs = {kind: options[kind] for kind in ("json", "csv") if options[kind] is not None}
    outputs = {kind: writable_file(path, kind) for kind, path in outputs.items()}
    with processes(options.device) as here, mistakes_named():
        with told_of_the_run(run, data):
            dataset = EvaluationSet(data)
        _same_classes(run, dataset)
        result = evaluate(run.model.to(here.device), dataset, settings, labels)
        if not here.first:
            return
        result.about.update(checkpoint=str(run.path), iteration=run.iteration, root=data.root)
        print(f"{run.path}, {run.trained}, on {data.val_split} of {data.root}")
        problems = _written(result, outputs)
        console = Console()
        result.print(console if console.is_terminal else Console(width=120))
        if problems:
            raise SavingError("\n".join(problems))


def _same_classes(run: Restored, dataset: EvaluationSet) -> None:
    """
    Raises:
        DataError: the data set calls a class otherwise than the model, which would be scored as if it were the same.
    """
    differs = other_name(run.class_names, dataset.class_names)
    if differs is None or len(run.class_names) != len(dataset.class_names):  # that is told with the numbers
        return
    if run.names_known:
        raise DataError(
            f"data.root: {dataset.root} has other classes than {run.path}: {differs} (if they mean the same, write the"
            f" checkpoint's names into {dataset.root / 'classes.txt'})"
        )
    notice("classes", f"{run.path} does not say what its classes are; taken are those of {dataset.root}")


def _written(result: EvaluationResult, outputs: Mapping[str, Path]) -> list[str]:
    """Write each file, whatever becomes of the others; gives what went wrong."""
    problems = []
    for kind, path in outputs.items():
        try:
            getattr(result, f"write_{kind}")(path)
        except OSError as error:
            problems.append(f"{kind}: {path} cannot be written ({error.strerror})")
        else:
            print(f"wrote {path}")
    return problems
