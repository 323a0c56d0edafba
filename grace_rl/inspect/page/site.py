"""The views of the page: what each address shows, which tables it gives as csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect import views
from grace_rl.inspect.checkpoints import checkpoints
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.learned import WORDS, learned
from grace_rl.inspect.markup import address
from grace_rl.inspect.neighbours import nearest_by_rationale
from grace_rl.inspect.notes import notes, reader_name
from grace_rl.inspect.page.listing import ROWS, Listing, way_through, whole
from grace_rl.inspect.patterns import PATTERNS
from grace_rl.inspect.projection import SIZE, frames
from grace_rl.inspect.replays import replayed_groups, replays
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD

CUT = 300  # characters of a text in a list
TEXTS = 40
SHOWN = 100  # groups of a replay
NEAREST = 10

Query = Mapping[str, str]


@dataclass
class Site:
    """What is looked at: runs by name."""

    runs: dict[str, Run]

    def run(self, query: Query) -> Run:
        """The run that the address names; the first one for none.

        Raises:
            UserError: There is none of that name. Names are those given on the command line, so
                no address leads to another folder.
        """
        name = query.get("run")
        if not name:
            return next(iter(self.runs.values()))
        if name not in self.runs:
            raise UserError(f"no run {name!r} is open; there are: {', '.join(self.runs)}")
        return self.runs[name]

    def others(self, run: Run, where: Callable[[str], str]) -> dict[str, str]:
        """Where the same view of each run is; "" for the one that is shown."""
        return {name: "" if name == run.name else where(name) for name in self.runs}


@dataclass(frozen=True)
class Page:
    """One view: its template, its title, the heading of it in the navigation, and its values."""

    template: str
    title: str
    here: str
    values: dict[str, Any]


def overview(site: Site, query: Query) -> Page:
    """All runs in one set of charts; a second run is dashed."""
    runs = list(site.runs.values())
    return Page("overview", "Overview", "/", {"view": views.overview(runs)})


def rollouts(site: Site, query: Query) -> Page:
    """Rollouts or groups that fit a filter; the address says which."""
    run = site.run(query)
    run.refresh()
    listing = Listing.read(run, query)
    count = listing.count()
    turns = _turns(listing.page, count, ROWS, listing.address)
    rows = listing.rows(limit=ROWS, offset=(turns["page"] - 1) * ROWS)
    group = listing.opened if listing.groups else _to("/group", run, "step", "group")
    kind = "groups" if listing.groups else "rollouts"
    values = {
        "run": run,
        "names": site.others(run, lambda name: f"/rollouts?{listing.query(run=name)}"),
        "listing": listing,
        "query": query,
        "columns": _columns(run, listing.groups),
        "rows": rows.to_dict("records"),
        "links": {"rationale": listing.opened, "group": group},
        "sorts": {name: listing.sorted_by(name) for name in listing.sorts()},
        "count": f"{count:,} {kind}",
        "file": f"{run.name}-{kind}",
        "turns": turns,
        "limit": CUT,
    }
    return Page("rollouts", f"{kind.capitalize()} of {run.name}", "/rollouts", values)


def _columns(run: Run, groups: bool) -> dict[str, str]:
    columns = {"step": "step", "group": "group", "role": "role", "text": "text"}
    if groups:
        columns |= {"best": "best", "worst": "worst", "spread": "spread"}
        return columns | {f"spread/{label}": f"spread of {label}" for label in run.rewards}
    columns |= {"rationale": "rationale", "tokens": "tokens", "advantage": "advantage"}
    return columns | {REWARD + label: label for label in run.rewards} | {"total": "total"}


def _to(path: str, run: Run, *names: str, **others: str) -> dict[str, Any]:
    """A link of a table's cells, which takes these values of its row; others by another name."""
    return {"path": path, "run": run.name, "of": {name: name for name in names} | others}


