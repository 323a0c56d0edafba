"""Replays: what other rewards would have changed in a run, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nicegui import ui

from grace_rl.inspect.markup import link, plain, table, text
from grace_rl.inspect.page import frame
from grace_rl.inspect.replays import replayed_groups, replays

SHOWN = 100


async def show(site: frame.Site, query: Mapping[str, str]) -> None:
    """The replays of a run; one of them by its groups, most changed first."""
    with frame.frame("Replays", "/replays"):
        run = site.run(query.get("run"))
        frame.run_choice(site, run, lambda name: frame.address("/replays", run=name))
        names = list(replays(run))
        if not names:
            frame.html(
                "<p>No replay is kept beside this run. <code>grace-rl replay RUN --rewards "
                "new.yaml</code> scores its rollouts again with other rewards.</p>"
            )
            return
        chosen = query.get("name") or names[0]
        items = [
            f"<b>{plain(name)}</b>"
            if name == chosen
            else link(frame.address("/replays", run=run.name, name=name), text(name))
            for name in names
        ]
        frame.html(f'<p class="small">Replay: {" · ".join(items)}</p>')
        place = ui.element("div")

        async def later() -> None:
            async with frame.waiting(place, "comparing groups"):
                groups = await frame.work(replayed_groups, run, chosen)

            def opened(value: Any, row: Mapping[str, Any]) -> str:
                there = frame.address("/group", run=run.name, step=row["step"], group=row["group"])
                return link(there, text(value, 300))

            def cut(value: Any, row: Mapping[str, Any]) -> str:
                return text(value, 300)

            columns = {"step": "step", "role": "role", "text": "text", "best": "best then"}
            columns |= {"replayed_best": "best now", "order_kept": "pairs that keep their order"}
            cells = {"text": opened, "best": cut, "replayed_best": cut}
            with place, ui.element("div").classes("line"):
                changed = int(groups["best_changed"].sum())
                frame.html(
                    f'<span class="count" role="status">{len(groups):,} groups; in '
                    f"{changed:,} another rollout would have been the best</span>",
                    "span",
                )
                frame.csv_button(f"{run.name}-replay-{chosen}", lambda: groups)
            with place:
                shown = table(groups.head(SHOWN), columns, cells, "groups")
                frame.html(f'<div class="wide">{shown}</div>')

        frame.after_load(later, place)
