"""Which metrics to look at, what is healthy, and where a run was not.

The ranges are in panels.yaml: a value outside is a reason to look at rationales, not proof that
something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import yaml

ALARM = "alarms/"
WORSE = 0.05  # how much a held-out score may fall


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: What it shows.
        metrics: Their names, with `*`.
        low, high: The healthy range; None is no limit.
        advice: What a value outside may mean.
    """

    title: str
    metrics: list[str]
    low: float | None = None
    high: float | None = None
    advice: str = ""

    @property
    def judged(self) -> bool:
        return self.low is not None or self.high is not None

    def outside(self, value: float) -> bool:
        if math.isnan(value):
            return False
        below = self.low is not None and value < self.low
        return below or (self.high is not None and value > self.high)

    def among(self, names: list[str]) -> list[str]:
        """Those of the names that belong here."""
        return [name for name in names if any(fnmatchcase(name, known) for known in self.metrics)]


@dataclass(frozen=True)
class Alarm:
    """A metric outside its healthy range, or an alarm that training raised, at these steps; a score
    on held-out texts has none."""

    metric: str
    steps: tuple[int, ...]
    reason: str


def _panels() -> dict[str, list[Panel]]:
    text = (Path(__file__).parent / "panels.yaml").read_text(encoding="utf-8")
    return {name: [Panel(**panel) for panel in some] for name, some in yaml.safe_load(text).items()}


PANELS = _panels()


def shown_panels(names: list[str]) -> Iterator[tuple[str, Panel, list[str]]]:
    """Section, panel and its metrics, for the panels that have any."""
    for section, panels in PANELS.items():
        for panel in panels:
            if there := panel.among(names):
                yield section, panel, there


def alarms(metrics: pd.DataFrame, evaluation: pd.DataFrame | None = None) -> list[Alarm]:
    """What training raised, what held-out texts lost, then what left its healthy range.

    >>> logged = {"step": [1, 2], "entropy": [0.5, 0.01], "alarms/stale_engine": [0, 1]}
    >>> table = pd.DataFrame(logged)
    >>> [(alarm.metric, alarm.steps) for alarm in alarms(table)]
    [('alarms/stale_engine', (2,)), ('entropy', (2,))]
    """
    found = []
    names = [name for name in metrics.columns if name != "step"]
    for name in names:
        if name.startswith(ALARM):
            fired = metrics["step"][metrics[name] > 0]
            if len(fired):
                found.append(Alarm(name, tuple(map(int, fired)), "raised while training"))
    found += [] if evaluation is None else held_out(evaluation)
    for _, panel, there in shown_panels(names):
        for name in there if panel.judged else []:
            outside = [panel.outside(value) for value in metrics[name]]
            if any(outside):
                steps = tuple(int(step) for step in metrics["step"][outside])
                found.append(Alarm(name, steps, f"{healthy(panel)}: {panel.advice}"))
    return found


def held_out(evaluation: pd.DataFrame) -> list[Alarm]:
    """Scores on held-out texts that training made worse than what it started from.

    The last row is compared with the first one that was read in the same way. A score is worse
    where it fell by more than `WORSE`: less is the noise of some hundred texts.

    >>> rows = [("cold_start", 0.665, 0.57), ("grpo", 0.360, 0.56)]
    >>> names = ["name", "scenes/coverage", "scenes/recall_at_1"]
    >>> table = pd.DataFrame(rows, columns=names).assign(rationale="greedy")
    >>> [(alarm.metric, alarm.steps) for alarm in held_out(table)]
    [('scenes/coverage', ())]
    """
    if evaluation.empty:
        return []
    last = evaluation.iloc[-1]
    first = evaluation[evaluation["rationale"] == last["rationale"]].iloc[0]
    found = []
    for score in [name for name in evaluation.columns if name not in ("name", "rationale")]:
        before, after = float(first[score]), float(last[score])
        if before - after > WORSE * max(1.0, abs(before)):
            reason = f"held-out texts: {before:.3f} for {first['name']}, now {after:.3f}"
            found.append(Alarm(score, (), f"{reason}; read rationales before and after"))
    return found


def healthy(panel: Panel) -> str:
    """The range in words."""
    if panel.low is not None and panel.high is not None:
        return f"healthy from {panel.low:g} to {panel.high:g}"
    return (
        f"healthy from {panel.low:g}" if panel.low is not None else f"healthy up to {panel.high:g}"
    )
