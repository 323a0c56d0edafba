"""The server behind the page: the views at their addresses, on this machine only by default."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from grace_rl.errors import UserError
from grace_rl.inspect.csv_file import csv_text
from grace_rl.inspect.markup import LOOK, render
from grace_rl.inspect.notes import jsonl, notes, preference_pairs, sft_rows, write_note
from grace_rl.inspect.page.answers import STREAMS, TABLES, trial
from grace_rl.inspect.page.guard import NOTE, Guard, is_loopback
from grace_rl.inspect.page.listing import whole
from grace_rl.inspect.page.site import CSV, VIEWS, Page, Site
from grace_rl.inspect.run import Run

HEADINGS = {
    "/": "Overview",
    "/rollouts": "Rollouts",
    "/learned": "What it learned",
    "/map": "Map",
    "/training": "Through training",
    "/replays": "Replays",
    "/notes": "Notes",
    "/compare": "Compare",
    "/try": "Try it",
}
EXPORTS: dict[str, Any] = {"sft": sft_rows, "pairs": preference_pairs}
LONGEST_ADDRESS = 1 << 19  # bytes; a text and its rationale travel in it
FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<path d="M2 13 6 7l3 3 5-8" fill="none" stroke="#1f6fd6" stroke-width="2"/></svg>'
)


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
    config = uvicorn.Config(
        Guard(app(runs), host),
        log_level="warning",
        access_log=False,
        http="h11",
        h11_max_incomplete_event_size=LONGEST_ADDRESS,
    )
    for run in runs:  # so that the first view of rollouts need not wait
        threading.Thread(target=_read_ahead, args=(run,), daemon=True).start()
    say(f"http://{shown}:{number}")
    uvicorn.Server(config).run(sockets=[listener])


def app(runs: Sequence[Run]) -> Starlette:
    """The page as an ASGI application, without its guard."""
    site = Site({run.name: run for run in runs})
    own = Path(__file__).parent
    files = {
        "/look.css": (LOOK + (own / "page.css").read_text(encoding="utf-8"), "text/css"),
        "/page.js": ((own / "page.js").read_text(encoding="utf-8"), "text/javascript"),
        "/favicon.ico": (FAVICON, "image/svg+xml"),
    }
    routes = [Route(path, _file(*content)) for path, content in files.items()]
    for path, view in {**VIEWS, "/try": trial}.items():
        routes.append(Route(path, _page(site, view)))
    for name, table in {**CSV, **TABLES}.items():
        routes.append(Route(f"/csv/{name}", _csv(site, table)))
    for name, answer in STREAMS.items():
        routes.append(Route(f"/stream/{name}", _stream(site, answer)))
    routes.append(Route(NOTE, _note(site), methods=["POST"]))
    for kind, rows in EXPORTS.items():
        routes.append(Route(f"/export/{kind}", _export(site, rows)))
    routes.append(Route("/stamp", lambda request: PlainTextResponse(_stamp(site))))
    return Starlette(routes=routes)


def _file(content: str, kind: str) -> Callable[[Request], Response]:
    headers = {"cache-control": "no-cache"}
    return lambda request: Response(content, media_type=kind, headers=headers)


def _page(site: Site, view: Any) -> Callable[[Request], Response]:
    """A view as a whole page; a mistake in its address is a page too."""

    def answer(request: Request) -> Response:
        here = request.url.path
        stamp = _stamp(site)  # before: what is written meanwhile is news
        try:
            page = view(site, request.query_params)
        except UserError as error:
            page = Page("mistake", "Not shown", here, {"problems": error.problems})
        states = {
            run.name: str(run.status().get("status", "unknown")) for run in site.runs.values()
        }
        frame = {
            "title": page.title,
            "here": page.here,
            "headings": HEADINGS,
            "stamp": stamp,
            "states": states,
            "clock": time.strftime("%H:%M:%S"),
            "names": list(site.runs),
        }
        return HTMLResponse(render(page.template, frame=frame, **page.values))

    return answer


def _csv(site: Site, table: Any) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        try:
            return Response(csv_text(table(site, request.query_params)), media_type="text/csv")
        except UserError as error:
            return PlainTextResponse(f"{error}\n", status_code=404)

    return answer


def _export(site: Site, rows: Any) -> Callable[[Request], Response]:
    """Flagged rollouts as lines of JSON, to download."""

    def answer(request: Request) -> Response:
        try:
            made = rows(site.run(request.query_params))
        except UserError as error:
            return PlainTextResponse(f"{error}\n", status_code=404)
        return Response(jsonl(made), media_type="application/jsonl")

    return answer


def _note(site: Site) -> Callable[[Request], Any]:
    """Takes what a reader says of a rollout; answers with all that readers said of it."""

    async def answer(request: Request) -> Response:
        try:
            said = await request.json()
            query = {name: str(said.get(name, "")) for name in ("run", "step", "row")}
            run, step, row = site.run(query), whole(query, "step"), whole(query, "row")
            write_note(run, step, row, said)
            html = render("said", said=notes(run, step, row).to_dict("records"))
        except (UserError, ValueError, AttributeError) as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        return HTMLResponse(html)

    return answer


def _stream(site: Site, events: Any) -> Callable[[Request], Response]:
    """Events as lines of JSON, each sent when it is there."""

    def lines(query: Any) -> Iterator[str]:
        try:
            for event in events(site, query):
                yield json.dumps(event) + "\n"
        except UserError as error:
            html = render("problems", problems=error.problems)
            yield json.dumps({"html": html, "into": "answer"}) + "\n"

    return lambda request: StreamingResponse(
        lines(request.query_params), media_type="application/x-ndjson"
    )


def _stamp(site: Site) -> str:
    """Changes whenever a run has written something."""
    return ";".join("{}-{}".format(*run.stamp()) for run in site.runs.values())


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
