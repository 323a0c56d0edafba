"""Parts of the page that are HTML alone, so that the file of `--html` has them too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from grace_rl.inspect import health
from grace_rl.inspect.chart import Line, legend, line_chart
from grace_rl.inspect.checkpoints import soft_words, token_pieces
from grace_rl.inspect.markup import facts, number, plain, table, text, tokens
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD


def summary(run: Run) -> str:
    """State of a run and its scores before and after, as HTML."""
    status, recipe, metrics = run.status(), run.recipe(), run.metrics()
    step = number(int(metrics["step"].max()) if len(metrics) else None)
    about = {
        "state": text(status.get("status", "unknown")),
        "step": f"{step} of {number(recipe.get('max_steps'))}"
        if recipe.get("max_steps", -1) > 0
        else step,
        "method": text(recipe.get("method", "–")),
        "model": text(recipe.get("model_name_or_path", "–")),
        "minutes": number(float(metrics["seconds"].max()) / 60) if "seconds" in metrics else "–",
    }
    evaluation = run.evaluation()
    scores = ""
    if len(evaluation):
        names = [f"{row['name']}, {row['rationale']}" for row in evaluation.to_dict("records")]
        turned = evaluation.drop(columns=["name", "rationale"]).T
        turned.columns = pd.Index(names)
        columns = {"score": "score", **{name: name for name in names}}
        shown = table(turned.rename_axis("score").reset_index(), columns, caption="scores")
        scores = f'<div class="wide">{shown}</div>'
    return f'<section class="card"><h2>{plain(run.name)}</h2>{facts(about)}{scores}</section>'


def alarm_list(run: Run) -> str:
    """What left its healthy range and when, as HTML."""
    found = health.alarms(run.metrics())
    if not found:
        return f'<p class="quiet">{plain(run.name)}: nothing left its healthy range</p>'
    rows = [
        {"metric": alarm.metric, "steps": _steps(alarm.steps), "reason": alarm.reason}
        for alarm in found
    ]
    columns = {"metric": "alarm", "steps": "at steps", "reason": "what it may mean"}
    return (
        f'<section class="card alarms"><h3>Alarms of {plain(run.name)}</h3>'
        f"{table(rows, columns, caption='alarms')}</section>"
    )


def charts(runs: list[Run]) -> str:
    """The charts of all sections, as HTML."""
    tables = {run.name: run.metrics() for run in runs}
    names = list(dict.fromkeys(name for t in tables.values() for name in t.columns))
    made: dict[str, list[str]] = {}
    for section, panel, metrics in health.shown_panels(names):
        lines, fired = [], []
        short = short_names(metrics)
        for order, (run, logged) in enumerate(tables.items()):
            for colour, metric in enumerate(metrics):
                if metric not in logged:
                    continue
                rows = logged[["step", metric]].dropna()
                values = pd.to_numeric(rows[metric], errors="coerce").astype(float)
                label = short[metric] if len(tables) == 1 else f"{short[metric]} ({run})"
                # Two runs share the colours of metrics, and dashes tell them apart.
                shared = len(metrics) > 1 and len(tables) == 2
                tint = colour if shared else order * len(metrics) + colour
                lines.append(Line(label, list(rows["step"]), list(values), tint, dashed=order > 0))
                if panel.judged:
                    fired += [
                        s for s, v in zip(rows["step"], values, strict=True) if panel.outside(v)
                    ]
        chart = line_chart(panel.title, lines, (panel.low, panel.high), fired)
        limit = f'<p class="quiet small">{plain(health.healthy(panel))}</p>' if panel.judged else ""
        head = f"<h3>{plain(panel.title)}</h3>"
        figure = f'<figure class="card">{head}{chart}{legend(lines)}{limit}</figure>'
        made.setdefault(section, []).append(figure)
    if not made:
        return '<p class="quiet">no metrics are logged yet</p>'
    return "".join(
        f'<h2>{section}</h2><div class="cards">{"".join(figures)}</div>'
        for section, figures in made.items()
    )


def _steps(steps: tuple[int, ...]) -> str:
    """
    >>> _steps((5, 10, 15)), _steps((1, 2, 3, 4, 5, 6, 7))
    ('5, 10, 15', '1 to 7, 7 times')
    """
    if len(steps) <= 5:
        return ", ".join(map(str, steps))
    return f"{steps[0]} to {steps[-1]}, {len(steps)} times"


def short_names(metrics: list[str]) -> dict[str, str]:
    """Names without the folders that all of them share.

    >>> short_names(["time/rollout", "time/train"])
    {'time/rollout': 'rollout', 'time/train': 'train'}
    >>> short_names(["rewards/a/mean", "rewards/b/mean"])
    {'rewards/a/mean': 'a', 'rewards/b/mean': 'b'}
    """
    if len(metrics) == 1:
        return {name: name for name in metrics}
    parts = [name.split("/") for name in metrics]
    while all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    while all(len(part) > 1 and part[-1] == parts[0][-1] for part in parts):
        parts = [part[:-1] for part in parts]
    return {name: "/".join(part) for name, part in zip(metrics, parts, strict=True)}


def advantage_chart(runs: list[Run]) -> str:
    """How far advantages are spread at each stored step, as HTML."""
    lines = []
    for order, run in enumerate(runs):
        spread = run.advantages()
        if spread.empty:
            continue
        for colour, name in enumerate(("lowest", "p10", "p90", "highest")):
            label = name if len(runs) == 1 else f"{name} ({run.name})"
            values = spread[name].astype(float)
            lines.append(Line(label, list(spread["step"]), list(values), colour, order > 0))
    title = "Spread of advantages over rollouts"
    chart = line_chart(title, lines)
    return f'<figure class="card"><h3>{title}</h3>{chart}{legend(lines)}</figure>'


def rollout_tokens(run: Run, rollout: Mapping[str, Any]) -> str:
    """A rationale, its tokens coloured by advantage, as HTML."""
    ids, by_token = rollout["token_ids"], rollout.get("token_advantages")
    pieces = token_pieces(run, ids)
    advantage = rollout["advantage"]
    if advantage is not None and math.isnan(advantage):
        advantage = None
    if pieces is None:  # no tokenizer yet: the whole as one
        return tokens([rollout["rationale"]], advantage)
    if by_token is not None and len(by_token) == len(pieces):
        return tokens(pieces, [float(value) for value in by_token])
    return tokens(pieces, advantage)


def scores(run: Run, rollout: Mapping[str, Any]) -> dict[str, str]:
    """Advantage, every reward and the length, by name, as HTML."""
    made = {"advantage": number(rollout["advantage"])}
    for name in [name for name in rollout if name.startswith(REWARD)]:
        made[name.removeprefix(REWARD)] = number(rollout[name])
    length = rollout["tokens"] if "tokens" in rollout else len(rollout["token_ids"])
    made["tokens"] = number(int(length)) + (", never ended" if rollout["truncated"] else "")
    return made


def step_curve(rollout: Mapping[str, Any]) -> str:
    """The score of every prefix over the rationale, as HTML; nothing without step-wise scores."""
    values = rollout.get("step_scores")
    if values is None:
        return ""
    ends = rollout.get("step_ends")
    places, name = (ends, "token") if ends is not None else (range(len(values)), "segment")
    points = dict(zip(places, values, strict=True))  # a short rationale repeats its end
    line = Line("s_k", list(points), [math.nan if v is None else v for v in points.values()])
    title = "Score s_k of each prefix"
    chart = line_chart(title, [line], x_name=name)
    return f'<figure class="card"><h3>{title}</h3>{chart}</figure>'


def group_cards(
    run: Run, group: pd.DataFrame, address: Callable[[int, int], str] | None = None
) -> str:
    """A group side by side, best to worst, as HTML.

    Args:
        run: The run.
        group: Rollouts with `token_ids` and `token_advantages`, best first.
        address: Where a rollout is shown by itself, from step and row.
    """
    cards = []
    for place, rollout in enumerate(group.to_dict("records"), start=1):
        title = f"{place} of {len(group)}"
        if address is not None:
            there = plain(address(int(rollout["step"]), int(rollout["row"])))
            title = f'<a href="{there}">{title}</a>'
        cards.append(
            f'<article class="card"><h3>{title}</h3>{rollout_tokens(run, rollout)}'
            f"{facts(scores(run, rollout))}</article>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def soft_token_words(run: Run) -> str:
    """The words of a refinement run's soft tokens, at each moment that has them, as HTML."""
    lines = soft_words(run)
    if not lines:
        return ""
    parts = []
    for content in dict.fromkeys(line["text"] for line in lines):
        rows = [
            {"step": line["step"]}
            | {f"{k}": _words(step["words"]) for k, step in enumerate(line["steps"], start=1)}
            for line in lines
            if line["text"] == content
        ]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: "step" if name == "step" else f"soft token {name}" for name in names}
        parts.append(f'<h3>{text(content)}</h3><div class="wide">{table(rows, columns)}</div>')
    title = f"<h2>Soft tokens of {plain(run.name)}, as words</h2>"
    return f"{title}{''.join(parts)}"


def _words(words: list[Any]) -> str:
    return ", ".join(f"{word.strip()} {share:.2f}" for word, share in words)
