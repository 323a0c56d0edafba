"""The server behind the page: the views at their addresses, on this machine only by default."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from nicegui import app as nice
from nicegui import ui

from grace_rl.errors import UserError
from grace_rl.inspect.page import frame, overview, replays, rollout, rollouts, training, trial
from grace_rl.inspect.page.guard import Guard, is_loopback
from grace_rl.inspect.run import Run


def serve(runs: Sequence[Run], host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        runs: What it shows.
        host: Address to listen on.
        port: 0 takes a free one.
        say: Told the page's address once it can be opened.

    Raises:
        UserError: The port is taken, or the address is not of this machine.
    """
    listener = _listen(host, port)
    number = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = socket.gethostname()
    application = app(runs)
    config = uvicorn.Config(
        Guard(application, host), log_level="warning", lifespan="on", access_log=False
    )
    server = uvicorn.Server(config)
    for run in runs:  # so that the first view of rollouts need not wait
        threading.Thread(target=_read_ahead, args=(run,), daemon=True).start()
    say(f"http://{shown}:{number}")
    server.run(sockets=[listener])


def app(runs: Sequence[Run]) -> Any:
    """The page as an ASGI application, without its guard."""
    logging.getLogger("nicegui").setLevel(logging.WARNING)
    site = frame.Site({run.name: run for run in runs})
    outer = FastAPI(openapi_url=None)

    @ui.page("/")
    async def _overview() -> None:
        await overview.show(site)

    @ui.page("/rollouts")
    async def _rollouts(request: Request) -> None:
        await rollouts.show(site, request.query_params)

    @ui.page("/group")
    def _group(request: Request) -> None:
        rollouts.group_view(site, request.query_params)

    @ui.page("/rollout")
    async def _rollout(request: Request) -> None:
        await rollout.show(site, request.query_params)

    @ui.page("/training")
    async def _training(request: Request) -> None:
        await training.show(site, request.query_params)

    @ui.page("/try")
    async def _trial(request: Request) -> None:
        await trial.show(site, request.query_params)

    @ui.page("/replays")
    async def _replays(request: Request) -> None:
        await replays.show(site, request.query_params)

    ui.run_with(
        outer,
        title="grace-rl",
        favicon=FAVICON,
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=10.0,
    )
    nice.config.socket_io_js_transports = ["websocket"]  # polling would need POST
    return outer


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<path d="M2 13 6 7l3 3 5-8" fill="none" stroke="#1f6fd6" stroke-width="2"/></svg>'
)


def warn_of(host: str) -> str | None:
    """What to say about an address that others can reach."""
    if is_loopback(host):
        return None
    return f"{host}: whoever reaches this machine can read the runs; there is no password"


def _read_ahead(run: Run) -> None:
    with contextlib.suppress(UserError):  # said where it is asked for
        run.refresh()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # from now on a browser waits instead of being turned away
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; --port 0 takes a free one"
        ) from None
    except OverflowError:
        listener.close()
        raise UserError(f"--port {port}: must be from 0 to 65535") from None
    return listener
