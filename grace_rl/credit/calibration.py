"""How well the scores of prefixes predict the final score, and what to watch in them.

Tensors are as in `grace_rl.credit.segments`: one row per rollout of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_rl.credit.segments import ShapingConfig, has_tokens, segment_rewards
from grace_rl.rollout.groups import group_counts, group_means

MOMENTUM = 0.9  # about ten batches, as the reader's centre


class Calibration:
    """How well each prefix's score predicts the final one: a running regression for k = 1 ... K-1.

    The slope is that inside groups, since credit is compared inside groups: beta_{k+1} =
    Cov(s_K, s_k) / Var(s_k). Above 1/2, subtracting s_k from the outcome lowers its variance.

    Moments are averaged and not slopes, so a batch with little to see weighs little.
    """

    def __init__(self) -> None:
        self._moments: Tensor | None = None  # (4, K-1) float64: E[s_k], E[s_K], Cov, Var
        self.batches = 0

    @property
    def slopes(self) -> Tensor | None:
        """(K-1,) b_k; None before the first batch."""
        if self._moments is None:
            return None
        return _slopes(self._moments, nothing=1.0)

    @property
    def intercepts(self) -> Tensor | None:
        """(K-1,) a_k; None before the first batch."""
        if self._moments is None or self.slopes is None:
            return None
        score, final, _, _ = self._moments
        return (final - self.slopes * score).float()

    def update(self, scores: Tensor, ends: Tensor, group: Tensor) -> None:
        """Take in a batch: (W, K+1) scores and ends, (W,) groups."""
        moments = _moments(scores, ends, group)
        seen = ~moments.isnan().any(0)
        if self._moments is None:
            neutral = torch.zeros_like(moments)  # variance 0: slope 1, intercept as the means say
            self._moments = torch.where(seen, moments, neutral)
        else:
            old = self._moments
            self._moments = torch.where(seen, MOMENTUM * old + (1 - MOMENTUM) * moments, old)
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as numbers and lists."""
        moments = None if self._moments is None else self._moments.tolist()
        return {"moments": moments, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        moments = state["moments"]
        self._moments = None if moments is None else torch.tensor(moments, dtype=torch.float64)
        self.batches = state["batches"]


def shaping_metrics(scores: Tensor, ends: Tensor, group: Tensor) -> dict[str, float]:
    """What to watch, `shaping/...` -> number; numbers that the batch does not have are left out.

    - `beta_k`, k = 2 ... K: Cov(s_K, s_{k-1}) / Var(s_{k-1}) inside groups.
    - `share_not_worse`: share of segments that do not lower the score.
    - `gain`: mean of s_K - s_0, what writing a rationale is worth.
    - `one_segment`: share of rationales too short to be cut.

    Args:
        scores, ends: (W, K+1).
        group: (W,).
    """
    steps = segment_rewards(scores).where(has_tokens(ends), torch.nan)
    steps = steps[~steps.isnan()]
    metrics = {
        "shaping/share_not_worse": float((steps >= 0).float().mean()),
        "shaping/gain": float((scores[:, -1] - scores[:, 0]).nanmean()),
    }
    if ends.shape[1] > 2:
        metrics["shaping/one_segment"] = float((ends[:, 1] == ends[:, -1]).float().mean())
    slopes = _slopes(_moments(scores, ends, group), nothing=math.nan)
    for number, slope in enumerate(slopes.tolist()):
        metrics[f"shaping/beta_{number + 2}"] = slope
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def beta_advice(slopes: Tensor, config: ShapingConfig) -> str | None:
    """A sentence if the scores of prefixes say too little about the final score, else None.

    Args:
        slopes: (K-1,), of `Calibration`.
        config: what is done with them.
    """
    low = [f"beta_{i + 2} {slope:.2f}" for i, slope in enumerate(slopes.tolist()) if slope < 0.5]
    if not low:
        return None
    if config.calibrate:
        cure = (
            "shaping.calibrate shrinks them accordingly, so they do no harm, but they gain little: "
            "fewer segments, or a potential with a higher temperature, would say more"
        )
    else:
        cure = "the advantages are noisier than without shaping; set shaping.calibrate: true"
    return (
        f"shaping: the score after a segment says little about the final score "
        f"({', '.join(low)}; below 0.5 it is a bad baseline): {cure} (docs/methods.md)"
    )


def _moments(scores: Tensor, ends: Tensor, group: Tensor) -> Tensor:
    """(4, K-1) float64: means of s_k and s_K, their covariance and the variance of s_k inside
    groups; NaN for a k with no group of two. Only where segments follow: a whole rationale's score
    predicts itself."""
    inner = scores[:, 1:-1].double()
    usable = (ends[:, 1:-1] < ends[:, -1:]) & ~scores.isnan().any(1, keepdim=True)
    inner = inner.where(usable, torch.nan)
    final = scores[:, -1:].double().expand_as(inner).where(usable, torch.nan)
    left, right = inner - group_means(inner, group), final - group_means(final, group)
    comparable = (group_counts(inner, group) > 1) & usable
    left, right = left.where(comparable, torch.nan), right.where(comparable, torch.nan)
    return torch.stack(
        [inner.nanmean(0), final.nanmean(0), (left * right).nanmean(0), (left**2).nanmean(0)]
    )


def _slopes(moments: Tensor, nothing: float) -> Tensor:
    """(K-1,) covariance over variance; `nothing` where the scores do not differ."""
    _, _, covariance, variance = moments
    return torch.where(variance > 0, covariance / variance.clamp(min=1e-12), nothing).float()