def _turns(page: int, count: int, size: int, where: Callable[[int], str]) -> dict[str, Any]:
    """The page of a list that there is, how many there are, and where those around it are."""
    pages = max(1, -(-count // size))
    page = min(page, pages)
    near = {"first": 1, "previous": page - 1, "next": page + 1, "last": pages}
    found = {name: where(number) if 1 <= number <= pages else "" for name, number in near.items()}
    return found | {"page": page, "pages": pages}


def group(site: Site, query: Query) -> Page:
    """A group side by side, best to worst, with every component."""
    run, step, number = site.run(query), whole(query, "step"), whole(query, "group")
    cards = views.group_cards(run, step, number)
    inside = Listing(run, Filter(step=step, group=number), sort="advantage", descending=True)
    around, at = Listing(run, Filter(step=step), groups=True), 0
    if not query.get("at"):
        order = run.groups(step=step)["group"].tolist()
        at = order.index(number) if number in order else 0
    values = {
        "run": run,
        "cards": [card | {"at": at} for at, card in enumerate(cards)],
        "first": cards[0],
        "opened": inside.opened,
        "replays": list(replays(run)),
        "way": way_through(run, query, around, at),
    }
    return Page("group", f"Group {number}, step {step} of {run.name}", "/rollouts", values)


def rollout(site: Site, query: Query) -> Page:
    """One rollout: its tokens, its scores, and the texts nearest to it."""
    run, step, row = site.run(query), whole(query, "step"), whole(query, "row")
    found = run.rollout(step, row)
    pieces, colour = views.rollout_tokens(run, found)
    problems: list[str] = []
    try:
        near = neighbours(site, query)
    except UserError as error:
        near, problems = pd.DataFrame(), error.problems
    values = {
        "run": run,
        "rollout": found,
        "pieces": pieces,
        "colour": colour,
        "scores": views.scores(run, found),
        "curve": views.step_curve(found),
        "said": notes(run, step, row).to_dict("records"),
        "mine": _mine(run, step, row),
        "newest": next(reversed(checkpoints(run)), None),
        "near": nearest(near),
        "ranks": own_ranks(near),
        "problems": problems,
        "csv": address("/csv/neighbours", run=run.name, step=step, row=row),
        "file": f"{run.name}-{step}-{row}-after",
        "way": way_through(run, query, Listing(run, Filter(step=step)), row),
    }
    return Page("rollout", f"Rollout {row}, step {step} of {run.name}", "/rollouts", values)


def _mine(run: Run, step: int, row: int) -> dict[str, str]:
    """What this reader said of a rollout already."""
    found = notes(run, step, row)
    own = found[found["by"] == reader_name()].to_dict("records")
    return {name: own[0][name] if own else "" for name in ("flag", "label", "note")}


def noted(site: Site, query: Query) -> Page:
    """What readers said of rollouts, and what can be made of it."""
    run = site.run(query)
    rows = notes(run).to_dict("records")
    columns = {"step": "step", "row": "row", "by": "reader", "flag": "flag", "label": "label"}
    columns |= {"note": "note", "text": "text", "rationale": "rationale"}
    values = {
        "run": run,
        "names": site.others(run, lambda name: address("/notes", run=name)),
        "rows": rows,
        "columns": columns,
        "links": {"rationale": _to("/rollout", run, "step", "row")},
        "limit": CUT,
        "folder": str(run.beside / "notes"),
    }
    return Page("notes", f"Notes on {run.name}", "/notes", values)


def compare(site: Site, query: Query) -> Page:
    """Two runs: what differs between the recipes, and the same texts side by side."""
    run = site.run(query)
    others = [other for other in site.runs.values() if other is not run]
    other = site.run({"run": query.get("with", "")}) if query.get("with") else (others or [run])[0]
    values: dict[str, Any] = {"run": run, "other": other}
    if other is run:
        return Page("compare", "Compare runs", "/compare", values | {"rows": []})
    rows, count = views.side_by_side(run, other, SHOWN)
    replayed = views.replay_rows(run, other)
    in_both = (row["name"] for row in replayed if None not in (row["first"], row["second"]))
    scored = next(in_both, None)
    values |= {
        "names": site.others(run, lambda name: address("/compare", run=name)),
        "withs": {
            one.name: ""
            if one is other
            else address("/compare", run=run.name, **{"with": one.name})
            for one in others
        },
        "recipe": views.recipe_rows([run, other]),
        "scores": [views.summary(one) for one in (run, other)],
        "replays": replayed,
        "replay_links": {
            "first": _to("/replays", run, "name"),
            "second": _to("/replays", other, "name"),
        },
        "groups": views.changed_groups(run, other, scored, SHOWN),
        "scored": scored,
        "group_links": {
            "total_first": _to("/group", run, step="step_first", group="group_first"),
            "total_second": _to("/group", other, step="step_second", group="group_second"),
        },
        "rows": rows,
        "count": count,
        "links": {"text": lambda row: address("/training", text=row["text"])},
        "limit": CUT,
    }
    return Page("compare", f"{run.name} and {other.name}", "/compare", values)


def neighbours(site: Site, query: Query) -> pd.DataFrame:
    """The texts of its step nearest to a rollout by its own vector."""
    return nearest_by_rationale(site.run(query), whole(query, "step"), whole(query, "row"))


def nearest(found: pd.DataFrame) -> list[dict[str, Any]]:
    """The first of a ranked pool; the role says which belong to the text's own row."""
    rows = found.head(NEAREST).to_dict("records")
    return [row | {"role": row["role"] + ", own row" * row["same_row"]} for row in rows]


def own_ranks(found: pd.DataFrame) -> str:
    """Where the other texts of a text's own row stand."""
    own = found[found["same_row"]].to_dict("records") if len(found) else []
    return ", ".join(f"{row['role']} {row['rank']}" for row in own)


def training(site: Site, query: Query) -> Page:
    """A list of texts; or one text, with the runs side by side."""
    if text := query.get("text", ""):
        histories = [
            (run, views.history(run, text), _to("/rollout", run, "step", "row"), checkpoints(run))
            for run in site.runs.values()
        ]
        values: dict[str, Any] = {"text": text, "histories": histories}
        return Page("text", f"Through training: {text[:40]}", "/training", values)
    run, find = site.run(query), query.get("find", "")
    count = run.count_texts(find or None)
    turns = _turns(
        whole(query, "page") if query.get("page") else 1,
        count,
        TEXTS,
        lambda page: address("/training", run=run.name, find=find, page=page),
    )
    rows = run.texts(find or None, TEXTS, (turns["page"] - 1) * TEXTS).to_dict("records")
    columns = {"text": "text", "role": "role", "steps": "stored steps", "first": "first step"}
    columns |= {"last": "last step"}
    for place, other in enumerate(other for other in site.runs.values() if other is not run):
        columns[f"other{place}"] = f"stored steps in {other.name}"
        steps = other.steps_of([row["text"] for row in rows])
        for row in rows:
            row[f"other{place}"] = steps.get(row["text"], 0)
    values = {
        "run": run,
        "names": site.others(run, lambda name: address("/training", run=name, find=find)),
        "find": find,
        "rows": rows,
        "columns": columns,
        "links": {"text": lambda row: address("/training", text=row["text"])},
        "count": f"{count:,} texts",
        "turns": turns,
        "panel": views.panel_rows(run),
        "soft": [(one.name, views.soft_token_tables(one)) for one in site.runs.values()],
        "limit": CUT,
    }
    return Page("training", f"Texts of {run.name} through training", "/training", values)


def learned_page(site: Site, query: Query) -> Page:
    """Words and patterns of a run by step, whether they pay, and which of them game."""
    run = site.run(query)
    run.refresh()
    found = learned(run)
    late = int(found.steps["step"].iloc[-max(1, len(found.steps) // 5)]) if len(found.steps) else 0

    def showing(row: Mapping[str, Any]) -> str:
        return address(
            "/rollouts", run=run.name, pattern=row["pattern"], step=f"{late}-", order="down"
        )

    values = {
        "run": run,
        "names": site.others(run, lambda name: address("/learned", run=name)),
        "summary": views.summary(run),
        "found": found,
        "kinds": PATTERNS,
        "patterns": found.patterns.to_dict("records"),
        "words": found.words.head(WORDS).to_dict("records"),
        "charts": views.learned_charts(run, found),
        "links": {
            "pattern": showing,
            "word": lambda row: address("/rollouts", run=run.name, word=row["word"]),
        },
    }
    return Page("learned", f"What {run.name} learned", "/learned", values)


def map_page(site: Site, query: Query) -> Page:
    """Vectors of the same texts in two dimensions, step by step."""
    run = site.run(query)
    made, panel = frames(run)
    values = {
        "run": run,
        "names": site.others(run, lambda name: address("/map", run=name)),
        "frames": made,
        "panel": panel,
        "size": SIZE,
        "opened": lambda frame, dot: (
            address("/training", text=dot.text)
            if dot.row is None
            else address("/rollout", run=run.name, step=frame.step, row=dot.row)
        ),
    }
    return Page("map", f"Map of {run.name}", "/map", values)


def replay(site: Site, query: Query) -> Page:
    """The replays of a run; one of them by its groups, most changed first."""
    run = site.run(query)
    replayed = list(replays(run))
    values: dict[str, Any] = {
        "run": run,
        "names": site.others(run, lambda name: address("/replays", run=name)),
        "replays": replayed,
    }
    if not replayed:
        return Page("replays", f"Replays of {run.name}", "/replays", values)
    chosen = query.get("name") or replayed[0]
    groups = replayed_groups(run, chosen)
    values |= {
        "chosen": chosen,
        "rows": groups.head(SHOWN).to_dict("records"),
        "count": len(groups),
        "changed": int(groups["best_changed"].sum()),
        "links": {"text": _to("/group", run, "step", "group")},
        "limit": CUT,
    }
    return Page("replays", f"Replay {chosen} of {run.name}", "/replays", values)


VIEWS: dict[str, Any] = {
    "/": overview,
    "/rollouts": rollouts,
    "/group": group,
    "/rollout": rollout,
    "/training": training,
    "/learned": learned_page,
    "/map": map_page,
    "/replays": replay,
    "/notes": noted,
    "/compare": compare,
}
CSV: dict[str, Any] = {
    "metrics": lambda site, query: site.run(query).metrics(),
    "list": lambda site, query: Listing.read(site.run(query), query).rows().drop(columns="at"),
    "group": lambda site, query: site.run(query).group(whole(query, "step"), whole(query, "group")),
    "neighbours": neighbours,
    "through": lambda site, query: site.run(query).through_training(query.get("text", "")),
    "texts": lambda site, query: site.run(query).texts(query.get("find") or None),
    "notes": lambda site, query: notes(site.run(query)),
    "words": lambda site, query: learned(site.run(query)).words,
    "patterns": lambda site, query: learned(site.run(query)).steps,
    "replay": lambda site, query: replayed_groups(site.run(query), query.get("name", "")),
}
