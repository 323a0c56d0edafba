"""Runs in the terminal: the overview, rollouts that fit a filter, groups, one rollout."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import track
from rich.table import Table
from rich.text import Text

from grace_rl.errors import UserError
from grace_rl.inspect import health, views
from grace_rl.inspect.beside import against_siblings, keep_credit, kept_credit
from grace_rl.inspect.csv_file import csv_text
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import Pieces, earned, number, visible
from grace_rl.inspect.neighbours import nearest_by_rationale
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD
from grace_rl.run.files import write_text

if TYPE_CHECKING:
    from grace_rl.reward.loading import LoadedReward

BARS = "▁▂▃▄▅▆▇█"
LONGEST = 800  # characters of a text
TEXTS = ("text", "rationale", "best", "worst", "reason")
NARROW = 100
WIDE = 130  # columns of a terminal from which texts stand in a table's cells


def show(
    runs: Sequence[Run], chosen: Filter, options: argparse.Namespace, console: Console
) -> None:
    """Print what the options ask for: one rollout, a group, a list, or else the overview.

    Args:
        runs: One after the other.
        chosen: Which rollouts.
        options: `row`, `groups`, `sort`, `descending`, `limit`.
        console: Where to.

    Raises:
        UserError: There is no such step, group or rollout.
    """
    alone = chosen.step if isinstance(chosen.step, int) else None
    if alone is None and (options.row is not None or chosen.group is not None):
        raise UserError("--row and --group need one --step")
    for run in runs:
        console.rule(Text(visible(run.name)))
        for problem in run.problems():
            console.print(_text(problem), style="bold red")
        if options.row is not None and alone is not None:
            _rollout(run, alone, options.row, console)
        elif chosen.group is not None and alone is not None:
            _group(run, alone, chosen.group, console)
        elif options.groups:
            sort = {"sort": options.sort} if options.sort else {}
            found = run.groups(chosen, descending=options.descending, limit=options.limit, **sort)
            names = ["step", "group", "role", "spread", "text", "best", "worst"]
            _print(found, names, console, f"{run.count_groups(chosen):,} groups")
        elif chosen != Filter() or options.sort:
            how = {"sort": options.sort, "descending": options.descending, "limit": options.limit}
            found = run.rollouts(chosen, **how)
            rewards = [REWARD + label for label in run.rewards]
            names = [
                "step",
                "row",
                "group",
                "role",
                "advantage",
                "total",
                *rewards,
                "text",
                "rationale",
            ]
            _print(found, names, console, f"{run.count(chosen):,} rollouts")
        else:
            _overview(run, console)
    if len(runs) > 1 and chosen == Filter() and not options.groups:
        recipe = views.recipe_rows(runs)
        rows = [{heading: row[name] for name, heading in recipe["columns"].items()}
                for row in recipe["rows"]]  # fmt: skip
        console.rule("what differs between the recipes")
        _print(pd.DataFrame(rows), list(recipe["columns"].values()), console)


def show_credit(
    run: Run,
    chosen: Filter,
    rewards: Sequence[LoadedReward],
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Measure which words earned it in the groups of one step, keep it beside the run, print it.

    Args:
        run: Whose.
        chosen: `step` (the last stored one if it has none), `group` and the rest say which.
        rewards: What is measured besides the cosines.
        options: `row`, `limit`, and `csv`, a file for all numbers.
        console: Where to.

    Raises:
        UserError: There are no such rollouts, or no checkpoint reads rationales.
    """
    from grace_rl.inspect.credit import StepCredit, said  # and with them torch

    step = run.steps()[-1] if chosen.step is None and run.steps() else chosen.step
    if not isinstance(step, int):
        raise UserError("--credit needs one --step whose rollouts are stored")
    found = run.rollouts(replace(chosen, step=step), sort="total", descending=True)
    found = found[found["advantage"].notna() & (found["rationale"].str.strip() != "")]
    if options.row is not None:
        found = found[found["row"] == options.row]
    if found.empty:
        raise UserError(f"{run.path}: step {step} has no such rollout with words")
    whole = run.rollouts(step=step, columns=["row", "group", "advantage"])
    rows = whole[whole["group"].isin(set(found["group"])) & whole["advantage"].notna()]["row"]
    credit = StepCredit(run, step, rewards)
    parts = [
        part
        for row in track(list(map(int, rows)), "measuring words", console=console)
        for part in credit.measure([row])
    ]
    table = against_siblings(pd.concat(parts))
    kept = keep_credit(run, step, table, said(credit))
    if options.csv is not None:
        write_text(options.csv, csv_text(table))
    largest = float(table["credit"].abs().max())
    alone = options.row is not None or len(found) == 1
    for rollout in found.head(options.limit).to_dict("records"):
        _earned(rollout, table[table["row"] == rollout["row"]], largest, alone, console)
    count = f"{table['row'].nunique():,} rollouts, {len(table):,} words"
    console.print(_text(f"{count}, {said(credit)}; kept in {kept}"))


def _earned(
    rollout: Mapping[str, Any], words: pd.DataFrame, largest: float, alone: bool, console: Console
) -> None:
    """A rollout's words in their colours; below it what each earned, all numbers if it is alone."""
    about = _text(f"row {rollout['row']}, {rollout['role']}: {rollout['text']}")
    console.print(about, style="bold")
    scores = (f"{name} {_plain(rollout[name])}" for name in ("total", "advantage"))
    console.print(_text(", ".join(scores)))
    console.print(_coloured(earned(rollout["rationale"], words.to_dict("records"), largest)))
    if alone:
        numbers = [name for name in words.columns if words[name].dtype.kind == "f"]
        _print(words, ["word", *numbers], console)
        return
    best = words.sort_values("credit", ascending=False)
    each = (f"{word} {c:+.3f}" for word, c in zip(best["word"], best["credit"], strict=True))
    console.print(_text("  " + ", ".join(each)), style="dim")


