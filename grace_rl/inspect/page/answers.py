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
from grace_rl.inspect.beside import against_siblings
from grace_rl.inspect.checkpoints import (
    MODEL,
    Checkpoint,
    Seen,
    checkpoint_after,
    checkpoints,
    loaded,
)
from grace_rl.inspect.markup import address, earned, render
from grace_rl.inspect.neighbours import pool_of_step, ranked
from grace_rl.inspect.page.listing import whole
from grace_rl.inspect.page.site import NEAREST, Page, Query, Site, nearest, own_ranks
from grace_rl.inspect.views import changes, gaming_rows
from grace_rl.rollout.store import REWARD

LONGEST = 20_000  # characters of a text that is typed in
SAME = 1 - 1e-6  # cosine from which on two vectors are one
Event = dict[str, Any]


# -- a run ---------------------------------


def gaming(site: Site, query: Query) -> Iterator[Event]:
    """Ways of gaming that show in a run; all its rollouts are read for it."""
    run = site.run(query)
    yield {"html": render("gaming", name=run.name, rows=gaming_rows(run))}


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
    name = checkpoint_after(run, step)
    pool, _ = pool_of_step(run, step)
    vectors = loaded(run, name).see_plain([*pool["text"], rollout["text"]])
    pool = pool.drop(columns="rationale")  # none takes part in it
    return name, ranked(pool, vectors[:-1] @ vectors[-1], rollout["text"], rollout["example"])


def credit(site: Site, query: Query) -> Iterator[Event]:
    """What each word of a rollout earned, or of a group's, as it comes."""
    from grace_rl.inspect.credit import measurable_rewards  # and with it torch

    yield {"label": "measuring words", "share": None}
    for share, found in _credit(site, query):
        yield {"label": "measuring words", "share": share}
        if found is None:
            continue
        table, how = found
        for row, part in table.groupby("row"):
            yield {"html": render("credit", **credit_values(part, table)), "into": f"credit-{row}"}
        missing = measurable_rewards(site.run(query))[1]
        file = f"{site.run(query).name}-{whole(query, 'step')}-credit"
        about = {"how": how, "missing": missing, "csv": address("/csv/credit", **query)}
        yield {"html": render("measured", **about, file=file), "into": "answer"}


def credit_table(site: Site, query: Query) -> pd.DataFrame:
    """The whole table of `credit`."""
    found = [found for _, found in _credit(site, query) if found is not None]
    return found[-1][0]


def _credit(site: Site, query: Query) -> Iterator[tuple[float, Any]]:
    from grace_rl.inspect.credit import measured

    run, step = site.run(query), whole(query, "step")
    rows = run.group(step, whole(query, "group"))["row"] if "row" not in query else []
    chosen = [int(row) for row in rows] or [whole(query, "row")]
    siblings = run.rollout(step, chosen[0])["group"]
    for share, found in measured(run, step, [int(r) for r in run.group(step, siblings)["row"]]):
        if found is None:
            yield share, None
        else:
            table = against_siblings(found[0])
            yield share, (table[table["row"].isin(chosen)], found[1])


def credit_values(part: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """A rationale's words for a template: coloured on the scale of a table, and as rows."""
    names = [name for name in part.columns if part[name].dtype.kind == "f"]
    shown = part.rename(columns={name: name.removeprefix(REWARD) for name in names})
    rows = shown.to_dict("records")
    heads = ["word", *(name.removeprefix(REWARD) for name in names)]
    pieces = earned(" ".join(part["word"]), rows, float(table["credit"].abs().max()))
    return {"pieces": pieces, "rows": rows, "columns": {name: name for name in heads}}


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
    yield from _trial_credit(checkpoint, query, found)
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


def _trial_credit(checkpoint: Checkpoint, query: Query, found: pd.DataFrame) -> Iterator[Event]:
    """What each word does for the cosine to the other text (else the nearest), and against the
    nearest that is read differently; in words why, where that cannot be said."""
    from grace_rl.inspect.credit import two_cosines

    if not checkpoint.writes:  # the part of the rationale says it
        return
    text = _typed(query, "text")
    rationale = query.get("rationale", checkpoint.see([text])[0].rationale)
    named = _compared(checkpoint, found, _typed(query, "with").strip())
    values: dict[str, Any] = {"blank": not rationale.strip(), "named": named}
    if named and rationale.strip():
        seen = checkpoint.see(list(named.values()))
        vectors = {name: one.vector for name, one in zip(named, seen, strict=True)}
        table = two_cosines(checkpoint, text, rationale, vectors)
        values |= credit_values(table, table)
    yield {"html": render("trial_credit", **values), "into": "credit"}


def _compared(checkpoint: Checkpoint, found: pd.DataFrame, other: str) -> dict[str, str]:
    """`positive`, the other text or else the nearest, and `negative`, the nearest whose vector is
    not that of the positive; nothing where there are no two such texts."""
    names = list(found["text"])
    if not (positive := other or next(iter(names), "")):
        return {}
    vector = checkpoint.see([positive])[0].vector
    for name in names:
        if name != positive and checkpoint.see([name])[0].vector @ vector < SAME:
            return {"positive": positive, "negative": name}
    return {}


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
        return checkpoint.read([_typed(query, "rationale")], [text])[0]
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


STREAMS: Mapping[str, Any] = {
    "before": before,
    "ask": ask,
    "try": side,
    "read": read,
    "credit": credit,
    "gaming": gaming,
}
TABLES: Mapping[str, Any] = {
    "before": before_table,
    "ask": ask_table,
    "try": read_table,
    "credit": credit_table,
}
