"""A page in headless Chromium, waited for by what it shows; where that cannot be had a test says what to install."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

_DROP = """([name, called, bytes]) => {
  const box = document.querySelector(`#${name}`).getBoundingClientRect();
  const under = document.elementFromPoint(box.x + box.width / 2, box.y + box.height * 0.6);
  const dataTransfer = new DataTransfer();
  const whole = Uint8Array.from(atob(bytes), each => each.charCodeAt(0));
  dataTransfer.items.add(new File([whole], called, {type: 'image/png'}));
  for (const what of ['dragenter', 'dragover', 'drop'])
    under.dispatchEvent(new DragEvent(what, {dataTransfer, bubbles: true, cancelable: true}));
}"""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def browser_needed() -> tuple[Any, str]:
    """Playwright's `sync_playwright` and a browser's path; skips where one is missing."""
    told = "the page of afa serve is tried in a browser: pip install 'afa[serve,test]', apt-get install chromium"
    for package in ("gradio", "playwright"):
        pytest.importorskip(package, reason=f"{package} is not installed; {told}")
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"no chromium; {told}")
    from playwright.sync_api import sync_playwright

    return sync_playwright, found


class Page:
    """A page that is open, and what it asked for."""

    def __init__(self, page: Any):
        self.page, self.asked, self.errors = page, [], []
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def elsewhere(self) -> list[str]:
        """Requests to any other host than the page's own."""
        own = urlsplit(self.page.url).netloc
        hosts = {url: urlsplit(url).netloc for url in self.asked if urlsplit(url).scheme not in ("data", "blob")}
        return [url for url, host in hosts.items() if host != own]

    def pixels(self, name: str) -> np.ndarray:
        """The pixels of the picture in the component ``name``, uint8 [H, W, 3]."""
        source = self.page.locator(f"#{name} img").get_attribute("src")
        with Image.open(io.BytesIO(self.page.request.get(source).body())) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    def changes(self, name: str, act: Callable[[], Any]) -> np.ndarray:
        """Do something; the pixels of ``name`` once another picture has taken its place."""
        before = self.page.locator(f"#{name} img").first.get_attribute("src")
        act()
        other = "([name, before]) => ![before, undefined].includes(document.querySelector(`#${name} img`)?.src)"
        self.page.wait_for_function(other, arg=[name, before])
        return self.pixels(name)

    def drop(self, name: str, path: Any) -> None:
        """Drag a file to the middle of the place called ``name`` and let go, whatever lies above it there."""
        self.page.evaluate(_DROP, [name, Path(path).name, base64.b64encode(Path(path).read_bytes()).decode()])

    def upload(self, name: str, *paths: Any) -> None:
        """Choose files for the place called ``name``."""
        self.page.locator(f"#{name} input[type=file]").set_input_files([str(path) for path in paths])

    def words(self, name: str, within: str) -> str:
        """The text of ``name`` once it holds ``within``."""
        self.page.wait_for_function(
            "([name, within]) => document.querySelector(`#${name}`)?.innerText.includes(within)", arg=[name, within]
        )
        return self.page.locator(f"#{name}").inner_text()

    def slide(self, label: str, key: str) -> None:
        """Press a key on the slider with this label: Home for its least value, End for its largest."""
        self.page.get_by_label(f"range slider for {label}", exact=True).press(key)


@contextmanager
def browser() -> Iterator[Callable[[str], Page]]:
    """One Chromium, in which addresses can be opened."""
    sync_playwright, path = browser_needed()
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])

        def opened(address: str) -> Page:
            page = Page(chromium.new_page(viewport={"width": 1100, "height": 800}))
            page.page.goto(address)
            return page

        yield opened
        chromium.close()
