"""What both pages have: the places to drop files, examples, sliders, messages, pictures."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from afa_kernels.ops.par import DILATIONS

from ..errors import AfaError, reason
from .photographs import Example
from .quiet_gradio import gr

PAGE = {"analytics_enabled": False, "fill_width": True, "delete_cache": (600, 3600)}
ONE_AT_A_TIME = {"concurrency_id": "afa", "concurrency_limit": 1, "api_visibility": "private"}
"""Of the listeners that compute: all share the processor, or the GPU."""
QUICK = {"show_progress": "hidden", **ONE_AT_A_TIME}
SLOW = {"show_progress": "minimal", **ONE_AT_A_TIME}
LIVE = {"trigger_mode": "always_last", **QUICK}
"""Of sliders that are dragged: what was asked for last is what is shown last."""
DROPPED = {
    "js": "(...given) => {document.querySelectorAll('.toast-close').forEach(each => each.click()); return given}"
}
"""Of places to drop files: the browser's own words about the file before, which was too large, go with the next one."""

Updates = dict[Any, Any]


def header(title: str, about: str) -> None:
    gr.HTML(f'<div class="afa-head"><h1>{escape(title)}</h1><p>{escape(about)}</p></div>')


def note(words: str) -> str:
    """A line that says what is shown."""
    return f'<div class="afa-note" role="status">{escape(words)}</div>'


def mistake(words: str) -> str:
    """A line that says what is wrong."""
    return f'<div class="afa-error" role="alert">{escape(words)}</div>'


def telling(
    status: gr.HTML, dropped: gr.File | None = None
) -> Callable[[Callable[..., Updates]], Callable[..., Updates]]:
    """For listeners: what goes wrong is told in ``status``, and all else stays as it is. The place where a file was
    ``dropped`` is empty afterwards, for the next one.
    """

    def around(listener: Callable[..., Updates]) -> Callable[..., Updates]:
        @functools.wraps(listener)
        def told(*given: Any) -> Updates:
            empty = {} if dropped is None else {dropped: None}
            try:
                return empty | listener(*given)
            except (AfaError, ValueError) as error:
                return empty | {status: mistake(" ".join(str(error).split()))}
            except Exception as error:  # of a page that somebody looks at: not the server's end
                traceback.print_exc(file=sys.stderr)
                words = f"that did not work: {reason(error)} (more where afa serve was started)"
                return empty | {status: mistake(words)}

        return told

    return around


def drop(label: str, elem_id: str) -> gr.File:
    """A place to drop a file of any kind: what it is its reader says."""
    return gr.File(label=label, height=92, type="filepath", elem_id=elem_id, elem_classes="afa-drop")


def label_list() -> gr.File:
    """Labels to download."""
    words = "Labels as PNG: class indices, VOC's colours"
    return gr.File(label=words, interactive=False, file_count="multiple", elem_id="files", elem_classes="afa-files")


def examples(offered: Sequence[Example]) -> gr.Gallery:
    pictures = [(each.read().pixels, each.name) for each in offered]
    return gr.Gallery(
        [picture for picture, _ in pictures],
        label="or take an example",
        columns=3,
        height=122 if len(offered) <= 3 else 216,
        object_fit="cover",
        allow_preview=False,
        buttons=[],
        interactive=False,
        elem_classes="afa-examples",
        format="png",
    )


def picture(label: str, **more: Any) -> gr.Image:
    """A picture to look at, enlarge and download as PNG."""
    kept = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"], "show_label": True}
    return gr.Image(label=label, min_width=235, elem_classes="afa-picture", **kept, **more)


def shown(value: str | None, label: str) -> Any:
    """A new picture's file, with what it is and how long it took above it."""
    return gr.update(value=value, label=label)


def dilation_slider(dilations: Sequence[int] = DILATIONS) -> gr.Slider:
    """How many of the dilations, from the smallest: the rows of the paper's table of them."""
    listed = ", ".join(map(str, sorted(dilations)))
    return gr.Slider(
        1, len(dilations), len(dilations), step=1, label="Dilations", info=f"how many of {listed}, from the left"
    )


def iteration_slider(value: int) -> gr.Slider:
    return gr.Slider(0, max(30, value), value, step=1, label="Iterations")


def first_of(dilations: Sequence[int], count: int) -> tuple[int, ...]:
    """The smallest ``count`` of the dilations."""
    return tuple(sorted(dilations)[: max(1, int(count))])
