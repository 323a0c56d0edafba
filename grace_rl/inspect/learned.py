"""What a run learned: its words and patterns by step, whether they pay, and which of them game.

Advantages are compared inside of groups that have rollouts with and without a word or pattern:
"pays" is said of what siblings of the same text did not do. The first and the last fifth of the
stored steps stand for before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pandas as pd

from grace_rl.inspect import patterns
from grace_rl.inspect.health import held_out
from grace_rl.inspect.patterns import PATTERNS
from grace_rl.inspect.run import Run

FIFTH = 0.2
WORDS = 40  # that are shown
MANY = {"empty": 0.05, "endless": 0.2, "repetition": 0.08, "copy": 0.15, "same": 0.2}
"""From which share of the best of their groups on a pattern is an alarm, if it grew by half."""
FALSE = 0.1  # by how much the share of unsupported words grows where they pay
PAYS = 0.15  # from which correlation with the advantage on, inside of groups
FILLER = 0.25  # share of rollouts with a word that they have whatever the text
DEPENDS = 0.1  # up to which share of the variance of its use between texts a word ignores them
SHORTER = 0.6  # of the length at first
ENOUGH = 3  # stored steps


@dataclass(frozen=True)
class Learned:
    """What a run learned.

    Attributes:
        steps: A row for each stored step: `step rollouts tokens odd` (`odd`: the mean share of
            unsupported words), the share of rollouts with each of `PATTERNS`, and
            `best_<pattern>`, that of the best of their group.
        patterns: A row for each pattern: `pattern first last best` (shares at first, at last, of
            the best of their group at last), `with` and `without` (mean advantages).
        words: A row for each word: `word share first last with without difference depends`, those
            that most became of first. `depends`, 0 to 1, is how far its use depends on the text.
        alarms: `pattern` and `reason` of each way of gaming that shows.
    """

    steps: pd.DataFrame
    patterns: pd.DataFrame
    words: pd.DataFrame
    alarms: list[dict[str, str]]


def learned(run: Run) -> Learned:
    """Read the whole run; kept in memory until it writes more."""
    return _learned(run, run.stamp())


@lru_cache(maxsize=8)
def _learned(run: Run, stamp: tuple[float, int]) -> Learned:
    steps = run.pattern_table(patterns.BY_STEP)
    paid = run.pattern_table(patterns.PAID).set_index("pattern")
    count = max(1, round(FIFTH * len(steps)))
    first, last = steps.head(count), steps.tail(count)
    rows = [
        {
            "pattern": name,
            "first": _mean(first, name),
            "last": _mean(last, name),
            "best": _mean(last, f"best_{name}"),
            "with": float(paid["with"][name]),
            "without": float(paid["without"][name]),
        }
        for name in (PATTERNS if len(steps) else ())
    ]
    table = pd.DataFrame(rows, columns=["pattern", "first", "last", "best", "with", "without"])
    words = pd.DataFrame()
    if len(steps):
        early, late = int(first["step"].iloc[-1]), int(last["step"].iloc[0])
        words = _words(run.pattern_table(patterns.WORDS, [early, late]))
    return Learned(steps, table, words, _alarms(run, steps, first, last, table, words))


def _words(found: pd.DataFrame) -> pd.DataFrame:
    """Words with what follows from their moments, those of the largest change first."""
    variance = found["rate"] * (1 - found["rate"])
    between = found["squares"] - found["rate"] ** 2
    by_chance = variance * found["noise"] / found["rate"]  # if each rollout drew it by itself
    share = (between - by_chance) / (variance - by_chance)
    found = found.assign(
        difference=found["with"] - found["without"],
        depends=share.clip(0, 1).where(variance > 1e-6, 0.0).fillna(1.0),
        change=found["last"] - found["first"],
    )
    order = found["change"].abs().sort_values(ascending=False, kind="stable").index
    return found.loc[order].reset_index(drop=True)


def word_steps(run: Run, words: list[str]) -> dict[str, pd.DataFrame]:
    """`step` and `share` of each of these words."""
    found = run.pattern_table(patterns.WORD_STEPS, [words])
    return {str(word): part for word, part in found.groupby("word")}


def _alarms(
    run: Run,
    steps: pd.DataFrame,
    first: pd.DataFrame,
    last: pd.DataFrame,
    table: pd.DataFrame,
    words: pd.DataFrame,
) -> list[dict[str, str]]:
    if len(steps) < ENOUGH:
        return []
    found, rows = [], table.set_index("pattern").to_dict("index")
    for name, many in MANY.items():
        row = rows[name]
        if row["best"] >= many and row["best"] >= 1.5 * row["first"]:
            since = _since(steps, name, many)
            what = PATTERNS[name]
            if name == "repetition":
                doubled = run.pattern_table(patterns.DOUBLED, [since])
                what = repr(doubled["pair"][0]) if len(doubled) else what
            reason = f"{what}, in {row['best']:.0%} of the best of their group since step {since}"
            found.append({"pattern": name, "reason": f"{reason} (at first {row['first']:.0%})"})
    before, after = _mean(first, "odd"), _mean(last, "odd")
    pays = float(run.pattern_table(patterns.ODD_PAYS, [int(last["step"].iloc[0])])["pays"][0])
    if after >= before + FALSE and pays >= PAYS:
        reason = (
            f"{after:.0%} of the words are of other texts and neither in their own text nor with "
            f"most siblings (at first {before:.0%}), and they pay: correlation with the advantage "
            f"{pays:+.2f}"
        )
        found.append({"pattern": "unsupported", "reason": reason})
    if rows["same"]["best"] < MANY["same"]:  # else every word is written whatever the text
        found += _filler(words)
    return found + _shorter(run, steps)


def _filler(words: pd.DataFrame) -> list[dict[str, str]]:
    """Words that more and more rollouts have, whatever the text says."""
    if words.empty:
        return []
    grown = (words["last"] >= FILLER) & (words["last"] >= words["first"] + FILLER / 2)
    chosen = words[grown & (words["in_text"].fillna(0) < 0.5)]
    chosen = chosen[chosen["depends"] < DEPENDS]
    if chosen.empty:
        return []
    named = ", ".join(repr(word) for word in chosen["word"].head(5))
    most = chosen.iloc[0]
    reason = (
        f"{named}: whatever the text, in {most['last']:.0%} of rollouts (at first "
        f"{most['first']:.0%})"
    )
    return [{"pattern": "filler", "reason": reason}]


def _shorter(run: Run, steps: pd.DataFrame) -> list[dict[str, str]]:
    """Lengths that fall all the way, while a held-out score falls."""
    tenth = max(1, len(steps) // 10)
    means = [float(steps["tokens"][i : i + tenth].mean()) for i in range(0, len(steps), tenth)]
    falls = sum(b < a for a, b in zip(means, means[1:], strict=False))
    worse = held_out(run.evaluation())
    if not worse or falls < 0.7 * (len(means) - 1) or means[-1] > SHORTER * means[0]:
        return []
    names = ", ".join(alarm.metric for alarm in worse)
    reason = f"shorter all the way, {means[0]:.1f} to {means[-1]:.1f} tokens, and {names} falls"
    return [{"pattern": "shorter", "reason": reason}]


def _since(steps: pd.DataFrame, name: str, many: float) -> int:
    """The step from which on the best of their group show a pattern so often."""
    below = steps["step"][steps[f"best_{name}"] < many]
    after = steps["step"][steps["step"] > (below.max() if len(below) else -1)]
    return int(after.min() if len(after) else steps["step"].iloc[-1])


def _mean(steps: pd.DataFrame, name: str) -> float:
    return float((steps[name] * steps["rollouts"]).sum() / max(1, steps["rollouts"].sum()))
