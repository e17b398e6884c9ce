"""Where the page of `afa serve` listens: whatever the environment says of proxies, and at IPv6's own address."""

from __future__ import annotations

import importlib.util
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afa_model.web.settings import ServeSettings

if TYPE_CHECKING:
    import gradio as gr

# Looked for, and imported by a test that runs: it takes as long as to collect all else, in each of pytest's processes.
missing = importlib.util.find_spec("gradio") is None
pytestmark = pytest.mark.skipif(missing, reason="gradio is not installed: pip install 'afa[serve]'")

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def empty_page() -> gr.Blocks:
    from afa_model.web.quiet_gradio import gr

    with gr.Blocks() as page:
        gr.HTML("nothing")
    return page


def status_of(address: str, host: str | None = None) -> int:
    asked = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    try:
        with DIRECT.open(asked) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("own", [None, "intranet.example"])
def test_a_proxy_of_the_environment_is_not_asked(monkeypatch, own):
    from afa_model.web.serving import serving

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, nobody)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    if own is not None:
        monkeypatch.setenv("NO_PROXY", own)
    with serving(empty_page, ServeSettings(port=0)) as address:
        assert status_of(address) == 200
        assert own is None or own in os.environ["no_proxy"].split(",")
    assert "no_proxy" not in os.environ


def test_a_browser_that_stalls_does_not_keep_it_from_ending(capfd):
    from afa_model.web.serving import serving

    half = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n"
    half += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    with serving(empty_page, ServeSettings(port=0)) as address:
        stalled = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        stalled.sendall(half)
        assert status_of(address) == 200
        time.sleep(0.2)  # until its first half was read
        begin = time.perf_counter()
    assert time.perf_counter() - begin < 2.5  # Gradio waits 5 s
    stalled.close()
    assert capfd.readouterr().err == ""


def test_what_was_dropped_and_made_is_bounded(monkeypatch):
    from afa_model.web import serving

    monkeypatch.setattr(serving, "MOST_FOLDERS", 8)
    monkeypatch.setattr(serving, "MOST_BYTES", 100_000)
    own, now = [], time.time()

    def page() -> gr.Blocks:
        own.append(Path(os.environ["GRADIO_TEMP_DIR"], "of_the_page"))
        own[0].mkdir()
        (own[0] / "example.png").write_bytes(bytes(200_000))
        return empty_page()

    def dropped(name: str, size: int, age: float) -> Path:
        path = own[0].with_name(name)
        path.mkdir()
        (path / "photo.jpg").write_bytes(bytes(size))
        os.utime(path, (now - age, now - age))
        return path

    with serving.serving(page, ServeSettings(port=0)):
        os.utime(own[0].with_name("served"), (now - 9000, now - 9000))
        os.utime(own[0], (now - 9001, now - 9001))
        old, older = dropped("old", 1, 3500), dropped("older", 1, 3700)
        serving.own_folder()
        assert old.exists() and not older.exists()
        many = [dropped(f"many_{number}", 10, 100 + number) for number in range(20)]
        made = serving.own_folder()
        assert made.is_dir() and [each.exists() for each in many] == [True] * 7 + [False] * 13
        heavy = [dropped(f"heavy_{number}", 60_000, 70 + number) for number in range(2)]
        new = [dropped(f"new_{number}", 60_000, number) for number in range(3)]  # may be about to be read
        serving.own_folder()
        assert all(each.exists() for each in new) and not any(each.exists() for each in [*heavy, *many])
        assert (own[0] / "example.png").exists()


def test_it_listens_at_an_address_of_ipv6():
    from afa_model.web.serving import serving

    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(empty_page, ServeSettings(host="::1", port=0)) as address:
        assert address.startswith("http://[::1]:") and status_of(address) == 200
        assert status_of(address, "elsewhere.example") == 400
