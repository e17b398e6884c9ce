"""What keeps the page to this machine: it may load nothing from elsewhere, and answers to no other name.

Gradio's page names a script and fonts of other sites. They are taken out of it, and a content security policy tells the
browser to load nothing that the page's own server does not have.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_FROM_ELSEWHERE = re.compile(
    rb"""<script\b[^>]*\ssrc=["']?(?:https?:)?//[^>]*>\s*</script>|<link\b[^>]*\shref=["']?(?:https?:)?//[^>]*>""", re.I
)


def without_others(html: bytes) -> bytes:
    """A page without the scripts and links whose address names a host."""
    return _FROM_ELSEWHERE.sub(b"", html)


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class StaysHere:
    """ASGI middleware: HEADERS on every answer, and pages :func:`without_others`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: Message | None = None  # the start of a page, until its length is known
        page = bytearray()

        async def through(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *HEADERS]
                message = {**message, "headers": headers}
                if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                    held = message
                    return
            elif held is not None and message["type"] == "http.response.body":
                page.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                whole = without_others(bytes(page))
                headers = [pair for pair in held["headers"] if pair[0] != b"content-length"]
                await send({**held, "headers": [*headers, (b"content-length", str(len(whole)).encode())]})
                message = {**message, "body": whole}
            await send(message)

        await self.app(scope, receive, through)
