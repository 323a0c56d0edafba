"""Which metrics to look at, what is healthy, and where a run was not.

The ranges are those of docs/methods.md and rules of thumb (docs/inspect.md): a value outside is a
reason to look at rationales, not proof that something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd

ALARM = "alarms/"


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: What it shows.
        patterns: Names of metrics, with `*`.
        low, high: The healthy range; None is no limit.
        advice: What a value outside may mean.
    """

    title: str
    patterns: tuple[str, ...]
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

    def metrics(self, names: list[str]) -> list[str]:
        """Those of the names that belong here."""
        return [name for name in names if any(fnmatchcase(name, p) for p in self.patterns)]


@dataclass(frozen=True)
class Alarm:
    """A metric outside its healthy range, or an alarm that training raised, at these steps."""

    metric: str
    steps: tuple[int, ...]
    reason: str


PANELS: dict[str, tuple[Panel, ...]] = {
    "Rewards": (
        Panel("Reward", ("reward",)),
        Panel("Each reward", ("rewards/*/mean",)),
        Panel("Spread of each reward inside groups", ("rewards/*/within_group_std",)),
        Panel(
            "Share of groups whose rewards are all equal",
            ("frac_reward_zero_std",),
            high=0.8,
            advice="most groups teach nothing: raise the temperature, or choose a finer reward",
        ),
        Panel(
            "Rollouts whose reward failed",
            ("rewards/*/errors", "rewards/*/nonfinite"),
            high=0.0,
            advice="grace-rl rewards check says more",
        ),
        Panel("Learning to read", ("reader_loss/loss", "reader_loss/accuracy")),
        Panel("Loss of supervised or contrastive training", ("eval_loss", "mean_token_accuracy")),
    ),
    "Advantages": (
        Panel("Spread of rewards, which advantages are scaled by", ("reward_std",)),
        Panel(
            "How well a prefix foretells the score",
            ("shaping/beta_*",),
            low=0.5,
            advice="the score so far is a bad baseline: fewer segments, calibrate: true",
        ),
        Panel(
            "Share of segments that do not lower the score",
            ("shaping/share_not_worse",),
            low=0.6,
            advice="filler, or segments of one word",
        ),
        Panel("Gain of the whole over nothing", ("shaping/gain",)),
        Panel(
            "Variance that the critic explains",
            ("val/explained_variance",),
            low=-0.1,
            advice="lower value_learning_rate, keep lam: 1.0",
        ),
    ),
    "Lengths": (
        Panel(
            "Tokens of a rationale",
            ("completions/mean_length", "completions/min_length", "completions/max_length"),
        ),
        Panel(
            "Share of rationales that never ended",
            ("completions/clipped_ratio",),
            high=0.1,
            advice="raise max_completion_length, or pay for ending",
        ),
    ),
    "Collapse": (
        Panel(
            "Mean cosine of different texts' embeddings",
            ("embedding/mean_cosine",),
            high=0.5,
            advice="embeddings fall together: rationales say the same of every text",
        ),
        Panel(
            "The same before centring",
            ("embedding/raw_mean_cosine",),
            high=0.98,
            advice="raw embeddings have nearly one direction; centring hides it",
        ),
        Panel("Effective rank of embeddings", ("embedding/effective_rank",)),
        Panel("Distinct words and pairs of words", ("completions/distinct_*",)),
        Panel(
            "Entropy of the policy, nats per token",
            ("entropy", "policy/entropy_avg"),
            low=0.05,
            advice="nothing is tried any more: lower learning_rate, add entropy_coef or beta",
        ),
    ),
    "Training": (
        Panel("Loss", ("loss",)),
        Panel("Norm of the gradient", ("grad_norm",)),
        Panel("Learning rate", ("learning_rate",)),
        Panel(
            "Share of clipped tokens",
            ("clip_ratio/region_mean", "policy/clipfrac_avg"),
            high=0.2,
            advice="steps are too large: lower learning_rate or num_iterations",
        ),
        Panel("KL to the reference, nats", ("kl", "objective/kl")),
        Panel(
            "Engine against trainer, nats per token",
            ("sampling/sampling_logp_difference/mean",),
            high=0.1,
            advice="the engine samples from other weights than those that are trained",
        ),
    ),
    "Time": (
        Panel("Phases of a step, seconds", ("time/*",)),
        Panel("Tokens written per second", ("rollout/tokens_per_second",)),
    ),
}


def shown_panels(names: list[str]) -> Iterator[tuple[str, Panel, list[str]]]:
    """Section, panel and its metrics, for the panels that have any."""
    for section, panels in PANELS.items():
        for panel in panels:
            if there := panel.metrics(names):
                yield section, panel, there


def alarms(metrics: pd.DataFrame) -> list[Alarm]:
    """What training raised, then what left its healthy range.

    >>> logged = {"step": [1, 2], "entropy": [0.5, 0.01], "alarms/stale_engine": [0, 1]}
    >>> table = pd.DataFrame(logged)
    >>> [(alarm.metric, alarm.steps) for alarm in alarms(table)]
    [('alarms/stale_engine', (2,)), ('entropy', (2,))]
    """
    found = []
    names = [name for name in metrics.columns if name != "step"]
    for name in names:
        if name.startswith(ALARM):
            fired = metrics["step"][_numbers(metrics[name]) > 0]
            if len(fired):
                found.append(Alarm(name, tuple(map(int, fired)), "raised while training"))
    for _, panel, there in shown_panels(names):
        for name in there if panel.judged else []:
            outside = [panel.outside(value) for value in _numbers(metrics[name])]
            if any(outside):
                steps = tuple(int(step) for step in metrics["step"][outside])
                found.append(Alarm(name, steps, f"{healthy(panel)}: {panel.advice}"))
    return found


def healthy(panel: Panel) -> str:
    """The range in words."""
    if panel.low is not None and panel.high is not None:
        return f"healthy from {panel.low:g} to {panel.high:g}"
    return (
        f"healthy from {panel.low:g}" if panel.low is not None else f"healthy up to {panel.high:g}"
    )


def _numbers(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce")