def _coloured(pieces: Pieces) -> Text:
    """Pieces on grounds of green and red, as letters of these colours."""
    made = Text(overflow="fold")
    for kind, _, piece in pieces:
        style = "green" if kind.startswith("up") else "red" if kind.startswith("down") else ""
        deep = " bold" if kind[-1:] in "45" and kind else ""
        made.append(visible(piece), style=style + deep if style else "")
    return made


def sparkline(values: Iterable[float], width: int = 40) -> str:
    """A curve in one line of text.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    known = [value for value in values if abs(value) < float("inf")]
    if len(known) > width:
        known = [known[i * len(known) // width] for i in range(width - 1)] + known[-1:]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in known)


def _overview(run: Run, console: Console) -> None:
    metrics = run.metrics()
    about = views.summary(run)
    facts = ", ".join(f"{name} {_plain(value)}" for name, value in about["facts"].items())
    console.print(_text(facts))
    width = 40 if console.width >= WIDE else 14
    curves = []
    for _, panel, names in health.shown_panels(list(metrics.columns)):
        for name in names:
            values = metrics[name].dropna()
            if len(values):
                curves.append(
                    {
                        "metric": name,
                        "first": values.iloc[0],
                        "last": values.iloc[-1],
                        "curve": sparkline(values, width),
                        "healthy": health.healthy(panel) if panel.judged else "",
                    }
                )
    names = ["metric", "first", "last", "curve", "healthy"]
    shown = names if console.width >= NARROW else names[:-1]  # alarms say it too
    console.print(_table(pd.DataFrame(curves, columns=names), shown))
    for alarm in views.alarm_rows(run):
        line = f"{alarm['metric']}: {alarm['reason']} ({alarm['steps']})"
        console.print(_text(line), style="bold red")
    for alarm in views.gaming_rows(run):
        console.print(_text(f"{alarm['pattern']}: {alarm['reason']}"), style="bold red")
    if about["scores"]:
        console.print(_table(pd.DataFrame(about["scores"]), list(about["columns"]), "scores"))
    for soft in run.soft_tokens():
        steps = (", ".join(word for word, _ in words[:3]) for words in soft["words"])
        console.print(_text(f"step {soft['step']}: {soft['text']} -> {' | '.join(steps)}"))


def _group(run: Run, step: int, group: int, console: Console) -> None:
    cards = views.group_cards(run, step, group)
    console.print(_text(f"step {step}, {cards[0]['role']}: {cards[0]['text']}"))
    rows = [
        {"row": card["row"], **card["scores"], "rationale": card["rationale"]} for card in cards
    ]
    _print(pd.DataFrame(rows), list(rows[0]), console)


def _rollout(run: Run, step: int, row: int, console: Console) -> None:
    rollout = run.rollout(step, row)
    console.print(_text(f"step {step}, {rollout['role']}: {rollout['text']}"))
    pieces, colour = views.rollout_tokens(run, rollout)
    made = _coloured(pieces)
    console.print(made if made.plain.strip() else Text("(empty)"))
    console.print(_text(colour), style="dim")
    values = views.scores(run, rollout).items()
    console.print(_text(", ".join(f"{name} {_plain(value)}" for name, value in values)))
    kept = kept_credit(run, step)
    if kept is not None and len(words := kept[0][kept[0]["row"] == row]):
        largest = float(kept[0]["credit"].abs().max())
        console.print(_text("which words earned it:"))
        console.print(_coloured(earned(rollout["rationale"], words.to_dict("records"), largest)))
    if rollout["step_scores"] is not None:
        scores = " ".join(number(value) for value in rollout["step_scores"])
        console.print(_text(f"s_k: {scores}"))
    if rollout["embedding"] is not None:
        near = nearest_by_rationale(run, step, row).head(5)
        names = ["rank", "cosine", "role", "text", "rationale"]
        _print(near, names, console, "nearest texts of the step")


def _print(rows: pd.DataFrame, names: list[str], console: Console, title: str = "") -> None:
    """A table; in a narrow terminal a line of numbers for each row, and its texts below."""
    texts = [name for name in names if name in TEXTS]
    if console.width >= WIDE or not texts:
        console.print(_table(rows, names, title))
        return
    if title:
        console.print(_text(title))
    for row in rows.to_dict("records"):
        short = [
            f"{name.removeprefix(REWARD)} {_plain(row[name])}"
            for name in names
            if name not in texts
        ]
        console.print(_text(" · ".join(short)), style="bold")
        for name in texts:
            console.print(Padding(_text(f"{name}: {row[name].strip() or '(empty)'}"), (0, 0, 0, 2)))


def _table(rows: pd.DataFrame, names: list[str], title: str = "") -> Table:
    """Texts fold; names and numbers stay whole as long as the terminal is wide enough."""
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for name in names:
        whole = name in ("step", "row", "group", "metric", "first", "last", "rank")
        heading = _text(name.removeprefix(REWARD))
        made.add_column(heading, overflow="fold", ratio=1 if name in TEXTS else None, no_wrap=whole)
    for record in rows.to_dict("records"):
        made.add_row(*(_text(_plain(record[name])) for name in names))
    return made


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else number(value)


def _text(foreign: str) -> Text:
    return Text(visible(foreign, LONGEST), overflow="fold")
