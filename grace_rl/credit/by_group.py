"""Credit by group: a rollout against the others of its text, as TRL has it, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grace_rl.credit.credit import Credit
from grace_rl.rollout.groups import fill_unscored, in_groups
from grace_rl.rollout.rollouts import Rollouts

EPSILON = 1e-4  # added to deviations, as in TRL


class GroupCredit(Credit):
    """GRPO's advantages, (N,).

    Args:
        scale: what advantages are divided by, as TRL's `scale_rewards`: the deviation of the
            `group`, of the `batch`, or `none`.
        aggregation: TRL's `multi_objective_aggregation`: `sum_then_normalize` takes the totals,
            `normalize_then_sum` (GDPO) normalises each reward inside its groups first.
        weights: of the rewards, in their order; only for `normalize_then_sum`.

    """

    def __init__(
        self,
        scale: str = "group",
        aggregation: str = "sum_then_normalize",
        weights: Sequence[float] = (),
    ) -> None:
        self.scale = scale
        self.aggregation = aggregation
        self.weights = list(weights)

    def __call__(self, rollouts: Rollouts, progress: float = 0.0) -> Tensor:
        group = rollouts.group.cpu()
        if self.aggregation == "normalize_then_sum":
            return self._normalized_first(rollouts, group).nan_to_num()
        totals = rollouts.totals.cpu()
        lines, back = in_groups(totals, group)
        advantages = lines - lines.nanmean(1, keepdim=True)
        if self.scale == "group":
            advantages = advantages / (_deviation(lines, 1) + EPSILON)
        elif self.scale == "batch":
            advantages = advantages / (_deviation(totals) + EPSILON)
        return back(advantages).nan_to_num()

    def _normalized_first(self, rollouts: Rollouts, group: Tensor) -> Tensor:
        scores = fill_unscored(torch.stack([s.cpu() for s in rollouts.scores.values()], 1), group)
        lines, back = in_groups(scores, group)  # (G, S, R)
        each = back((lines - lines.nanmean(1, keepdim=True)) / (_deviation(lines, 1) + EPSILON))
        totals = (each * torch.tensor(self.weights)).nansum(1)
        totals = totals.where(~scores.isnan().all(1), torch.nan)
        return (totals - totals.nanmean()) / (_deviation(totals) + EPSILON)

    def notes(self, progress: float) -> dict[str, Any]:
        return {
            "kind": "group",
            "scale": self.scale,
            "aggregation": self.aggregation,
            "weights": self.weights,
        }


def _deviation(values: Tensor, dim: int | None = None) -> Tensor:
    """The sample standard deviation without NaN, keeping the dimension; NaN for a single value."""
    squares = ((values - values.nanmean(dim, keepdim=True)) ** 2).nanmean(dim, keepdim=True)
    count = (~values.isnan()).sum(dim, keepdim=True)
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    return (squares * correction).sqrt()
