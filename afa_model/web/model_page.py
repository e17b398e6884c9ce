"""The page of a model: a photograph, and what the model sees in it, from the CAM to the segmentation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ..errors import DataError
from ..labels.evidence import MapSettings
from ..labels.kinds import title
from ..labels.settings import LabelSettings
from ..pictures.overlays import AFFINITY_COLORS, heat_overlay, label_overlay
from .clock import in_words
from .photographs import Example, Photograph, photograph
from .pictures import enlargement, label_files, legend, marked, picture_file, shown_in
from .quiet_gradio import gr
from .seen import Labels, Look, affinity_at, heat_of, iterations_of, labels_of, look, peak, settings_of
from .serving import own_folder
from .settings import ServeSettings
from .widgets import (
    DROPPED,
    LIVE,
    PAGE,
    QUICK,
    SLOW,
    Updates,
    dilation_slider,
    drop,
    examples,
    first_of,
    header,
    iteration_slider,
    label_list,
    note,
    picture,
    shown,
    telling,
)

REFINEMENTS = {"PAR": "par", "PAMR": "pamr", "dense CRF": "crf", "none": "none"}
MOST_BOXES = 30  # classes that are offered as boxes to tick; more are to be searched
POINT = "Click a point in any picture to see its affinity."


@dataclass(frozen=True)
class Served:
    """A model and what is known of it.

    Attributes:
        model: on its device, in eval mode.
        names: K class names, background first.
        sizes: in which photographs go through it.
        how: labels are made of its CAM.
        about: what it is, in a line.
    """

    model: nn.Module
    names: Sequence[str]
    sizes: MapSettings
    how: LabelSettings
    about: str


@dataclass(frozen=True)
class View:
    """What one visitor looks at: a photograph as the model sees it, a point (y, x) of it, and what is said of it;
    ``number`` tells it from photographs before.
    """

    seen: Look
    point: tuple[int, int]
    said: str
    number: int = field(default_factory=itertools.count(1).__next__)


class Pictures:
    """What is drawn of a view, by the picture's name: (uint8 [H, W, 3], what it is and how long it took)."""

    def __init__(self, served: Served):
        self.served = served

    def of_photograph(self, view: View) -> dict[str, tuple[np.ndarray, str]]:
        """The photograph, the point's affinity and the prediction."""
        seen, pixels = view.seen, view.seen.photograph.pixels
        took = in_words(seen.seconds["classifier"])
        of_point = affinity_at(seen, view.point)
        photo = pixels if of_point is None else marked(pixels, view.point)
        made = {"photograph": (photo, f"photograph · classifier {took}")}
        if of_point is not None:
            over = heat_overlay(pixels, of_point[0], AFFINITY_COLORS)
            made["affinity"] = marked(over, view.point), f"affinity of the point · {in_words(of_point[1])}"
        if seen.prediction is not None:
            words = f"prediction · {in_words(seen.seconds['prediction'])}"
            made["prediction"] = label_overlay(pixels, seen.prediction), words
        return made

    def of_classes(
        self, view: View, classes: Sequence[int], labels: Labels, how: LabelSettings
    ) -> dict[str, tuple[np.ndarray, str]]:
        """The CAM and the pseudo-labels."""
        pixels = view.seen.photograph.pixels
        heat = heat_overlay(pixels, heat_of(view.seen, classes))
        made = {"heat": (heat, f"CAM · {in_words(view.seen.seconds['CAM'])}")}
        for kind, label in labels.maps.items():
            words = "CAM, as a label" if kind == "cam" else title(kind, how.refinement)
            made[kind] = label_overlay(pixels, label), f"{words} · {in_words(labels.seconds[kind])}"
        return made


@dataclass(frozen=True)
class Parts:
    """The components of the page that listen or are listened to; ``controls`` are what labels are made by,
    ``on`` is the number of the view whose classes the browser shows."""

    state: gr.State
    on: gr.Number
    file: gr.File
    gallery: gr.Gallery
    status: gr.HTML
    ticked: Any
    ask: gr.Button
    controls: list[Any]
    keys: gr.HTML
    pictures: Mapping[str, gr.Image]
    files: gr.File


def model_page(served: Served, settings: ServeSettings, offered: Sequence[Example]) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title="AFA: what a model sees", **PAGE) as page:
        _listen(page, _laid_out(served, offered), served, settings, offered)
    return page


