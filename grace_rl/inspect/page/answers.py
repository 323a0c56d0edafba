"""What models are asked for: answers that take a while and come in parts.

Each is a generator of events for the page: `label` and `share` (0 to 1, or None) of the work so
far, or `html` and the part of the page that it goes `into`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect.checkpoints import MODEL, START, Checkpoint, Seen, checkpoints, loaded
from grace_rl.inspect.markup import address, render
from grace_rl.inspect.neighbours import pool_of_step, ranked
from grace_rl.inspect.page.listing import whole
from grace_rl.inspect.page.site import NEAREST, Page, Query, Site, nearest, own_ranks
from grace_rl.inspect.run import Run
from grace_rl.inspect.views import changes

LONGEST = 20_000  # characters of a text that is typed in
Event = dict[str, Any]


# -- one rollout ---------------------------------


def before(site: Site, query: Query) -> Iterator[Event]:
    """The neighbours of a rollout's text by the text alone, as the next checkpoint sees it."""
    yield {"label": "loading the model", "share": None}
    name, found = _before(site, query)
    file = f"{site.run(query).name}-{whole(query, 'step')}-{whole(query, 'row')}-before"
    csv = address("/csv/before", **query)
    title = f"Before: by the text alone ({name})"
    values = {"title": title, "near": nearest(found), "ranks": own_ranks(found)}
    yield {"html": render("neighbours", **values, csv=csv, file=file)}


def before_table(site: Site, query: Query) -> pd.DataFrame:
    """The whole table of `before`."""
    return _before(site, query)[1]


def _before(site: Site, query: Query) -> tuple[str, pd.DataFrame]:
    run, step = site.run(query), whole(query, "step")
    rollout = run.rollout(step, whole(query, "row"))
    name = _next_checkpoint(run, step)
    pool, _ = pool_of_step(run, step)
    vectors = loaded(run, name).see_plain([*pool["text"], rollout["text"]])
    pool = pool.drop(columns="rationale")  # none takes part in it
    return name, ranked(pool, vectors[:-1] @ vectors[-1], rollout["text"], rollout["example"])


def _next_checkpoint(run: Run, step: int) -> str:
    """The run's first checkpoint at or after a step, else its last.

    Raises:
        UserError: It has none yet.
    """
    names = [name for name in checkpoints(run) if name != START]
    if not names:
        raise UserError("The run has no checkpoint yet to read the text with.")
    later = [n for n in names if n.startswith("checkpoint-") and int(n.split("-")[1]) >= step]
    return later[0] if later else names[-1]


# -- one text under every checkpoint ---------------------------------


def ask(site: Site, query: Query) -> Iterator[Event]:
    """What each checkpoint writes of a text, greedily."""
    run, rows = site.run(query), list[Event]()
    for done, total in _ask(site, query, rows):
        yield {"label": "asking the checkpoints", "share": done / total}
    shown = [
        {"name": row["checkpoint"], "shown": row["shown"], "end": "" if row["ended"] else "never"}
        for row in changes(rows)
    ]
    csv = address("/csv/ask", **query)
    yield {"html": render("asked", rows=shown, csv=csv, file=f"{run.name}-checkpoints")}


def ask_table(site: Site, query: Query) -> pd.DataFrame:
    """The whole table of `ask`."""
    rows: list[Event] = []
    list(_ask(site, query, rows))
    return pd.DataFrame(rows)


def _ask(site: Site, query: Query, rows: list[Event]) -> Iterator[tuple[int, int]]:
    run, text = site.run(query), _typed(query, "text")
    names = list(checkpoints(run))
    for done, name in enumerate(names):
        yield done, len(names)
        try:
            checkpoint = loaded(run, name)
            seen = checkpoint.see([text])[0]
            written = seen.rationale if checkpoint.writes else "(writes none)"
            row = {"checkpoint": name, "rationale": written, "ended": seen.ended}
        except UserError as error:
            row = {"checkpoint": name, "rationale": str(error), "ended": True}
        rows.append(row)


# -- any text under two checkpoints ---------------------------------


def trial(site: Site, query: Query) -> Page:
    """Fields for a text and two checkpoints, and the places for what each makes of it."""
    names = {
        f"{run.name}:{name}": f"{run.name}, {name}"
        for run in site.runs.values()
        for name in checkpoints(run)
    }
    if not names:
        raise UserError("No run here has a model yet; checkpoints come as it trains.")
    first, last = _defaults(site)
    chosen = {"a": query.get("a") or first, "b": query.get("b") or last}
    if wrong := [side for side, value in chosen.items() if value not in names]:
        raise UserError([f"{side}: no checkpoint {chosen[side]!r}" for side in wrong])
    text, other = query.get("text", ""), query.get("with", "")
    sides = [
        {
            "side": side,
            "title": names[value],
            "stream": address("/stream/try", of=value, text=text, **{"with": other}),
        }
        for side, value in chosen.items()
    ]
    values = {"names": names, "chosen": chosen, "text": text, "other": other}
    return Page("try", "Try it", "/try", values | {"sides": sides if text.strip() else []})


