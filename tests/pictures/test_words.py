"""Names are data: what a picture or a table shows of them is what they are, whatever they hold."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from matplotlib.text import Text
from rich.console import Console

from afa_model.evaluation.scores import EvaluationResult, ScoreKeeper
from afa_model.pictures import words
from afa_model.pictures.panels import head_weights_figure, prediction_panel, to_array, training_panel
from afa_model.runtime.progress import progress

NAMES = ("background", "x$_$y", "car [/x]", "_car_", "a$$b", "[red]bold", ":car:", "a\nb", "照片", "\udcff", "\\frac{")
SHOWN = {"a\nb": "a\\nb", "\udcff": "\\udcff", "照片": "\\u7167\\u7247"}


@pytest.fixture(autouse=True)
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(words, "_family_with", lambda letters: None)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_panel_shows_names_as_they_are():
    label = torch.arange(len(NAMES)).repeat(6, 1)
    photo = torch.zeros(6, len(NAMES), 3, dtype=torch.uint8).numpy()
    figure = prediction_panel(
        photo,
        title="".join(NAMES),
        cam=torch.rand(len(NAMES) - 1, 6, len(NAMES)),
        affinity=None,
        point=(0, 0),
        pseudo_label=label,
        prediction=label,
        class_names=NAMES,
        probabilities=torch.full((len(NAMES) - 1,), 0.5),
        present=[1, 2, 8],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that it cannot draw
        assert to_array(figure).ndim == 3
    found = texts(figure)
    assert "".join(SHOWN.get(name, name) for name in NAMES) in found
    assert f"CAM: x$_$y, car [/x], {SHOWN['照片']}" in found
    assert all(f"{SHOWN.get(name, name)}  50 %" in found for name in NAMES[1:])


def test_a_training_picture_shows_names_as_they_are():
    classes = len(NAMES) - 1
    figure = training_panel(
        torch.zeros(1, 3, 16, 16),
        ["a$_$1"],
        torch.tensor([[1.0] + [0.0] * (classes - 1)]),
        NAMES,
        cam=torch.rand(1, classes, 2, 2),
        refined_label=torch.full((1, 16, 16), 3),
        title="step $",
    )
    assert to_array(figure).ndim == 3 and {"a$_$1", "CAM: x$_$y", "_car_", "step $"} <= set(texts(figure))
    figure = head_weights_figure(torch.ones(4), torch.zeros(1), 2, "run $_$")
    assert to_array(figure).ndim == 3 and any(text.startswith("run $_$: affinity head") for text in texts(figure))


def test_a_font_that_has_the_letters_is_taken(monkeypatch):
    asked = []
    monkeypatch.setattr(words, "_family_with", lambda letters: asked.append(letters) or "Some CJK")
    assert words.readable("照片 é") == ("照片 é", ["DejaVu Sans", "Some CJK"])
    assert words.readable("é") == ("é", ["DejaVu Sans"]) and asked == [frozenset("照片")]


def test_installed_fonts_are_looked_through(monkeypatch):
    monkeypatch.undo()
    assert words._family_with(frozenset("\U0010fffd")) is None
    assert words._family_with(frozenset("a")) is not None


def test_a_table_of_scores_shows_names_as_they_are():
    keeper = ScoreKeeper(("cam",), len(NAMES), torch.device("cpu"))
    label = torch.arange(len(NAMES)).repeat(2, 1)
    keeper.add("cam", label, label)
    result = EvaluationResult(keeper.scores(), NAMES, 1, image_level={"f1": 1.0, "map": 1.0})
    out = io.StringIO()
    result.print(Console(file=out, width=100))
    assert all(name in out.getvalue() for name in NAMES if name.isprintable())


def test_a_progress_bar_shows_its_title_as_it_is(monkeypatch):
    """A list may be called by any name."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress([1, 2], "checking [/x]")) == [1, 2]
