"""What is shown of runs, as plain values: the templates of the page and of `--html` draw them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect import health
from grace_rl.inspect.chart import LOOKS, Chart, Line
from grace_rl.inspect.checkpoints import token_pieces
from grace_rl.inspect.learned import Learned, learned, word_steps
from grace_rl.inspect.markup import Pieces, differences, number, shaded
from grace_rl.inspect.patterns import PATTERNS
from grace_rl.inspect.records import flat, reward_weights
from grace_rl.inspect.replays import (
    replayed_advantages,
    replayed_groups,
    replayed_totals,
    replays,
)
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import REWARD
from grace_rl.run.secrets import masked

Row = dict[str, Any]


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """How the runs went: state, scores, alarms, recipes, curves. `advantages` says when stored
    rollouts are read (it may take a while)."""
    return {
        "summaries": list(map(summary, runs)),
        "alarms": [(run.name, alarm_rows(run), len(run.metrics())) for run in runs],
        "problems": [problem for run in runs for problem in run.problems()],
        "recipe": recipe_rows(runs),
        "charts": charts(runs),
        "spread": advantage_chart(runs),
    }


def summary(run: Run) -> dict[str, Any]:
    """State of a run and its scores before and after."""
    status, recipe, metrics = run.status(), run.recipe(), run.metrics()
    step, steps = int(metrics["step"].max()) if len(metrics) else None, recipe.get("max_steps")
    of = f" of {steps}" if isinstance(steps, int) and steps > 0 else ""
    written = run.stamp()[0]
    about = {
        "state": str(status.get("status", "unknown")),
        "step": number(step) + of,
        "method": str(recipe.get("method", "–")),
        "model": str(recipe.get("model_name_or_path", "–")),
        "minutes": metrics["seconds"].max() / 60 if "seconds" in metrics else None,
        "last written": time.strftime("%d %b %H:%M:%S", time.localtime(written)),
    }
    evaluation = run.evaluation()
    columns: dict[str, str] = {}
    scores: list[Row] = []
    if len(evaluation):
        named = {f"{row['name']}, {row['rationale']}": row for row in evaluation.to_dict("records")}
        columns = {"score": "score", **{name: name for name in named}}
        for score in evaluation.columns.drop(["name", "rationale"]):
            scores.append({"score": score} | {name: row[score] for name, row in named.items()})
    return {"name": run.name, "facts": about, "scores": scores, "columns": columns}


def alarm_rows(run: Run) -> list[Row]:
    """What left its healthy range and when, and which held-out score fell."""
    return [
        {"metric": alarm.metric, "steps": _steps(alarm.steps), "reason": alarm.reason}
        for alarm in health.alarms(run.metrics(), run.evaluation())
    ]


def gaming_rows(run: Run) -> list[Row]:
    """Ways of gaming that show, with what was seen; reads all stored rollouts."""
    return [dict(alarm) for alarm in learned(run).alarms]


def recipe_rows(runs: Sequence[Run]) -> dict[str, Any]:
    """The keys of a run's recipe; of several runs those that differ, and how many do not."""
    keys = [flat(masked(run.recipe())) for run in runs]
    names = list(dict.fromkeys(name for one in keys for name in one))
    written = [{name: _yaml(one[name]) if name in one else "–" for name in names} for one in keys]
    differ = [name for name in names if len({one[name] for one in written}) > 1]
    rows = [
        {"key": name} | {str(place): one[name] for place, one in enumerate(written)}
        for name in (differ if len(runs) > 1 else names)
    ]
    columns = {"key": "key", **{str(place): run.name for place, run in enumerate(runs)}}
    return {"rows": rows, "columns": columns, "same": len(names) - len(rows), "runs": len(runs)}


def charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of each section."""
    tables = {run.name: run.metrics() for run in runs}
    names = list(dict.fromkeys(name for table in tables.values() for name in table.columns))
    made: dict[str, list[Chart]] = {}
    for section, panel, metrics in health.shown_panels(names):
        lines, fired, short = [], list[float](), short_names(metrics)
        for order, (run, logged) in enumerate(tables.items()):
            for place, metric in enumerate(metrics):
                if metric not in logged:
                    continue
                rows = logged[["step", metric]].dropna()
                label = short[metric] if len(tables) == 1 else f"{short[metric]} ({run})"
                lines.append(
                    _line(label, rows["step"], rows[metric], order, place, len(metrics), len(runs))
                )
                if panel.judged:
                    fired += list(rows["step"][rows[metric].map(panel.outside)])
        note = health.healthy(panel) if panel.judged else ""
        chart = Chart(panel.title, lines, (panel.low, panel.high), fired, note=note)
        made.setdefault(section, []).append(chart)
    return made


def advantage_chart(runs: Sequence[Run]) -> Chart | None:
    """How far advantages are spread at each stored step; None where no rollouts are stored."""
    names, lines = ("lowest", "p10", "p90", "highest"), []
    for order, run in enumerate(runs):
        spread = run.advantages()
        for place, name in enumerate(names if len(spread) else ()):
            label = name if len(runs) == 1 else f"{name} ({run.name})"
            lines.append(_line(label, spread["step"], spread[name], order, place, 4, len(runs)))
    return Chart("Spread of advantages over rollouts", lines) if lines else None


def learned_charts(run: Run, found: Learned) -> list[Chart]:
    """Patterns among the best of their group, lengths, and the words that changed most, by step."""
    steps = found.steps
    if steps.empty:
        return []
    names = list(PATTERNS)
    lines = [
        _line(name, steps["step"], steps[f"best_{name}"], 0, place, len(names), 1)
        for place, name in enumerate(names)
    ]
    words = list(found.words["word"].head(LOOKS))
    shares = word_steps(run, words)
    said = []
    for place, word in enumerate(words):
        by_step = shares[word].set_index("step")["share"].reindex(steps["step"], fill_value=0.0)
        said.append(_line(word, steps["step"], by_step, 0, place, len(words), 1))
    tokens = _line("tokens", steps["step"], steps["tokens"], 0, 0, 1, 1)
    return [
        Chart("Share of the best of their group", lines),
        Chart("Share of rollouts with a word", said),
        Chart("Tokens of a rationale", [tokens]),
    ]


def _line(
    label: str, x: pd.Series, y: pd.Series, run: int, metric: int, metrics: int, runs: int
) -> Line:
    """A curve that no other of its chart looks like: colours tell metrics apart and dashes runs;
    runs with one metric each have colours of their own too."""
    colour = run if metrics == 1 and runs > 1 else metric
    dash = run * -(-metrics // LOOKS) + metric // LOOKS
    return Line(label, list(x), list(y.astype(float)), colour, dash)


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


# -- rollouts ---------------------------------


def rollout_tokens(run: Run, rollout: Mapping[str, Any]) -> tuple[Pieces, str]:
    """A rationale, its tokens coloured by advantage; and what the colour stands for."""
    pieces = token_pieces(run, rollout["token_ids"]) or [rollout["rationale"]]
    by_token, advantage = rollout.get("token_advantages"), rollout["advantage"]
    if advantage is None or math.isnan(advantage):
        return shaded(pieces, None), "An anchor: it is scored against and never trained."
    if by_token is not None and len(by_token) == len(pieces):
        return shaded(pieces, [float(value) for value in by_token]), (
            "The colour is each token's own advantage: green is made likelier, red less likely."
        )
    return shaded(pieces, float(advantage)), (
        "One colour: the whole rationale has one advantage. It says how the rationale did in its "
        "group, not which words earned it."
    )


def scores(run: Run, rollout: Mapping[str, Any]) -> dict[str, Any]:
    """Advantage, every reward with its weight, their total and the length, by name."""
    weights = reward_weights(run.recipe())
    made = {"advantage": rollout["advantage"]}
    labels = [name.removeprefix(REWARD) for name in rollout if name.startswith(REWARD)]
    for label in labels:
        weight = weights.get(label, 1.0)
        name = label if weight == 1 else f"{label} (weight {weight:g})"
        made[name] = rollout[REWARD + label]
    made["total"] = rollout["total"]
    length = rollout["tokens"] if "tokens" in rollout else len(rollout["token_ids"])
    made["tokens"] = number(int(length)) + (", never ended" if rollout["truncated"] else "")
    return made


def step_curve(rollout: Mapping[str, Any]) -> Chart | None:
    """The score of every prefix over the rationale; None without step-wise scores."""
    values = rollout.get("step_scores")
    if values is None:
        return None
    ends = rollout.get("step_ends")
    places, name = (ends, "token") if ends is not None else (range(len(values)), "segment")
    points = dict(zip(places, values, strict=False))  # a short rationale repeats its end
    line = Line("s_k", list(points), [math.nan if v is None else v for v in points.values()])
    return Chart("Score s_k of each prefix", [line], x_name=name)


def group_cards(run: Run, step: int, group: int) -> list[Row]:
    """A group side by side, best to worst: `step`, `row`, `pieces`, `colour`, `scores`, which has
    the advantages that replays would give too."""
    rows = run.group(step, group, ["token_ids", "token_advantages"]).to_dict("records")
    replayed, cards = {}, []
    for name in replays(run):
        try:
            replayed[name] = replayed_advantages(run, name, step, group)
        except UserError:
            continue  # said by the view of replays
    for rollout in rows:
        pieces, colour = rollout_tokens(run, rollout)
        facts = scores(run, rollout)
        for name, kept in replayed.items():
            if advantages := kept.get(rollout["rationale"]):
                facts[f"advantage in replay {name}"] = advantages[0]
        cards.append({**rollout, "pieces": pieces, "colour": colour, "scores": facts})
    return cards


def history(run: Run, text: str) -> list[Row]:
    """What was written of a text: the best rollout of each stored step, and what the panel wrote
    greedily; `by` says which, `shown` what changed."""
    rows = [row | {"by": "best rollout"} for row in run.through_training(text).to_dict("records")]
    for row in run.panel(text=text).to_dict("records"):
        rows.append(row | {"by": "greedy", "row": None, "advantage": None})
    return changes(sorted(rows, key=lambda row: int(row["step"])))


def panel_rows(run: Run) -> list[Row]:
    """The panel's texts: what was written before training, and now with the changes marked."""
    if not (steps := run.panel_steps()):
        return []
    first, last = run.panel([steps[0]]), run.panel([steps[-1]])
    now = dict(zip(last["text"], last["rationale"], strict=True))
    return [
        {
            "text": row["text"],
            "role": row["role"],
            "first": row["rationale"],
            "now": differences(row["rationale"], str(now.get(row["text"], ""))),
        }
        for row in first.to_dict("records")
    ]


