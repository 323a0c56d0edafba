"""Try it: a text under two checkpoints, and a rationale edited by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from nicegui import ui

from grace_rl.inspect.checkpoints import MODEL, START, Checkpoint, checkpoints
from grace_rl.inspect.markup import number, plain, table, text
from grace_rl.inspect.neighbours import ranked
from grace_rl.inspect.page import frame

NEAREST = 10
LONGEST = 20_000  # characters of a text that is typed in


async def show(site: frame.Site, query: Mapping[str, str]) -> None:
    """Fields for the text and the two checkpoints, and what each makes of it."""
    with frame.frame("Try it", "/try"):
        names = {
            f"{run.name}:{name}": f"{run.name}, {name}"
            for run in site.runs.values()
            for name in checkpoints(run)
        }
        if not names:
            raise frame.UserError("No run here has a model yet; checkpoints come as it trains.")
        first, second = _defaults(site)
        chosen = {"a": query.get("a", first), "b": query.get("b", second)}
        for side, value in chosen.items():
            if value not in names:
                raise frame.UserError(f"{side}: no checkpoint {value!r}")
        content = (
            ui.textarea("Text", value=query.get("text", ""))
            .props('outlined autogrow data-field="text"')
            .classes("fill")
        )
        other = (
            ui.textarea("Compare with (may be empty)", value=query.get("with", ""))
            .props('outlined autogrow data-field="with"')
            .classes("fill")
            .style("margin-top: 8px")
        )
        with ui.element("div").classes("filters").style("margin-top: 8px"):
            fields = {
                side: ui.select(names, label=f"Checkpoint {side.upper()}", value=value).props(
                    f'dense outlined data-field="{side}"'
                )
                for side, value in chosen.items()
            }
            button = ui.button("Write", icon="edit_note", color=None).props("outline no-caps")
        place = ui.element("div")

        async def go() -> None:
            values = {side: field.value for side, field in fields.items()}
            typed, compared = content.value or "", other.value or ""
            there = frame.address("/try", **values, text=typed, **{"with": compared})
            ui.navigate.history.replace(there)
            place.clear()
            if not typed.strip():
                raise frame.UserError("Type a text first.")
            if max(len(typed), len(compared)) > LONGEST:
                raise frame.UserError(f"A text may have {LONGEST:,} characters here.")
            button.disable()
            try:
                with place:
                    pair = ui.element("div").classes("pair")
                for side, value in values.items():
                    with pair:
                        section = ui.element("section").classes("card").props(f"data-side={side}")
                    await _side(site, section, value, names[value], typed, compared)
            finally:
                button.enable()

        button.on_click(frame.guarded(go, place))
        if content.value.strip():
            frame.after_load(go, place)


def _defaults(site: frame.Site) -> tuple[str, str]:
    """The last checkpoints of two runs; of one run its last and its first."""
    found = [(run, list(checkpoints(run))) for run in site.runs.values()]
    found = [(run, names) for run, names in found if names]
    (run, names), (other, others) = found[0], found[-1]
    last = f"{run.name}:{MODEL if MODEL in names else names[-1]}"
    if len(found) == 1:
        return last, f"{run.name}:{START if START in names else names[0]}"
    return last, f"{other.name}:{MODEL if MODEL in others else others[-1]}"


async def _side(
    site: frame.Site, place: ui.element, value: str, title: str, typed: str, compared: str
) -> None:
    name, _, checkpoint_name = value.rpartition(":")
    run = site.run(name)
    with place:
        frame.html(f"<h3>{plain(title)}</h3>")
        body = ui.element("div")
    try:
        async with frame.waiting(body, "loading the model"):
            checkpoint = await frame.work(site.loaded.get, run, checkpoint_name)
            pool = await frame.work(lambda: checkpoint.pool)
        texts = [typed, *([compared] if compared.strip() else []), *pool["text"]]
        async with frame.waiting(body, "writing and reading") as state:
            seen = await frame.work(checkpoint.see, texts, state.report)
    except frame.UserError as error:
        with body:
            frame.mistake(error)
        return
    with body:
        _Answer(checkpoint, pool, typed, compared, seen).draw()


class _Answer:
    """One checkpoint's rationale and neighbours, which follow the rationale as it is edited."""

    def __init__(
        self, checkpoint: Checkpoint, pool: pd.DataFrame, typed: str, compared: str, seen: Any
    ) -> None:
        self.checkpoint, self.pool, self.typed = checkpoint, pool, typed
        skipped = 2 if compared.strip() else 1
        self.rationale, self.own = seen.rationales[0], seen.vectors[0]
        self.other = (seen.rationales[1], seen.vectors[1]) if skipped == 2 else None
        self.vectors = seen.vectors[skipped:]
        self.pool = pool.assign(rationale=seen.rationales[skipped:])
        self.before = ranked(pool, self.vectors @ self.own, typed)
        self.asked = 0

    def draw(self) -> None:
        if self.checkpoint.writes:
            label = (
                "Rationale (edit it)"
                if self.checkpoint.reads_rationales_alone
                else "Rationale (edit it; this reader sees the text too)"
            )
            field = ui.textarea(label, value=self.rationale, on_change=self._edited)
            field.props('outlined autogrow debounce=150 data-field="rationale"').classes("fill")
        else:
            frame.html('<p class="quiet">This model writes no rationales.</p>')
        self.place = ui.element("div")
        with self.place:
            self._show(self.own)

    async def _edited(self, event: Any) -> None:
        self.asked += 1
        number_of_question = self.asked
        edited = str(event.value or "")[:LONGEST]
        own = await frame.work(self.checkpoint.read, edited, self.typed)
        if number_of_question == self.asked:
            self.place.clear()
            with self.place:
                self._show(own)

    def _show(self, own: Any) -> None:
        if self.other is not None:
            cosine = float(self.other[1] @ own)
            said = text(self.other[0] or "(empty)")
            said = f'<br><span class="small quiet">Its rationale: {said}</span>'
            frame.html(
                f'<p data-part="similarity">Similarity to the other text: <b>{number(cosine)}</b>'
                f"{said if self.checkpoint.writes else ''}</p>"
            )
        found = ranked(self.pool.drop(columns="rationale"), self.vectors @ own, self.typed)
        was = dict(zip(self.before["text"], self.before["rank"], strict=True))
        rationales = dict(zip(self.pool["text"], self.pool["rationale"], strict=True))
        found = found.assign(
            moved=[was[t] - rank for t, rank in zip(found["text"], found["rank"], strict=True)],
            rationale=[rationales[t] for t in found["text"]],
        )
        columns = {"rank": "rank", "moved": "moved", "cosine": "cosine", "text": "text"}
        if self.checkpoint.writes:
            columns["rationale"] = "its rationale"
        shown = table(found.head(NEAREST), columns, {"moved": _moved}, "nearest texts")
        frame.html(
            f'<p class="small quiet">Nearest of {len(found)} texts of the run</p>'
            f'<div class="wide">{shown}</div>'
        )
        frame.csv_button(f"{self.checkpoint.run.name}-{self.checkpoint.name}", lambda: found)


def _moved(value: Any, row: Mapping[str, Any]) -> str:
    """How many places a text rose or fell since the rationale was edited."""
    if value == 0:
        return "–"
    return f"▲ {value}" if value > 0 else f"▼ {-value}"
