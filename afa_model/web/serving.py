"""The page's server: where it listens, what it takes, what it leaves behind (nothing)."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import ConfigError, reason
from .quiet_gradio import gr
from .settings import ServeSettings
from .stays_here import StaysHere, is_loopback
from .style import CSS, theme

_KEPT = 3600  # seconds


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
    guards = [Middleware(StaysHere)]
    if is_loopback(settings.host):  # no name of another site's that leads here
        names = ["localhost", "127.0.0.1", "[::1]", settings.host]
        guards.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="afa-serve-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # each component keeps what it says when it is made
        page = None
        try:
            page = build()
            page.launch(
                server_name=settings.host,
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
            name = f"[{settings.host}]" if ":" in settings.host else settings.host
            yield f"http://{name}:{port}"
        finally:
            if page is not None:
                page.close(verbose=False)
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def own_folder() -> Path:
    """A new folder, for files that the page is about to show; those of an hour ago go."""
    above = Path(os.environ.get("GRADIO_TEMP_DIR", tempfile.gettempdir())) / "made"
    above.mkdir(exist_ok=True)
    for old in above.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=above))
