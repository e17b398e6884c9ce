"""The pages of `afa serve` as a visitor has them, in a browser that is started once."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import browser
from support.color_model import ColorModel
from support.voc_factory import make_voc

from afa_model.data.classes import VOC_CLASSES
from afa_model.data.files import read_label, write_label
from afa_model.labels.evidence import MapSettings
from afa_model.labels.settings import LabelSettings
from afa_model.web.photographs import examples_in, masked_examples, photograph
from afa_model.web.settings import ServeSettings

SETTINGS = ServeSettings(port=0, max_megabytes=0.5)
HOW = LabelSettings(radius=3, dilations=(1, 2, 4), num_iter=4, cam_scales=(1.0,))


CANVAS = "document.querySelector('#canvas canvas').toDataURL()"


def canvas_pixels(at) -> str:
    return at.page.evaluate(CANVAS)


@pytest.fixture(scope="module")
def open_page():
    with browser() as opened:
        yield opened


@pytest.fixture
def files(tmp_path):
    """A folder of photographs, and files of other kinds."""
    make_voc(tmp_path, 3, (45, 66))
    (tmp_path / "notes.jpg").write_text("no photograph, but words\n" * 9)
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")  # 0.75 MB
    return tmp_path


def test_a_model_in_the_browser(open_page, files):
    from afa_model.web.model_page import Served, model_page
    from afa_model.web.serving import serving

    sizes = MapSettings(long_side=0, scales=(1.0,), flips=False)
    served = Served(ColorModel(), VOC_CLASSES, sizes, HOW, "a model of colours")
    offered = examples_in(files / "JPEGImages", SETTINGS)
    own, other = (photograph(files / "JPEGImages" / f"2007_{number:06d}.jpg") for number in (0, 1))

    with serving(lambda: model_page(served, SETTINGS, offered), SETTINGS) as address:
        at = open_page(address)
        assert "a model of colours" in at.page.content()
        assert at.pixels("refined_random_walk").shape[:2] == (45 * 10, 66 * 10)

        # a photograph of one's own
        shown = at.changes("photograph", lambda: at.upload("photograph-file", files / "JPEGImages" / "2007_000001.jpg"))
        assert shown.shape[:2] == (45 * 10, 67 * 10)
        assert "2007_000001.jpg: 67 × 45 pixels" in at.words("status", "finds cat, person")
        assert np.abs(shown[5::10, 5::10].astype(int) - other.pixels).mean() < 4  # but for the mark

        # a point
        box = at.page.locator("#photograph img").bounding_box()
        spot = box["x"] + 0.1 * box["width"], box["y"] + 0.9 * box["height"]
        before = at.pixels("affinity")
        after = at.changes("affinity", lambda: at.page.mouse.click(*spot))
        assert (before != after).any(-1).mean() > 0.05
        marks = (at.pixels("photograph") == (255, 212, 0)).all(-1).nonzero()
        assert abs(marks[1].mean() / after.shape[1] - 0.1) < 0.03 and abs(marks[0].mean() / after.shape[0] - 0.9) < 0.03

        # sliders, the refinement, classes
        cam, refined = at.pixels("cam"), at.pixels("refined_cam")
        assert (at.changes("refined_cam", lambda: at.slide("Iterations", "Home")) != refined).any()
        assert np.array_equal(at.pixels("cam"), cam)
        assert (at.changes("cam", lambda: at.slide("High background score", "End")) != cam).any()
        at.changes("refined_cam", lambda: at.page.get_by_label("dense CRF").check())
        assert "CAM + CRF" in at.page.locator("#refined_cam").inner_text()
        assert " ms" in at.page.locator("#heat").inner_text()
        heat = at.pixels("heat")
        assert (at.changes("heat", lambda: at.page.get_by_label("person").uncheck()) != heat).any()
        assert np.array_equal(at.changes("heat", lambda: at.page.locator("#classifier").click()), heat)
        assert at.page.get_by_label("person").is_checked()

        # files that are none, and too large ones, leave everything as it is
        photo = at.pixels("photograph")
        at.upload("photograph-file", files / "notes.jpg")
        assert at.words("status", "notes.jpg") == "notes.jpg: cannot be decoded (it is a text)"
        assert at.page.locator("#status [role=alert]").count() == 1
        at.upload("photograph-file", files / "heavy.png")
        at.page.get_by_text("exceed the maximum allowed size").first.wait_for()
        assert np.array_equal(at.pixels("photograph"), photo)

        # what was wrong is said until something goes well
        at.page.get_by_label("person").uncheck()
        assert "2007_000001.jpg: 67 × 45 pixels" in at.words("status", "finds cat, person")

        # a class ticked while another photograph is on its way is not that one's
        def take_and_tick():
            at.page.locator(".afa-examples button").nth(2).click()
            at.page.get_by_label("sheep").check(force=True)

        at.changes("photograph", take_and_tick)
        at.words("status", "2007_000002")
        at.page.wait_for_timeout(500)
        ticked = "[...document.querySelectorAll('#classes label:has(:checked)')].map(each => each.innerText.trim())"
        bold = "[...document.querySelectorAll('#legend b')].map(each => each.innerText.trim())"
        assert at.page.evaluate(ticked) == at.page.evaluate(bold) != []

        # an example, and what can be taken away
        at.changes("photograph", lambda: at.page.locator(".afa-examples button").first.click())
        assert "2007_000000.jpg: 66 × 45" in at.words("status", "2007_000000")
        with at.page.expect_download() as download:
            at.page.locator("#prediction .download-link").click()
        assert download.value.suggested_filename == "shown_prediction_2007_000000.png"
        with at.page.expect_download() as download:
            at.page.locator("#files a", has_text="KB").or_(at.page.locator("#files a[download]")).last.click()
        assert download.value.suggested_filename == "prediction_2007_000000.png"
        assert tuple(read_label(download.value.path()).shape) == own.size

        assert at.elsewhere() == [] and at.errors == []
        with urllib.request.urlopen(address) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
        with urllib.request.urlopen(f"{address}/config") as answer:
            assert json.load(answer)["analytics_enabled"] is False
        strange = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(strange)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert any(folder.rglob("*.png"))
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") != str(folder)


def test_refinement_in_the_browser(open_page, files):
    from afa_model.web.refine_page import refine_page
    from afa_model.web.serving import serving

    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(files / "flat.png")
    label = np.zeros((30, 40), np.uint8)
    label[5:20, 10:30] = 3
    write_label(files / "flat_mask.png", label)

    offered = masked_examples(2, (108, 144))
    with serving(lambda: refine_page(SETTINGS, offered=offered), SETTINGS) as address:
        at = open_page(address)
        at.pixels("crf")
        for name, words in (("pamr", "PAMR"), ("par", "PAR"), ("crf", "dense CRF")):
            text = at.page.locator(f"#{name}").inner_text()
            assert words in text and "s · " in text and "% changed" in text
        assert "class" in at.words("legend", "background")

        # sliders
        before = at.pixels("par")
        assert (at.changes("par", lambda: at.slide("Iterations", "Home")) != before).any()
        assert (at.changes("par", lambda: at.slide("Iterations", "End")) != before).any()
        before = at.pixels("pamr")
        assert (at.changes("pamr", lambda: at.slide("Dilations", "Home")) != before).any()

        # a stroke of another class, which is then taken back
        before = {name: at.pixels(name) for name in ("pamr", "par", "crf")}
        at.page.locator("#canvas button[data-class='4']").click()
        box = at.page.locator("#canvas canvas").bounding_box()

        def paint():
            at.page.mouse.move(box["x"] + 30, box["y"] + box["height"] - 40)
            at.page.mouse.down()
            at.page.mouse.move(box["x"] + 160, box["y"] + box["height"] - 40, steps=4)
            at.page.mouse.up()

        at.changes("crf", paint)
        assert all((at.pixels(name) != before[name]).any() for name in before)
        assert "class 4" in at.words("legend", "class 4")
        undone = at.changes("crf", lambda: at.page.locator("#canvas button[data-do=undo]").click())
        assert np.array_equal(undone, before["crf"])

        # the same example anew: what was painted is gone from the picture too
        at.changes("crf", lambda: at.page.locator(".afa-examples button").first.click())
        clean = canvas_pixels(at)
        at.changes("crf", paint)
        assert canvas_pixels(at) != clean
        assert np.array_equal(
            at.changes("crf", lambda: at.page.locator(".afa-examples button").first.click()), before["crf"]
        )
        at.page.wait_for_function(f"clean => ({CANVAS}) === clean", arg=clean)

        # files too large are refused, and the places where they were dropped take the next ones, at once
        too_large = at.page.get_by_text("exceed the maximum allowed size").first
        for place, of in (("photograph", files / "flat.png"), ("mask", files / "flat_mask.png")):
            at.drop(place, files / "heavy.png")
            too_large.wait_for()
            at.drop(place, files / "notes.jpg")
            assert "notes.jpg: cannot be decoded" in at.words("status", "notes.jpg")
            too_large.wait_for(state="detached", timeout=6000)  # by itself after 10 s
            at.drop(place, of)
            at.words("status", of.name)
            assert at.page.locator("#status [role=alert]").count() == 0

        # a photograph and a mask of one's own, and what is no mask
        at.upload("photograph", files / "flat.png")
        at.words("status", "flat.png: 40 × 30 pixels")
        at.page.locator("#par img").wait_for(state="detached")
        at.upload("mask", files / "notes.jpg")
        assert at.words("status", "notes.jpg") == "notes.jpg: cannot be decoded (it is a text)"
        at.upload("mask", files / "flat_mask.png")
        at.page.locator("#par img").wait_for()
        assert at.words("status", "mask") == "flat.png: 40 × 30 pixels; mask: flat_mask.png"
        at.page.locator("#legend .afa-key").nth(2).wait_for(state="detached")
        assert at.words("legend", "class 3").split() == ["background", "class", "3"]
        assert at.pixels("par").shape[:2] == (30 * 16, 40 * 16)

        at.page.locator("#canvas button[data-do=clear]").click()
        at.words("status", "Paint roughly")
        at.page.get_by_label("unknown").check()
        assert "no mask yet" in at.words("status", "no mask")
        assert at.elsewhere() == [] and at.errors == []
