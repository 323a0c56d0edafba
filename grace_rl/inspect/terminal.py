"""Runs in the terminal: the overview, rollouts that fit a filter, groups, one rollout."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grace_rl.errors import UserError
from grace_rl.inspect import health
from grace_rl.inspect.checkpoints import soft_words, token_pieces
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.markup import number, visible
from grace_rl.inspect.neighbours import nearest_by_rationale
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD

BARS = "▁▂▃▄▅▆▇█"
LONGEST = 800  # characters of a text


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
        for problem in run.unreadable():
            console.print(_text(problem), style="bold red")
        if options.row is not None and alone is not None:
            _rollout(run, alone, options.row, console)
        elif chosen.group is not None and alone is not None:
            _group(run, alone, chosen.group, console)
        elif options.groups:
            sort = {"sort": options.sort} if options.sort else {}
            found = run.groups(chosen, descending=options.descending, limit=options.limit, **sort)
            names = ["step", "group", "role", "text", "best", "worst", "spread"]
            _print(found, names, console, f"{run.count_groups(chosen):,} groups")
        elif chosen != Filter() or options.sort:
            how = {"sort": options.sort, "descending": options.descending, "limit": options.limit}
            found = run.rollouts(chosen, **how)
            rewards = [REWARD + label for label in run.rewards]
            names = ["step", "row", "group", "role", "text", "rationale", "advantage", *rewards]
            _print(found, names, console, f"{run.count(chosen):,} rollouts")
        else:
            _overview(run, console)


def sparkline(values: Iterable[float], width: int = 40) -> str:
    """A curve in one line of text.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    known = [value for value in values if math.isfinite(value)]
    if len(known) > width:
        known = [known[i * len(known) // width] for i in range(width - 1)] + known[-1:]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in known)


def _overview(run: Run, console: Console) -> None:
    metrics, status = run.metrics(), run.status()
    step = number(int(metrics["step"].max()) if len(metrics) else None)
    console.print(Text(f"{status.get('status', 'unknown')}, step {step}"))
    curves, width = Table(box=box.SIMPLE_HEAD), 40 if console.width >= 120 else 14
    for name in ("metric", "first", "last", "", "healthy"):
        curves.add_column(name, justify="right" if name in ("first", "last") else "left")
    for _, panel, names in health.shown_panels(list(metrics.columns)):
        for name in names:
            values = pd.to_numeric(metrics[name], errors="coerce").dropna().astype(float)
            if len(values):
                limit = health.healthy(panel) if panel.judged else ""
                ends = number(values.iloc[0]), number(values.iloc[-1])
                curves.add_row(_text(name), *ends, sparkline(values, width), limit)
    console.print(curves)
    for alarm in health.alarms(metrics):
        about = (
            f"{alarm.metric}: {alarm.reason} (from step {alarm.steps[0]}, {len(alarm.steps)} times)"
        )
        console.print(_text(about), style="bold red")
    evaluation = run.evaluation()
    if len(evaluation):
        _print(evaluation, list(evaluation.columns), console, "scores")
    for line in soft_words(run):
        steps = (", ".join(word for word, _ in s["words"][:3]) for s in line["steps"])
        console.print(_text(f"step {line['step']}: {line['text']} -> {' | '.join(steps)}"))


def _group(run: Run, step: int, group: int, console: Console) -> None:
    rows = run.group(step, group)
    console.print(_text(f"step {step}, {rows['role'].iloc[0]}: {rows['text'].iloc[0]}"))
    rewards = [REWARD + label for label in run.rewards]
    _print(rows, ["row", "rationale", "tokens", "advantage", *rewards], console)


def _rollout(run: Run, step: int, row: int, console: Console) -> None:
    rollout = run.rollout(step, row)
    console.print(_text(f"step {step}, {rollout['role']}: {rollout['text']}"))
    console.print(_coloured(run, rollout))
    values = {"advantage": rollout["advantage"]}
    values |= {n.removeprefix(REWARD): v for n, v in rollout.items() if n.startswith(REWARD)}
    about = ", ".join(f"{name} {number(value)}" for name, value in values.items())
    console.print(_text(about + (", never ended" if rollout["truncated"] else "")))
    if rollout["step_scores"] is not None:
        scores = " ".join(number(value) for value in rollout["step_scores"])
        console.print(_text(f"s_k: {scores}"))
    if rollout["embedding"] is not None:
        near = nearest_by_rationale(run, step, row).head(5)
        _print(near, ["rank", "cosine", "role", "text"], console, "nearest texts of the step")


def _coloured(run: Run, rollout: Mapping[str, Any]) -> Text:
    """The rationale, tokens that are made likelier in green, less likely in red."""
    pieces = token_pieces(run, rollout["token_ids"]) or [rollout["rationale"]]
    each = rollout["token_advantages"]
    if each is None or len(each) != len(pieces):
        each = [rollout["advantage"]] * len(pieces)
    made = Text(overflow="fold")
    for piece, advantage in zip(pieces, each, strict=True):
        style = "" if advantage is None else "green" if advantage >= 0 else "red"
        made.append(visible(piece), style=style)
    return made


def _print(rows: pd.DataFrame, names: list[str], console: Console, title: str = "") -> None:
    made = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for name in names:
        made.add_column(_text(name.removeprefix(REWARD)), overflow="fold")
    for record in rows.to_dict("records"):
        made.add_row(*(_cell(record[name]) for name in names))
    console.print(made)


def _cell(value: Any) -> Text:
    return _text(value) if isinstance(value, str) else Text(number(value))


def _text(foreign: str) -> Text:
    return Text(visible(foreign, LONGEST), overflow="fold")
