"""Through training: what was written of the same text at several steps, with the differences."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd
from nicegui import ui

from grace_rl.inspect import sections
from grace_rl.inspect.checkpoints import checkpoints
from grace_rl.inspect.markup import differences, link, number, plain, table, text
from grace_rl.inspect.page import frame
from grace_rl.inspect.run import Run

TEXTS = 40


async def show(site: frame.Site, query: Mapping[str, str]) -> None:
    """A list of texts; or one text, with the runs side by side."""
    with frame.frame("Through training", "/training"):
        chosen = query.get("text", "")
        search = (
            ui.input("Find a text", value=query.get("find", ""))
            .props('dense outlined clearable debounce=150 data-field="find"')
            .classes("fill")
        )
        place = ui.element("div")
        if not chosen:
            frame.html("".join(map(sections.soft_token_words, site.runs.values())))

        async def find() -> None:
            await frame.loaded(site, place)
            found = await frame.work(_texts, site, search.value or "")
            place.clear()
            with place:
                _list(found)

        async def later() -> None:
            if chosen:
                await frame.loaded(site, place)
                with place:
                    await _draw(site, chosen)
            else:
                await find()

        async def changed() -> None:
            ui.navigate.history.replace(frame.address("/training", find=search.value))
            await find()

        search.on_value_change(changed)
        frame.after_load(later, place)


def _texts(site: frame.Site, find: str) -> pd.DataFrame:
    """Texts of all runs; `steps` is in how many steps of them all they were read."""
    found = pd.concat([run.texts(find or None, TEXTS) for run in site.runs.values()])
    if found.empty:
        return found
    merged = found.groupby("text", sort=False, as_index=False).agg(
        {"role": "first", "steps": "sum", "first": "min", "last": "max"}
    )
    return merged.sort_values("steps", ascending=False, kind="stable").head(TEXTS)


def _list(found: pd.DataFrame) -> None:
    def opened(value: Any, row: Mapping[str, Any]) -> str:
        return link(frame.address("/training", text=value), text(value, 300))

    columns = {"text": "text", "role": "role", "steps": "stored steps", "first": "first"}
    columns |= {"last": "last"}
    shown = table(found, columns, {"text": opened}, "texts")
    frame.html(
        '<p class="small quiet">A text is stored each time a logged step draws its row. '
        f'Choose one; its page can also ask every checkpoint.</p><div class="wide">{shown}</div>'
    )
    frame.csv_button("texts", lambda: found)


async def _draw(site: frame.Site, chosen: str) -> None:
    trial = frame.address("/try", text=chosen)
    frame.html(f"<h2>{text(chosen)}</h2><p>{link(trial, 'try this text')}</p>")
    with ui.element("div").classes("pair"):
        for run in site.runs.values():
            with ui.element("section").classes("card"):
                frame.html(f"<h3>{plain(run.name)}: best rationale of each stored step</h3>")
                stored = await frame.work(run.through_training, chosen)
                frame.html(_history(run, stored))
                frame.csv_button(f"{run.name}-through", functools.partial(_same, stored))
                _ask_checkpoints(site, run, chosen)


def _history(run: Run, stored: pd.DataFrame) -> str:
    """Rationales in the order of training, each against the one before, as HTML."""
    rows, before = [], None
    for record in stored.to_dict("records"):
        rationale = str(record["rationale"])
        shown = text(rationale) if before is None else differences(before, rationale)
        there = frame.address("/rollout", run=run.name, step=record["step"], row=record["row"])
        rows.append(
            {
                "step": link(there, number(record["step"])),
                "rationale": shown,
                "advantage": number(record["advantage"]),
            }
        )
        before = rationale
    return _marked(rows, {"step": "step", "rationale": "rationale", "advantage": "advantage"})


def _ask_checkpoints(site: frame.Site, run: Run, chosen: str) -> None:
    """A button: what each checkpoint writes, greedily."""
    names = list(checkpoints(run))
    if not names:
        return
    place = ui.element("div")

    async def ask() -> None:
        button.disable()
        place.clear()
        rows: list[dict[str, str]] = []
        before: str | None = None
        written: list[dict[str, str]] = []
        async with frame.waiting(place, "asking the checkpoints") as state:
            for done, name in enumerate(names):
                state.report(done, len(names))
                try:
                    checkpoint = await frame.work(site.loaded.get, run, name)
                    seen = await frame.work(checkpoint.see, [chosen])
                except frame.UserError as error:
                    rows.append({"name": text(name), "rationale": text(error)})
                    continue
                rationale = seen.rationales[0]
                shown = text(rationale) if before is None else differences(before, rationale)
                rows.append({"name": text(name), "rationale": shown or "(writes none)"})
                written.append({"checkpoint": name, "rationale": rationale})
                before = rationale
        button.enable()
        with place:
            frame.html(_marked(rows, {"name": "checkpoint", "rationale": "greedy rationale"}))
            frame.csv_button(f"{run.name}-checkpoints", lambda: pd.DataFrame(written))

    button = ui.button("Ask every checkpoint", color=None, on_click=frame.guarded(ask, place))
    button.props("outline no-caps dense").style("padding: 2px 10px; margin-top: 6px")


def _marked(rows: list[dict[str, str]], columns: dict[str, str]) -> str:
    """A table whose cells are HTML already."""

    def as_it_is(value: Any, row: Mapping[str, Any]) -> str:
        return str(value)

    return table(rows, columns, dict.fromkeys(columns, as_it_is))


def _same(stored: pd.DataFrame) -> pd.DataFrame:
    return stored
