"""Overview: how the runs went, curve by curve, and every alarm where it fired."""

from __future__ import annotations

from nicegui import ui

from grace_rl.inspect import sections
from grace_rl.inspect.markup import plain
from grace_rl.inspect.page import frame


async def show(site: frame.Site) -> None:
    """All runs in one set of charts; a second run is dashed."""
    runs = list(site.runs.values())
    with frame.frame("Overview", "/"):
        summaries = "".join(map(sections.summary, runs))
        frame.html(f'<div class="pair">{summaries}</div>')
        frame.html("".join(map(sections.alarm_list, runs)))
        with ui.element("div").classes("line"):
            for run in runs:
                frame.html(f'<span class="small quiet">metrics of {plain(run.name)}</span>')
                frame.csv_button(f"{run.name}-metrics", run.metrics)
        frame.html(sections.charts(runs))
        place = ui.element("div")

        async def later() -> None:
            await frame.loaded(site, place)
            chart = await frame.work(sections.advantage_chart, runs)
            with place:
                frame.html(f'<h2>Stored rollouts</h2><div class="cards">{chart}</div>')

        frame.after_load(later, place)
