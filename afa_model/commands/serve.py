"""`afa serve`: a page on this machine that shows what a model sees, or what refinements make of a mask."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from ..config import Parser, section
from ..data.lists import entries_of, folder_of_split, list_file, list_lines
from ..errors import DataError
from ..labels.evidence import MapSettings
from ..labels.settings import LabelSettings
from ..runs.restore import Restored, load_model
from ..runtime.processes import choose_device
from ..web.photographs import MOST_EXAMPLES, Example, examples_in, examples_of, generated_examples
from ..web.settings import ServeSettings
from .options import asks_for_help, part, positionals_first


def main(argv: Sequence[str]) -> None:
    """`afa serve [CHECKPOINT] [--port N] [--host ADDRESS] [--examples FOLDER]`."""
    parser = Parser(
        prog="afa serve",
        description="Show a page in the browser, on this machine alone. With a checkpoint: drop a photograph, tick the"
        " classes that it shows or let the classifier say, click a point; the page shows CAM, affinity of the point,"
        " random walk, pseudo-labels before and after their refinement, prediction, and what each takes. Without one:"
        " paint or drop a mask, and see what PAMR, PAR and the dense CRF make of it. Ctrl-C ends it.",
    )
    told = "a run's folder (its best checkpoint is taken), a checkpoint, or a folder as the Hub keeps one"
    parser.add_argument("checkpoint", nargs="?", type=str, default=None, metavar="CHECKPOINT", help=told)
    parser.add_argument("--device", type=str, default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_class_arguments(ServeSettings)
    options = parser.parse_args(list(argv) if asks_for_help(argv) else positionals_first(argv))
    settings = section(ServeSettings, part(ServeSettings, options))
    device = choose_device(options.device)
    from ..web.model_page import Served, model_page  # and with them Gradio, which takes seconds and may be missing
    from ..web.refine_page import refine_page
    from ..web.serving import serving

    if options.checkpoint is None:
        what, build = "masks are refined", lambda: refine_page(settings, device)
    else:
        run = load_model(options.checkpoint, device)
        offered = examples_for(run, settings)
        what = f"{run.path}, {run.trained}"
        about = f"{run.path}, {run.trained}, {len(run.class_names)} classes"
        shown = Served(run.model, run.class_names, *settings_of(run), about)
        build = lambda: model_page(shown, settings, offered)
    atexit.register(gc.freeze)  # or Python looks through all of torch and Gradio once more as it ends, for seconds
    stop = threading.Event()
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # HUP: a terminal closes
    before = {end: signal.signal(end, lambda *_: stop.set()) for end in ends if _heeded(end)}
    try:
        with serving(build, settings) as address:
            print(f"{what}, on {device}: open {address} (Ctrl-C ends it)", flush=True)
            stop.wait()
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _heeded(end: signal.Signals) -> bool:
    """Not so where somebody asked that it be ignored, as nohup does."""
    return signal.getsignal(end) is not signal.SIG_IGN


def settings_of(run: Restored) -> tuple[MapSettings, LabelSettings]:
    """The sizes in which photographs go through a run's model, and how labels are made of its CAM: as `afa predict` has
    them.
    """
    settings = run.config.eval.by("test")
    return settings.maps(), settings.labels(run.config.labels)


def examples_for(run: Restored, settings: ServeSettings) -> list[Example]:
    """Photographs to offer: of the folder named, else of the run's validation set, else generated ones.

    Raises:
        DataError: the folder named holds none.
    """
    if settings.examples is not None:
        return examples_in(settings.examples, settings)
    data = run.config.data
    root = Path(run.folder or os.curdir, data.root)
    try:
        path = list_file(root, data.val_split, data.list_dir)
        lines = list_lines(path)[: 5 * MOST_EXAMPLES]
        folder = folder_of_split(root, data.val_split, data.image_dir, lines[0][1])
        entries = entries_of(path, lines, root, folder, data.mask_dir)
        found = examples_of([entry.photo for entry in entries if entry.photo is not None], settings)
    except DataError:  # the data are elsewhere, or gone
        found = []
    return found or generated_examples()
