"""One rollout: its tokens, its scores, and the texts nearest to it before and after."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from nicegui import ui

from grace_rl.inspect import sections
from grace_rl.inspect.checkpoints import START, checkpoints
from grace_rl.inspect.markup import facts, link, plain, table, text
from grace_rl.inspect.neighbours import nearest_by_rationale, pool_of_step, ranked
from grace_rl.inspect.page import frame
from grace_rl.inspect.page.rollouts import whole
from grace_rl.inspect.run import Run

NEAREST = 10
COLUMNS = {
    "rank": "rank",
    "cosine": "cosine",
    "text": "text",
    "role": "role",
    "same_row": "same row",
}


async def show(site: frame.Site, query: Mapping[str, str]) -> None:
    """The rollout that the address names."""
    with frame.frame("One rollout", "/rollouts"):
        run = site.run(query.get("run"))
        step, row = whole(query, "step"), whole(query, "row")
        rollout = run.rollout(step, row)
        there = frame.address("/group", run=run.name, step=step, group=rollout["group"])
        through = frame.address("/training", run=run.name, text=rollout["text"])
        newest = next(reversed(checkpoints(run)), None)
        trial = frame.address("/try", a=newest and f"{run.name}:{newest}", text=rollout["text"])
        links = [link(through, "this text through training"), link(trial, "try this text")]
        if rollout["advantage"] is not None:
            links.insert(0, link(there, "its group"))
        frame.html(
            f'<p class="small quiet">{plain(run.name)}, step {step}, {plain(rollout["role"])} of '
            f"row {rollout['example']}{', an anchor' if rollout['advantage'] is None else ''} · "
            f"{' · '.join(links)}</p><h2>Text</h2><p>{text(rollout['text'])}</p>"
            f"<h2>Rationale</h2>{sections.rollout_tokens(run, rollout)}"
            '<p class="small quiet">Green tokens are made likelier, red ones less likely.</p>'
            f"{facts(sections.scores(run, rollout))}"
            f'<div class="cards">{sections.step_curve(rollout)}</div>'
        )
        frame.html("<h2>Nearest texts of the step</h2>")
        with ui.element("div").classes("pair"):
            before, after = ui.element("section"), ui.element("section")

        async def later() -> None:
            await frame.loaded(site, after)
            own = await frame.work(nearest_by_rationale, run, step, row)
            _neighbours(after, "After: by the rationale", own, f"{run.name}-{step}-{row}-after")
            async with frame.waiting(before, "loading the model") as _:
                found: tuple[str, pd.DataFrame] = await frame.work(_before, site, run, rollout)
            _neighbours(before, found[0], found[1], f"{run.name}-{step}-{row}-before")

        frame.after_load(later, before)


def _before(site: frame.Site, run: Run, rollout: Mapping[str, object]) -> tuple[str, pd.DataFrame]:
    """The same texts by the text alone, as the checkpoint sees it that came next."""
    step = int(str(rollout["step"]))
    name = next_checkpoint(run, step)
    checkpoint = site.loaded.get(run, name)
    pool, _ = pool_of_step(run, step)
    vectors = checkpoint.see_plain([*pool["text"], str(rollout["text"])])
    table = ranked(
        pool, vectors[:-1] @ vectors[-1], str(rollout["text"]), int(str(rollout["example"]))
    )
    return f"Before: by the text alone ({name})", table


def next_checkpoint(run: Run, step: int) -> str:
    """The run's first checkpoint at or after a step, else its last.

    Raises:
        UserError: It has none yet.
    """
    names = [name for name in checkpoints(run) if name != START]
    if not names:
        raise frame.UserError("The run has no checkpoint yet to read the text with.")
    later = [n for n in names if n.startswith("checkpoint-") and int(n.split("-")[1]) >= step]
    return later[0] if later else names[-1]


def _neighbours(place: ui.element, title: str, found: pd.DataFrame, name: str) -> None:
    counterpart = found[found["same_row"]]
    ranks = ", ".join(f"{row['role']} {row['rank']}" for _, row in counterpart.iterrows())
    note = f"Ranks of its own row's texts: {plain(ranks)}" if ranks else ""
    with place:
        shown = table(found.head(NEAREST), COLUMNS, caption=title)
        frame.html(
            f'<h3>{plain(title)}</h3><p class="small quiet">{note}</p>'
            f'<div class="wide">{shown}</div>'
        )
        frame.csv_button(name, lambda: found)