def _laid_out(served: Served, offered: Sequence[Example]) -> Parts:
    how = served.how
    header("AFA · what a model sees", f"{served.about}. Nothing leaves this machine.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=290):
            file, gallery = drop("Drop a photograph", "photograph-file"), examples(offered)
            status = gr.HTML(note(POINT), elem_id="status")
            ticked = _class_choice(list(served.names)[1:])
            ask = gr.Button("Let the classifier say", size="sm", elem_id="classifier")
            by = {"value": _called(how.refinement), "label": "Refinement of the labels"}
            refinement = gr.Radio(list(REFINEMENTS), elem_id="refinement", **by)
            dilations, iterations = dilation_slider(how.dilations), iteration_slider(iterations_of(how))
            words = "CAM below it is background; between the two the label is left open"
            low = gr.Slider(0, 1, how.low_score, step=0.01, label="Low background score", info=words)
            high = gr.Slider(0, 1, how.high_score, step=0.01, label="High background score")
        with gr.Column(scale=4, min_width=600):
            keys = gr.HTML("", elem_id="legend")
            pictures = _picture_rows(served.model.has_affinity, how)
            files = label_list()
    controls = [ticked, refinement, dilations, iterations, low, high]
    return Parts(
        gr.State(None), gr.Number(0, visible=False), file, gallery, status, ticked, ask, controls, keys, pictures, files
    )


def _listen(page: gr.Blocks, at: Parts, served: Served, settings: ServeSettings, offered: Sequence[Example]) -> None:
    """What happens on the page: each listener gives the components that change."""
    names, how, attends, draw = list(served.names), served.how, served.model.has_affinity, Pictures(served)
    numbers = {name: number for number, name in enumerate(names) if number}
    state, status, ticked, controls, pictures = at.state, at.status, at.ticked, at.controls, at.pictures
    everything = [state, at.on, status, ticked, at.keys, at.files, *pictures.values()]

    def update(view: View, made: Mapping[str, tuple[np.ndarray, str]]) -> Updates:
        of, folder = view.seen.photograph.name, own_folder()
        files = {name: picture_file(each[0], name, of, folder) for name, each in made.items()}
        return {pictures[name]: shown(files[name], made[name][1]) for name in made}

    def labelled(view: View, chosen: Sequence[str], name: str, count: int, turns: int, *scores: float) -> Updates:
        classes = sorted(numbers[each] for each in chosen)
        refined = REFINEMENTS[name]
        by = settings_of(how, refined, first_of(how.dilations, count), int(turns), *scores)
        labels = labels_of(view.seen, classes, by)
        kept = dict(labels.maps)
        if view.seen.prediction is not None:
            kept["prediction"] = view.seen.prediction
        shares = {number: float(share) for number, share in enumerate(view.seen.probabilities, 1)}
        listed = sorted({*shown_in(kept.values()), *classes})
        updates = update(view, draw.of_classes(view, classes, labels, by))
        updates |= {status: note(view.said), at.keys: legend(listed, names, shares, classes)}
        return {**updates, at.files: label_files(kept, view.seen.photograph.name, own_folder())}

    def begin(taken: Photograph, chosen: Sequence[str], *rest: Any) -> Updates:
        seen = look(served.model, taken, served.sizes, how)
        found = [names[number] for number in seen.found]
        words = f"{taken.said}. The classifier finds {', '.join(found)}. {POINT if attends else ''}"
        view = View(seen, peak(seen, seen.found), words)
        updates = {state: view, at.on: view.number, ticked: gr.update(value=found)}
        return {**updates, **update(view, draw.of_photograph(view)), **labelled(view, found, *rest)}

    @telling(status, at.file)
    def take(path: str | None, *asked: Any) -> Updates:
        return {} if path is None else begin(photograph(path, settings), *asked)

    @telling(status)
    def take_example(chosen: gr.SelectData, *asked: Any) -> Updates:
        return begin(offered[chosen.index].read(), *asked)

    @telling(status)
    def first(*asked: Any) -> Updates:
        return begin(offered[0].read(), *asked) if offered else {}

    @telling(status)
    def again(view: View | None, on: int, chosen: Sequence[str], *rest: Any) -> Updates:
        if view is None:
            return {}
        of_before = on != view.number  # ticked while this photograph was on its way, which then ticked its own
        return labelled(view, [names[number] for number in view.seen.found] if of_before else chosen, *rest)

    @telling(status)
    def classifier(view: View | None, chosen: Sequence[str], *rest: Any) -> Updates:
        if view is None:
            raise DataError("drop a photograph first, or take an example")
        found = [names[number] for number in view.seen.found]
        return {ticked: gr.update(value=found), **labelled(view, found, *rest)}

    @telling(status)
    def point(clicked: gr.SelectData, view: View | None) -> Updates:
        if view is None:
            return {}
        times = enlargement(view.seen.photograph.size)
        x, y = (int(place) // times for place in clicked.index)
        view = replace(view, point=(y, x))
        made = draw.of_photograph(view)
        made.pop("prediction", None)
        return {state: view, status: note(view.said), **update(view, made)}

    page.load(first, controls, everything, **SLOW)
    at.file.upload(take, [at.file, *controls], [at.file, *everything], **DROPPED, **SLOW)
    at.gallery.select(take_example, controls, everything, **SLOW)
    at.ask.click(classifier, [state, *controls], everything, **QUICK)
    for control in controls:
        control.input(again, [state, at.on, *controls], everything, **LIVE)
    for each in pictures.values() if attends else ():
        each.select(point, [state], everything, **QUICK)


def _class_choice(names: Sequence[str]) -> Any:
    few = len(names) <= MOST_BOXES
    kind, more = (gr.CheckboxGroup, {}) if few else (gr.Dropdown, {"multiselect": True})
    words = "Classes in the photograph"
    return kind(names, value=[], label=words, elem_id="classes", elem_classes="afa-classes", **more)


def _called(refinement: str) -> str:
    return next(name for name, value in REFINEMENTS.items() if value == refinement)


def _picture_rows(attends: bool, how: LabelSettings) -> dict[str, gr.Image]:
    """The pictures, in rows, by their names; those of attention and decoder only of a model that has them."""
    first = {"photograph": "photograph", "heat": "CAM", "affinity": "affinity of the point", "prediction": "prediction"}
    second = {"cam": "CAM, as a label"}
    second |= {kind: title(kind, how.refinement) for kind in ("refined_cam", "random_walk", "refined_random_walk")}
    made = {}
    for row in (first, second):
        with gr.Row(equal_height=False):
            for name, words in row.items():
                of_attention = name in ("affinity", "prediction", "random_walk", "refined_random_walk")
                if attends or not of_attention:
                    made[name] = picture(words, elem_id=name)
    return made