def side_by_side(run: Run, other: Run, limit: int) -> tuple[list[Row], int]:
    """The texts that both runs have: the best of each one's last step with it (else what its panel
    wrote last), differences marked; those that share the fewest words first, and how many there
    are."""
    ours, theirs = _last_written(run), _last_written(other)
    alike = {
        text: _alike(ours[text]["rationale"], theirs[text]["rationale"])
        for text in ours
        if text in theirs
    }
    rows = [
        {
            "text": text,
            "first": ours[text]["rationale"],
            "second": differences(ours[text]["rationale"], theirs[text]["rationale"]),
            "first_total": ours[text]["total"],
            "second_total": theirs[text]["total"],
            "kept": alike[text],
        }
        for text in sorted(alike, key=lambda text: alike[text])[:limit]
    ]
    return rows, len(alike)


def _alike(first: str, second: str) -> float:
    """The share of words that two rationales have in common.

    >>> _alike("red fox runs off", "a red fox")
    0.5
    """
    words, others = Counter(first.split()), Counter(second.split())
    return (words & others).total() / max(1, words.total(), others.total())


def replay_rows(run: Run, other: Run) -> list[Row]:
    """Both runs in each replay that is kept beside either: the mean total, and the share of pairs
    that keep their order; None where there is none, or where it cannot be read."""
    rows = []
    for name in dict.fromkeys([*replays(run), *replays(other)]):
        row: Row = {"name": name}
        for place, one in (("first", run), ("second", other)):
            try:
                totals, groups = replayed_totals(one, name), replayed_groups(one, name)
                row |= {place: totals["total"].mean(), f"{place}_kept": groups["order_kept"].mean()}
            except UserError:
                row |= {place: None, f"{place}_kept": None}
        rows.append(row)
    return rows


def changed_groups(run: Run, other: Run, replay: str | None, limit: int) -> list[Row]:
    """The groups of the texts that both runs have, each at the last step with it, those first whose
    mean total differs most.

    Args:
        run, other: The runs.
        replay: Whose totals: a replay's that is kept beside both, or of each run's own rewards.
        limit: How many.
    """
    tables = []
    for one in (run, other):
        groups = one.last_groups()
        if replay is not None:
            totals = replayed_totals(one, replay)
            groups = groups.drop(columns="total").merge(totals, on=["step", "group"])
        tables.append(groups)
    found = tables[0].merge(tables[1], on="text", suffixes=("_first", "_second"))
    found["change"] = found["total_second"] - found["total_first"]
    largest = found["change"].abs().nlargest(limit).index  # without those that have no total
    return found.loc[largest].to_dict("records")


def _last_written(run: Run) -> dict[str, Row]:
    """Text -> `rationale` and `total` of its best rollout at the last step that has it."""
    found = {
        row["text"]: {**row, "total": None}
        for row in run.panel(run.panel_steps()[-1:]).to_dict("records")
    }
    for row in run.last_best().to_dict("records"):
        found[row["text"]] = row
    return found


def changes(rows: list[Row]) -> list[Row]:
    """Rows with a `rationale`, each with `shown`: how it differs from the one before."""
    before, made = None, []
    for row in rows:
        made.append({**row, "shown": differences(before, str(row["rationale"]))})
        before = str(row["rationale"])
    return made


def soft_token_tables(run: Run) -> list[tuple[str, list[Row], dict[str, str]]]:
    """Text, rows and columns of a run's soft tokens as words, at each moment that has them."""
    by_text: dict[str, list[Row]] = {}
    for line in run.soft_tokens():
        words = {
            str(place): ", ".join(f"{word.strip()} {share:.2f}" for word, share in words)
            for place, words in enumerate(line["words"], start=1)
        }
        by_text.setdefault(line["text"], []).append({"step": line["step"]} | words)
    made = []
    for text, rows in by_text.items():
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: "step" if name == "step" else f"soft token {name}" for name in names}
        made.append((text, [dict.fromkeys(names, "") | row for row in rows], columns))
    return made


def _steps(steps: tuple[int, ...]) -> str:
    """
    >>> _steps((5, 10, 15)), _steps((1, 2, 3, 4, 5, 6, 7)), _steps(())
    ('5, 10, 15', '1 to 7, 7 times', 'after training')
    """
    if len(steps) <= 5:
        return ", ".join(map(str, steps)) or "after training"
    return f"{steps[0]} to {steps[-1]}, {len(steps)} times"


def _yaml(value: Any) -> str:
    """A value of a recipe in one line."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
