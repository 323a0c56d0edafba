"""The guard in front of the page: only its own pages, only this machine, only reading."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from grace_rl.inspect.page.guard import Guard


def ask(
    listens: str = "127.0.0.1",
    kind: str = "http",
    method: str = "GET",
    path: str = "/",
    **headers: str,
) -> Any:
    """Status of a request; None for a websocket, which is never let through."""
    reached: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "127.0.0.1:80"} | headers
    listed = [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]
    scope = {"type": kind, "method": method, "headers": listed, "path": path}
    asyncio.run(Guard(app, listens)(scope, None, send))  # type: ignore[arg-type]
    if kind == "websocket":
        assert not reached and sent[0]["type"] == "websocket.close"
        return None
    assert bool(reached) == (sent[0]["status"] == 200)
    names = dict(sent[0]["headers"])
    assert b"default-src 'none'" in names[b"content-security-policy"]
    return sent[0]["status"]


def test_its_own_pages_are_answered() -> None:
    assert ask() == ask(method="HEAD") == ask(host="localhost:80") == 200
    assert ask("::1", host="[::1]:80") == 200
    assert ask(origin="http://127.0.0.1:80") == 200


@pytest.mark.parametrize(
    "name", ["evil.example", "127.0.0.1.evil.example:80", "", "0.0.0.0.nip.io"]
)
def test_rebound_names_are_refused(name: str) -> None:
    assert ask(host=name) == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:81", "file://"]
)
def test_foreign_origins_are_refused(origin: str) -> None:
    assert ask(origin=origin) == 403


def test_the_page_has_no_websockets() -> None:
    assert ask(kind="websocket") is ask(kind="websocket", origin="http://127.0.0.1:80") is None


def test_other_sites_may_link_here_but_not_load_parts() -> None:
    assert ask(sec_fetch_site="cross-site", sec_fetch_mode="navigate") == 200
    assert ask(sec_fetch_site="cross-site", sec_fetch_mode="no-cors") == 403
    assert ask(sec_fetch_site="same-origin", sec_fetch_mode="cors") == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT"])
def test_writes_are_refused(method: str) -> None:
    assert ask(method=method) == 405


def test_notes_come_from_the_page_itself_to_this_machine_only() -> None:
    note = {"method": "POST", "path": "/note", "content_type": "application/json"}
    own = {"origin": "http://127.0.0.1:80"}
    assert ask(**note, **own) == 200
    assert ask(**note) == ask(**note, origin="http://evil.example") == 403
    assert ask(**note | {"content_type": "text/plain"}, **own) == 403
    assert ask(**note | {"path": "/"}, **own) == 405
    there = {"host": "192.168.1.7:80", "origin": "http://192.168.1.7:80"}
    assert ask("0.0.0.0", **note, **there) == 405


def test_an_open_address_answers_numbers_and_its_own_name_only() -> None:
    import socket

    assert ask("0.0.0.0", host="192.168.1.7:80") == 200
    assert ask("0.0.0.0", host=socket.gethostname()) == 200
    assert ask("0.0.0.0", host="evil.example") == 421
    assert ask("127.0.0.1", host="192.168.1.7:80") == 421
