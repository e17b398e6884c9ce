"""The page's server: where it listens, what it takes, what it leaves behind (nothing)."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import ConfigError, reason
from .quiet_gradio import gr
from .settings import ServeSettings
from .stays_here import StaysHere, is_loopback
from .style import CSS, theme

OWN = ("localhost", "127.0.0.1", "::1")  # this machine's names for itself
KEPT = 3600  # seconds for which what was dropped and made is kept,
MOST_FOLDERS, MOST_BYTES = 200, 500_000_000  # as long as it is not more than this
_YOUNG = 60  # seconds: somebody may be about to read it
_SERVED = "served"  # a file as old as the page; what is older are the page's own pictures
_GRACE = 0.3  # seconds for answers under way when the server is to end


def free_port(host: str, port: int) -> int:
    """``port`` itself, or of 0 one that is free.

    Raises:
        ConfigError: it is taken, or the host is none of this machine's addresses.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except socket.gaierror as error:
        raise ConfigError(f"host: {host!r} is no address ({reason(error)})") from error
    except OSError as error:
        told = f"port: cannot listen at {host}:{port} ({reason(error)}); --port 0 takes one that is free"
        raise ConfigError(told) from error


@contextmanager
def serving(build: Callable[[], gr.Blocks], settings: ServeSettings) -> Iterator[str]:
    """The page that ``build`` makes is served inside, at the address that this gives. What was dropped on it, and the
    files that it made, are gone afterwards.

    Raises:
        ConfigError: it cannot listen there.
    """
    port = free_port(settings.host, settings.port)
    name = f"[{settings.host}]" if ":" in settings.host else settings.host  # as addresses have it
    guards = [Middleware(StaysHere)]
    if is_loopback(settings.host):  # no name of another site's that leads here
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=[*OWN, "[::1]", name]))
    with tempfile.TemporaryDirectory(prefix="afa-serve-", ignore_cleanup_errors=True) as folder, _environment() as say:
        say["GRADIO_TEMP_DIR"] = folder  # each component keeps what it says when it is made
        # Gradio asks its own server whether it is up: no proxy may carry that
        direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        say["no_proxy"] = ",".join(filter(None, [direct, *OWN, settings.host]))
        page = None
        try:
            page = build()
            Path(folder, _SERVED).touch()
            page.launch(
                server_name=name,
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=True,
                ssr_mode=False,
                state_session_capacity=20,  # visits whose photographs are kept
                mcp_server=False,
                run_history=False,
                footer_links=[],
                theme=theme(),
                css=CSS,
                max_file_size=int(settings.max_megabytes * 1e6),
                app_kwargs={"middleware": guards},
            )
            page.server.config.timeout_graceful_shutdown = _GRACE  # uvicorn waits for ever for a browser that stalls
            yield f"http://{name}:{port}"
        finally:
            if page is not None:
                said = logging.getLogger("uvicorn.error")
                said.disabled = True  # of answers that it cuts off now
                page.close(verbose=False)
                said.disabled = False


@contextmanager
def _environment() -> Iterator[MutableMapping[str, str]]:
    """The environment, to change for a while."""
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "no_proxy")}
    try:
        yield os.environ
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def own_folder() -> Path:
    """A new folder, for files that the page is about to show; for it what is old goes."""
    root = Path(os.environ.get("GRADIO_TEMP_DIR", tempfile.gettempdir()))
    above = root / "made"
    above.mkdir(exist_ok=True)
    _make_room([*above.iterdir(), *_dropped(root)])
    return Path(tempfile.mkdtemp(dir=above))


def _dropped(root: Path) -> list[Path]:
    """The folders, one each, in which Gradio keeps what was dropped on a page that is served from ``root``."""
    if not (root / _SERVED).exists():
        return []
    since = (root / _SERVED).stat().st_mtime
    return [each for each in root.iterdir() if each.is_dir() and each.name != "made" and each.stat().st_mtime >= since]


def _make_room(folders: list[Path]) -> None:
    """Of folders those go that are older than KEPT, and those before the last MOST_FOLDERS or MOST_BYTES."""
    now, total = time.time(), 0
    for number, each in enumerate(sorted(folders, key=lambda each: each.stat().st_mtime, reverse=True)):
        age = now - each.stat().st_mtime
        total += sum(file.stat().st_size for file in each.iterdir())
        many = number >= MOST_FOLDERS or total > MOST_BYTES
        if age > KEPT or (many and age > _YOUNG):
            shutil.rmtree(each, ignore_errors=True)