def _defaults(site: Site) -> tuple[str, str]:
    """The first and the last checkpoint of a run; the last ones of two runs."""
    found = [(run, list(checkpoints(run))) for run in site.runs.values()]
    found = [(run, names) for run, names in found if names]
    (run, names), (other, others) = found[0], found[-1]
    first = names[0] if len(found) == 1 else names[-1]
    return f"{run.name}:{first}", f"{other.name}:{MODEL if MODEL in others else others[-1]}"


def side(site: Site, query: Query) -> Iterator[Event]:
    """One checkpoint's rationale of a text, at once; then the neighbours."""
    yield {"label": "loading the model", "share": None}
    checkpoint = _checkpoint(site, query)
    seen = checkpoint.see([_typed(query, "text")])[0]
    values = {"seen": seen, "writes": checkpoint.writes, "alone": checkpoint.reads_rationales_alone}
    reads = address("/stream/read", **query)
    yield {"html": render("rationale", **values, reads=reads), "into": "rationale"}
    texts = list(checkpoint.pool["text"])
    for done in checkpoint.see_many(texts):
        yield {"label": "writing and reading other texts", "share": done / len(texts)}
    yield from read(site, query)


def read(site: Site, query: Query) -> Iterator[Event]:
    """The neighbours of a text by a rationale that somebody edited, or by its own."""
    checkpoint, found = _checkpoint(site, query), read_table(site, query)
    compared, other = _typed(query, "with"), None
    own = _own(checkpoint, query)
    if compared.strip():
        seen = checkpoint.see([compared])[0]
        other = {"cosine": float(own @ seen.vector), "rationale": seen.rationale}
    written = checkpoint.see([_typed(query, "text")])[0].rationale
    blank = checkpoint.writes and not query.get("rationale", written).strip()
    values = {
        "rows": found.head(NEAREST).assign(moved=found["moved"].map(_moved)).to_dict("records"),
        "count": len(found),
        "other": other,
        "writes": checkpoint.writes,
        "blank": blank,
        "csv": address("/csv/try", **query),
        "file": f"{checkpoint.run.name}-{checkpoint.name}",
    }
    yield {"html": render("answer", **values), "into": "answer"}


def read_table(site: Site, query: Query) -> pd.DataFrame:
    """All texts of the pool, nearest first; `moved` says how many places each rose since the
    rationale was edited."""
    checkpoint, text = _checkpoint(site, query), _typed(query, "text")
    pool: pd.DataFrame = checkpoint.pool
    seen: list[Seen] = checkpoint.see(list(pool["text"]))
    pool = pool.assign(rationale=[one.rationale for one in seen])
    if not checkpoint.writes:
        pool = pool.drop(columns="rationale")
    own, edited = checkpoint.see([text])[0].vector, _own(checkpoint, query)
    vectors = np.stack([one.vector for one in seen])
    was = ranked(pool, vectors @ own, text).set_index("text")["rank"]
    found = ranked(pool, vectors @ edited, text)
    return found.assign(moved=found["text"].map(was) - found["rank"])


def _own(checkpoint: Checkpoint, query: Query) -> Any:
    """(H,) the vector of the text, by the rationale of the address where there is one."""
    text = _typed(query, "text")
    if "rationale" in query and checkpoint.writes:
        return checkpoint.read(_typed(query, "rationale"), text)
    return checkpoint.see([text])[0].vector


def _checkpoint(site: Site, query: Query) -> Checkpoint:
    name, _, checkpoint = query.get("of", "").rpartition(":")
    return loaded(site.run({"run": name}), checkpoint)


def _typed(query: Query, name: str) -> str:
    value = query.get(name, "")
    if len(value) > LONGEST:
        raise UserError(f"{name}: a text may have {LONGEST:,} characters here")
    return value


def _moved(places: int) -> str:
    if places == 0:
        return "–"
    return f"▲ {places}" if places > 0 else f"▼ {-places}"


STREAMS: Mapping[str, Any] = {"before": before, "ask": ask, "try": side, "read": read}
TABLES: Mapping[str, Any] = {"before": before_table, "ask": ask_table, "try": read_table}
