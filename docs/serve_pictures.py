"""Takes the pictures of the pages of `afa serve`, docs/images/serve/*.jpg, in a browser that nobody sees.

    afa demo --out runs/demo
    python docs/serve_pictures.py runs/demo

The model is the demo's; what is refined is a cup of coffee by Rachel Michetti, CC0, which lies in scikit-image's
package (`pip install --no-deps scikit-image`), with strokes drawn here. Needs `afa[serve,test]` and Chromium.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from afa_model.commands.serve import examples_for, settings_of
from afa_model.runs.restore import load_model
from afa_model.web.model_page import Served, model_page
from afa_model.web.refine_page import refine_page
from afa_model.web.serving import serving
from afa_model.web.settings import ServeSettings

FOLDER = Path(__file__).resolve().parent / "images" / "serve"
SETTINGS = ServeSettings(port=0)
# A saucer and the cup on it, roughly: class, radius of the brush in pixels, points as shares of width and height.
STROKES: Sequence[tuple[int, int, Sequence[tuple[float, float]]]] = (
    (2, 38, ((0.22, 0.40), (0.22, 0.62), (0.34, 0.80), (0.50, 0.86), (0.66, 0.74), (0.72, 0.52), (0.68, 0.40))),
    (2, 30, ((0.42, 0.78), (0.62, 0.62))),
    (1, 42, ((0.38, 0.26), (0.50, 0.16), (0.60, 0.26), (0.57, 0.40), (0.44, 0.46), (0.42, 0.32), (0.52, 0.30))),
    (1, 24, ((0.40, 0.50), (0.40, 0.64))),
)


@contextmanager
def visited(address: str, height: int) -> Iterator[Any]:
    """A page in Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": height})
        page.goto(address)
        yield page
        browser.close()


def kept(page: Any, name: str) -> None:
    """The picture of a page when all that it shows is there."""
    page.wait_for_timeout(1500)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.convert("RGB").save(FOLDER / f"{name}.jpg", quality=74, optimize=True)


def of_a_model(checkpoint: str) -> None:
    """The second example, a point of it clicked."""
    run = load_model(checkpoint)
    about = f"the demo's model, {run.trained}, {len(run.class_names)} classes"
    served = Served(run.model, run.class_names, *settings_of(run), about)
    offered = examples_for(run, SETTINGS)
    with serving(lambda: model_page(served, SETTINGS, offered), SETTINGS) as address, visited(address, 940) as page:
        page.locator("#refined_random_walk img").wait_for()
        page.locator(".afa-examples button").nth(1).click()
        page.get_by_text("val_0001").first.wait_for()
        page.wait_for_timeout(1500)
        box = page.locator("#photograph img").bounding_box()
        page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
        kept(page, "model")


def of_a_refinement(photograph: Path) -> None:
    """The strokes on a photograph."""
    with serving(lambda: refine_page(SETTINGS), SETTINGS) as address, visited(address, 1010) as page:
        page.locator("#crf img").wait_for()
        page.locator("#photograph input[type=file]").set_input_files(str(photograph))
        page.get_by_text(photograph.name).first.wait_for()
        page.wait_for_timeout(1500)
        box = page.locator("#canvas canvas").bounding_box()
        for number, brush, points in STROKES:
            page.locator(f"#canvas button[data-class='{number}']").click()
            page.locator("#canvas input[type=range]").fill(str(brush))
            places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place, steps=8)
            page.mouse.up()
            page.wait_for_timeout(1000)
        kept(page, "refine")


def main(checkpoint: str) -> None:
    found = importlib.util.find_spec("skimage")
    if found is None:
        sys.exit("the photograph is scikit-image's: pip install --no-deps scikit-image")
    of_a_refinement(Path(found.submodule_search_locations[0]) / "data" / "coffee.png")
    of_a_model(checkpoint)


if __name__ == "__main__":
    main(sys.argv[1])
