"""Where the page of `afa serve` listens: whatever the environment says of proxies, and at IPv6's own address."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request

import pytest

from afa_model.web.settings import ServeSettings

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'afa[serve]'")

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def empty_page() -> gr.Blocks:
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
