"""What the local server refuses before anything else sees it: strangers, and whatever would write.

A page on the web can make a browser send requests to a server on this machine. Its requests carry
its own `Origin`, or, once it has rebound its name to 127.0.0.1, that name as `Host`. Both are
refused, and so is every method but GET and HEAD, with one exception: the page's own script may POST
what a reader says of a rollout (`NOTE`), as JSON, to a server on a loopback address. The answers
tell the browser to load nothing from anywhere else and to show the page in no frame.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NOTE = "/note"  # the one address that takes a POST
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """An ASGI application in front of another.

    Args:
        app: The other.
        host: The address that the server listens on. A loopback address is answered only under
            loopback names; any other also under this machine's own name and numeric addresses,
            which cannot be rebound.
    """

    def __init__(self, app: App, host: str = "127.0.0.1") -> None:
        self.app = app
        self.host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif (refusal := self._refusal(scope)) is not None:
            await _answer(send, *refusal)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, or None for what is let through."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"content-type") and name in headers:
                return 400, f"two {name.decode()} headers"
            headers[name] = value
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.knows(_without_port(host)):
            return 421, f"this server does not answer under the name {_without_port(host)[:100]!r}"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}".lower():
            return 403, "requests from other pages are refused"
        site, mode = headers.get(b"sec-fetch-site"), headers.get(b"sec-fetch-mode")
        if site in (b"cross-site", b"same-site") and mode not in (b"navigate", None):
            return 403, "requests from other pages are refused"
        if scope["method"] == "POST" and scope["path"] == NOTE and is_loopback(self.host):
            if origin is None or headers.get(b"content-type") != b"application/json":
                return 403, "notes come from the page itself"
        elif scope["method"] not in ("GET", "HEAD"):
            return 405, "this server only shows; it takes no writes"
        return None

    def knows(self, name: str) -> bool:
        """Whether requests under this host name are meant for this server."""
        name = name.lower()
        if name == "localhost" or name == self.host.lower():
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return not is_loopback(self.host) and name == socket.gethostname().lower()
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    """
    >>> _without_port("localhost:80"), _without_port("[::1]:80"), _without_port("[::1]")
    ('localhost', '[::1]', '[::1]')
    """
    name, separator, port = host.rpartition(":")
    return name if separator and port.isdigit() else host


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return sending


async def _answer(send: Send, status: int, reason: str) -> None:
    body = f"{reason}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
