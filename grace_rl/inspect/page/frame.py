"""What all views share: the runs, the header, waiting with progress, tables with a csv button."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
from nicegui import ui
from nicegui.element import Element

from grace_rl.errors import UserError
from grace_rl.inspect.checkpoints import Loaded
from grace_rl.inspect.csv_file import csv_text
from grace_rl.inspect.markup import LOOK, mistakes, plain
from grace_rl.inspect.run import Run

CSS = LOOK + (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
VIEWS = {
    "/": "Overview",
    "/rollouts": "Rollouts",
    "/training": "Through training",
    "/replays": "Replays",
    "/try": "Try it",
}
SLOW = 0.25  # seconds after which a wait shows itself

# Follows the system until the button is pressed; then the browser remembers.
THEME = """<script>
addEventListener("load", () => setTimeout(() => {
  const kept = localStorage.getItem("grace-rl-dark");
  if (kept !== null) Quasar.Dark.set(kept === "true");
}));
</script>"""
SWITCH_THEME = """() => {
  Quasar.Dark.toggle();
  localStorage.setItem("grace-rl-dark", Quasar.Dark.isActive);
}"""


@dataclass
class Site:
    """What is looked at: runs by name, and the checkpoints that are in memory."""

    runs: dict[str, Run]
    loaded: Loaded = field(default_factory=Loaded)

    def run(self, name: str | None) -> Run:
        """The run of that name; the first one for none.

        Raises:
            UserError: There is none of that name. Names are those given on the command line, so
                no address leads to another folder.
        """
        if not name:
            return next(iter(self.runs.values()))
        if name not in self.runs:
            raise UserError(f"no run {name!r} is open; there are: {', '.join(self.runs)}")
        return self.runs[name]


@contextmanager
def frame(title: str, here: str) -> Iterator[None]:
    """Header, navigation and the page's main part."""
    ui.page_title(f"{title} · grace-rl")
    ui.add_head_html(f"<style>{CSS}</style>{THEME}")
    links = "".join(
        f'<a href="{path}"{current}>{name}</a>'
        for path, name in VIEWS.items()
        for current in ([' aria-current="page"'] if path == here else [""])
    )
    with ui.header(fixed=False, bordered=False).classes("top"):
        html(
            f'<a class="skip" href="#main">to the content</a><nav aria-label="views">{links}</nav>'
        )
        ui.button(icon="contrast", color=None).props(
            'flat round dense aria-label="light or dark"'
        ).on("click", js_handler=SWITCH_THEME)
    with ui.element("div").props("id=main").classes("whole"):
        html(f"<h1>{plain(title)}</h1>")
        try:
            yield
        except UserError as error:
            mistake(error)


def html(content: str, tag: str = "div") -> ui.html:
    """HTML that the markup modules made."""
    return ui.html(content, sanitize=False, tag=tag)


def mistake(error: UserError) -> ui.html:
    """A mistake in the address or in a field, as text."""
    return html(mistakes(error.problems))


def address(path: str, **query: Any) -> str:
    """A link within the site; empty parameters are left out."""
    made = urlencode({name: value for name, value in query.items() if value not in (None, "")})
    return f"{path}?{made}" if made else path


class Waiting:
    """A bar for work that takes a while; `report` may be called from the working thread."""

    def __init__(self, label: str) -> None:
        self.label, self.share = label, 0.0
        self.known = False

    def report(self, done: int, total: int) -> None:
        self.share, self.known = done / max(1, total), True

    def text(self) -> str:
        return f"{self.label} … {self.share:.0%}" if self.known else f"{self.label} …"


@asynccontextmanager
async def waiting(place: Element, label: str) -> AsyncIterator[Waiting]:
    """Within it a bar stands in the place, once the work has taken `SLOW` seconds."""
    state = Waiting(label)
    with place:
        box = ui.element("div").props('role="status"').classes("waiting")
        box.set_visibility(False)
        with box:
            note = html(plain(state.text()), "span")
            bar = ui.linear_progress(0.0, show_value=False).props("indeterminate")

        def update() -> None:
            box.set_visibility(True)
            note.set_content(plain(state.text()))
            if state.known:
                bar.props(remove="indeterminate")
                bar.set_value(state.share)

        timer = ui.timer(SLOW, update, immediate=False)
    try:
        yield state
    except asyncio.CancelledError:  # whoever waited has left, and the place with him
        timer.cancel()
        raise
    except BaseException:
        _end(timer, box)
        raise
    _end(timer, box)


def _end(timer: ui.timer, box: Element) -> None:
    timer.cancel()
    if not box.is_deleted:
        timer.delete()
        box.delete()


async def work(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call it in a thread; the page stays alive meanwhile."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def loaded(site: Site, place: Element) -> None:
    """Wait until the rollouts of all runs are read; files that cannot be are told at the top."""
    if place.parent_slot is None:
        raise RuntimeError("place.parent_slot must be there")
    above = place.parent_slot.parent
    for run in site.runs.values():
        async with waiting(place, f"reading rollouts of {run.name}") as state:
            await work(run.refresh, state.report)
        if broken := await work(run.unreadable):
            with place:
                mistake(UserError(broken)).move(above, target_index=1)


def guarded(
    action: Callable[..., Awaitable[None]], place: Element
) -> Callable[..., Awaitable[None]]:
    """The action, with the user's mistakes shown in the place."""

    async def acting(*args: Any) -> None:
        try:
            await action()
        except UserError as error:
            place.clear()
            with place:
                mistake(error)

    return acting


def csv_button(name: str, make: Callable[[], pd.DataFrame]) -> None:
    """A button that downloads a table, made when it is pressed."""

    async def download() -> None:
        table = await work(make)
        ui.download.content(csv_text(table), f"{name}.csv", "text/csv")

    ui.button("csv", icon="download", color=None, on_click=download).props(
        f'flat dense no-caps aria-label="download {plain(name)} as csv"'
    )


def run_choice(site: Site, run: Run, link: Callable[[str], str]) -> None:
    """Links to the same view of the other runs, where there are several."""
    if len(site.runs) > 1:
        items = [
            f"<b>{plain(name)}</b>"
            if name == run.name
            else f'<a href="{plain(link(name))}">{plain(name)}</a>'
            for name in site.runs
        ]
        html(f'<p class="small">Run: {" · ".join(items)}</p>')


def after_load(action: Callable[[], Awaitable[None]], place: Element) -> None:
    """Do something slow once the page is on the screen; mistakes are shown in the place."""
    # Not inside the place: clearing that would cancel what the timer started.
    ui.timer(0.0, guarded(action, place), once=True)
