"""Rollouts: those that fit a filter, by themselves or as groups; the address says which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from nicegui import ui

from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import link, number, plain, table, text
from grace_rl.inspect.page import frame
from grace_rl.inspect.run import Run
from grace_rl.inspect.sections import group_cards
from grace_rl.rollout.store import REWARD

ROWS = 50
CUT = 300  # characters of a text in the list


async def show(site: frame.Site, query: Mapping[str, str]) -> None:
    """The list, and fields that change it in place, the address with it."""
    with frame.frame("Rollouts", "/rollouts"):
        run = site.run(query.get("run"))
        chosen = Filter.from_query(query)
        frame.run_choice(site, run, lambda name: f"/rollouts?{chosen.query(run=name)}")
        fields = ui.element("div").classes("filters")
        place = ui.element("div")

        async def later() -> None:
            await frame.loaded(site, place)
            await _List(run, chosen, query, fields, place).refresh()

        frame.after_load(later, place)


class _List:
    def __init__(
        self,
        run: Run,
        chosen: Filter,
        query: Mapping[str, str],
        fields: ui.element,
        place: ui.element,
    ) -> None:
        self.run, self.chosen, self.place = run, chosen, place
        self.groups = query.get("show") == "groups"
        self.page = max(1, whole(query, "page")) if query.get("page") else 1
        self.sort, self.descending = query.get("sort", "step"), query.get("order") == "down"
        self.asked = 0
        with fields:
            self._fields()

    def sorts(self) -> list[str]:
        if self.groups:
            return ["step", "spread", *(f"spread/{label}" for label in self.run.rewards)]
        return ["step", "advantage", "tokens", *(REWARD + label for label in self.run.rewards)]

    def _fields(self) -> None:
        self.inputs: dict[str, Any] = {}
        written = dict.fromkeys(("step", "text", "score"), "")
        if self.chosen.step is not None:
            written["step"] = Filter(step=self.chosen.step).query().removeprefix("step=")
        written["text"], written["score"] = self.chosen.text or "", self.chosen.score or ""
        about = {
            "step": ("Step", "10 or 10-50"),
            "text": ("Text or rationale contains", ""),
            "score": ("Scores", "contrastive >= 0.5, tokens < 9"),
        }
        for name, (label, example) in about.items():
            field = ui.input(
                label, value=written[name], placeholder=example, on_change=self._changed
            )
            field.props(f'dense outlined debounce=150 data-field="{name}"')
            self.inputs[name] = field.classes("" if name == "step" else "broad")
        roles = {"": "any", **{role: role for role in self.run.roles()}}
        role = self.chosen.role or ""
        roles.setdefault(role, role)
        self.inputs["role"] = self._select("Role", roles, role)
        ended = {"": "all", "true": "never ended", "false": "ended"}
        now = "" if self.chosen.truncated is None else str(self.chosen.truncated).lower()
        self.inputs["truncated"] = self._select("End", ended, now)
        shown = {"": "rollouts", "groups": "groups"}
        self.inputs["show"] = self._select("Show", shown, "groups" if self.groups else "")
        sorts = self.sorts()
        self.sort = self.sort if self.sort in sorts else "step"
        self.inputs["sort"] = self._select("Sort by", sorts, self.sort).classes("broad")
        orders = {"": "rising", "down": "falling"}
        self.inputs["order"] = self._select("Order", orders, "down" if self.descending else "")

    def _select(self, label: str, options: Any, value: str) -> ui.select:
        field = ui.select(options, label=label, value=value, on_change=self._changed)
        field.props("dense outlined options-dense")
        return field

    async def _changed(self) -> None:
        values = {name: str(field.value or "") for name, field in self.inputs.items()}
        if self.groups != (values["show"] == "groups"):
            self.groups = not self.groups
            sorts = self.sorts()
            if values["sort"] not in sorts:
                values["sort"] = "step"
            self.inputs["sort"].set_options(sorts, value=values["sort"])
        self.page = 1
        self.sort, self.descending = values["sort"], values["order"] == "down"
        try:
            before, written = self.chosen, Filter.from_query(values)
            self.chosen = replace(written, example=before.example, group=before.group)
        except frame.UserError as error:
            self.place.clear()
            with self.place:
                frame.mistake(error)
            return
        await self.refresh()

    def address(self) -> str:
        made = self.chosen.query(
            run=self.run.name,
            show="groups" if self.groups else None,
            sort=None if self.sort == "step" else self.sort,
            order="down" if self.descending else None,
            page=None if self.page == 1 else self.page,
        )
        return f"/rollouts?{made}"

    async def refresh(self) -> None:
        self.asked += 1
        number_of_question = self.asked
        ui.navigate.history.replace(self.address())
        try:
            count, rows = await frame.work(self._ask)
        except frame.UserError as error:
            self.place.clear()
            with self.place:
                frame.mistake(error)
            return
        if number_of_question != self.asked:
            return  # something newer was asked meanwhile
        self.place.clear()
        with self.place:
            self._draw(count, rows)

    def _ask(self) -> tuple[int, pd.DataFrame]:
        count = (self.run.count_groups if self.groups else self.run.count)(self.chosen)
        self.page = min(self.page, max(1, -(-count // ROWS)))
        return count, self._rows(limit=ROWS, offset=(self.page - 1) * ROWS)

    def _rows(self, limit: int | None = None, offset: int = 0) -> pd.DataFrame:
        ask = self.run.groups if self.groups else self.run.rollouts
        how: dict[str, Any] = {"sort": self.sort, "descending": self.descending}
        return ask(self.chosen, **how, limit=limit, offset=offset)

    def _draw(self, count: int, rows: pd.DataFrame) -> None:
        kind = "groups" if self.groups else "rollouts"
        with ui.element("div").classes("line"):
            frame.html(f'<span class="count" role="status">{count:,} {kind}</span>', "span")
            frame.csv_button(f"{self.run.name}-{kind}", self._rows)
        frame.html(f'<div class="wide">{self._table(rows)}</div>')
        pages = -(-count // ROWS)
        if pages > 1:
            ui.pagination(1, pages, value=self.page, on_change=self._turn).props(
                "max-pages=6 boundary-numbers"
            )

    async def _turn(self, event: Any) -> None:
        self.page = int(event.value)
        await self.refresh()

    def _table(self, rows: pd.DataFrame) -> str:
        name = self.run.name

        def rollout(value: Any, row: Mapping[str, Any]) -> str:
            there = frame.address("/rollout", run=name, step=row["step"], row=row["row"])
            return link(there, text(value, CUT) if str(value).strip() else "(empty)")

        def group(value: Any, row: Mapping[str, Any]) -> str:
            there = frame.address("/group", run=name, step=row["step"], group=row["group"])
            return link(there, number(value))

        def cut(value: Any, row: Mapping[str, Any]) -> str:
            return text(value, CUT)

        if self.groups:
            columns = {"step": "step", "group": "group", "role": "role", "text": "text"}
            columns |= {"best": "best", "worst": "worst", "spread": "spread"}
            columns |= {f"spread/{label}": f"spread of {label}" for label in self.run.rewards}
            cells = {"group": group, "text": cut, "best": cut, "worst": cut}
            return table(rows, columns, cells, "groups")
        columns = {"step": "step", "group": "group", "role": "role", "text": "text"}
        columns |= {"rationale": "rationale", "tokens": "tokens", "advantage": "advantage"}
        columns |= {REWARD + label: label for label in self.run.rewards}
        return table(rows, columns, {"group": group, "rationale": rollout, "text": cut}, "rollouts")


def group_view(site: frame.Site, query: Mapping[str, str]) -> None:
    """A group side by side, best to worst, with every component."""
    with frame.frame("Group", "/rollouts"):
        run = site.run(query.get("run"))
        step, group = whole(query, "step"), whole(query, "group")
        rows = run.group(step, group, ["token_ids", "token_advantages"])
        first = rows.iloc[0]
        through = frame.address("/training", run=run.name, text=first["text"])
        frame.html(
            f'<p>{text(first["text"])}</p><p class="small quiet">{plain(run.name)}, step {step}, '
            f"{plain(str(first['role']))} of row {first['example']} · "
            f"{link(through, 'this text through training')}</p>"
        )
        frame.csv_button(f"{run.name}-step{step}-group{group}", lambda: run.group(step, group))
        frame.html(
            group_cards(
                run,
                rows,
                lambda step, row: frame.address("/rollout", run=run.name, step=step, row=row),
            )
        )


def whole(query: Mapping[str, str], name: str) -> int:
    """A whole number from the address.

    Raises:
        UserError: It is missing or is none.
    """
    value = query.get(name, "")
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise frame.UserError(f"{name}: must be a whole number, not {value[:40]!r}")
    return int(value)
