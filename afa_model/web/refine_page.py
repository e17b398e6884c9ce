"""The page without a model: a photograph, a mask painted or brought, and what PAMR, PAR and the CRF make of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afa_kernels.ops.par import DILATIONS

from ..errors import DataError
from ..evaluation.refine import RefineSettings
from ..labels.settings import LabelSettings
from ..pictures.overlays import label_overlay
from .clock import in_words
from .mask_files import uploaded_mask
from .masks import OBJECTS, Stroke, Unpainted, mask_of, painted, strokes_of
from .painter import canvas_of, painter
from .photographs import Example, Photograph, masked_examples, photograph
from .pictures import label_files, legend, picture_file, shown_in
from .quiet_gradio import gr
from .refined import METHODS, Refined, refined, settings_of
from .serving import own_folder
from .settings import ServeSettings
from .widgets import (
    DROPPED,
    LIVE,
    PAGE,
    QUICK,
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

NAMES = ["background", *(f"class {number}" for number in range(1, 255))]
HOW_TO = "Paint roughly over an object, in one colour for each class, or drop a mask."


@dataclass(frozen=True)
class Work:
    """What one visitor works on: a photograph, a mask below what is painted, that mask's file, and what is painted;
    ``number`` tells it from what was worked on before.
    """

    photograph: Photograph
    base: np.ndarray | None = None
    mask: str | None = None
    strokes: tuple[Stroke, ...] = ()
    number: int = field(default_factory=itertools.count(1).__next__)

    @property
    def said(self) -> str:
        """The files in words."""
        return self.photograph.said if self.mask is None else f"{self.photograph.said}; mask: {self.mask}"

    @property
    def picture(self) -> np.ndarray:
        """The photograph, with the mask over it: what is painted on."""
        pixels = self.photograph.pixels
        return pixels if self.base is None else label_overlay(pixels, self.base, 0.5)


@dataclass(frozen=True)
class Wanted:
    """What the controls say, in their order."""

    unpainted: Unpainted
    dilations: int
    num_iter: int
    gt_prob: float

    def result(self, now: Work, device: torch.device | str) -> tuple[torch.Tensor, dict[str, Refined]]:
        """The mask, int64 [H, W], and what becomes of it by each method.

        Raises:
            DataError: there is no mask yet.
        """
        label = mask_of(now.base, painted(now.strokes, now.photograph.size), self.unpainted)
        by = settings_of(first_of(DILATIONS, self.dilations), int(self.num_iter), self.gt_prob)
        return label, refined(now.photograph.pixels, label, by, device)


@dataclass(frozen=True)
class Parts:
    """The components of the page that listen or are listened to; ``controls`` are those of :class:`Wanted`."""

    work: gr.State
    file: gr.File
    gallery: gr.Gallery
    mask: gr.File
    status: gr.HTML
    controls: list[Any]
    keys: gr.HTML
    canvas: gr.HTML
    pictures: Mapping[str, gr.Image]
    files: gr.File


def refine_page(
    settings: ServeSettings, device: torch.device | str = "cpu", offered: Sequence[Example] | None = None
) -> gr.Blocks:
    """The page. Masks are refined on ``device``; the examples ``offered`` have masks, None: generated ones."""
    offered = masked_examples() if offered is None else offered
    with gr.Blocks(title="AFA: refine a mask", **PAGE) as page:
        _listen(page, _laid_out(offered), settings, device, offered)
    return page


def _laid_out(offered: Sequence[Example]) -> Parts:
    header("AFA · refine a mask", "What PAMR, PAR and the dense CRF make of it. Nothing leaves this machine.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=290):
            file, gallery = drop("Drop a photograph", "photograph"), examples(offered)
            mask = drop("Drop its mask", "mask")
            status = gr.HTML(note(HOW_TO), elem_id="status")
            words = "What is not painted is"
            unpainted = gr.Radio(["background", "unknown"], value="background", label=words, elem_id="unpainted")
            dilations, iterations = dilation_slider(), iteration_slider(LabelSettings.num_iter)
            words = "probability that the mask is right"
            certainty = gr.Slider(0.5, 0.99, RefineSettings.gt_prob, step=0.01, label="Certainty", info=words)
        with gr.Column(scale=4, min_width=600):
            keys = gr.HTML(legend(range(OBJECTS + 1), NAMES), elem_id="legend")
            with gr.Row(equal_height=False):
                canvas = painter(NAMES, "canvas")
                pictures = {"pamr": picture(METHODS["pamr"], elem_id="pamr")}
            with gr.Row(equal_height=False):
                pictures |= {name: picture(METHODS[name], elem_id=name) for name in ("par", "crf")}
            files = label_list()
    controls = [unpainted, dilations, iterations, certainty]
    return Parts(gr.State(None), file, gallery, mask, status, controls, keys, canvas, pictures, files)


def _listen(
    page: gr.Blocks, at: Parts, settings: ServeSettings, device: torch.device | str, offered: Sequence[Example]
) -> None:
    """What happens on the page: each listener gives the components that change."""
    work, status, controls, canvas, pictures = at.work, at.status, at.controls, at.canvas, at.pictures
    everything = [work, canvas, status, at.keys, at.files, *pictures.values()]

    def results(now: Work, *wanted: Any) -> Updates:
        label, done = Wanted(*wanted).result(now, device)
        updates, folder, name = {work: now, status: note(now.said)}, own_folder(), now.photograph.name
        for method, each in done.items():
            words = f"{METHODS[method]} · {in_words(each.seconds)} · {100 * each.changed:.1f} % changed"
            over = label_overlay(now.photograph.pixels, each.label)
            updates[pictures[method]] = shown(picture_file(over, method, name, folder), words)
        kept = {method: each.label for method, each in done.items()}
        updates[at.keys] = legend(shown_in([label.numpy(), *kept.values()]), NAMES)
        return {**updates, at.files: label_files({"mask": label.numpy(), **kept}, name, folder)}

    def begin(now: Work, *wanted: Any) -> Updates:
        updates = {work: now, canvas: canvas_of(now.picture, now.number)}
        if now.base is not None:
            return updates | results(now, *wanted)
        empty = {pictures[method]: shown(None, name) for method, name in METHODS.items()}
        return {**updates, at.files: None, status: note(f"{now.said}. {HOW_TO}"), **empty}

    @telling(status, at.file)
    def take(path: str | None, *wanted: Any) -> Updates:
        return {} if path is None else begin(Work(photograph(path, settings)), *wanted)

    @telling(status)
    def take_example(chosen: gr.SelectData, *wanted: Any) -> Updates:
        taken = offered[chosen.index].read()
        return begin(Work(taken, taken.label), *wanted)

    @telling(status, at.mask)
    def take_mask(path: str | None, now: Work | None, *wanted: Any) -> Updates:
        if path is None:
            return {}
        if now is None:
            raise DataError("drop a photograph first, then its mask")
        return begin(Work(now.photograph, uploaded_mask(path, now.photograph.size), Path(path).name), *wanted)

    @telling(status)
    def paint(sent: gr.EventData, now: Work | None, *wanted: Any) -> Updates:
        if now is None or sent.on != now.number:  # drawn on the picture that was there before
            return {}
        return results(replace(now, strokes=tuple(strokes_of(sent.strokes))), *wanted)

    @telling(status)
    def anew(now: Work | None, *wanted: Any) -> Updates:
        return {} if now is None else begin(Work(now.photograph), *wanted)

    @telling(status)
    def again(now: Work | None, *wanted: Any) -> Updates:
        return {} if now is None else results(now, *wanted)

    @telling(status)
    def first(*wanted: Any) -> Updates:
        taken = offered[0].read()
        return begin(Work(taken, taken.label), *wanted)

    page.load(first, controls, everything, **QUICK)
    at.file.upload(take, [at.file, *controls], [at.file, *everything], **DROPPED, **QUICK)
    at.gallery.select(take_example, controls, everything, **QUICK)
    at.mask.upload(take_mask, [at.mask, work, *controls], [at.mask, *everything], **DROPPED, **QUICK)
    canvas.input(paint, [work, *controls], everything, **LIVE)
    canvas.clear(anew, [work, *controls], everything, **LIVE)
    for control in controls:
        control.input(again, [work, *controls], everything, **LIVE)
