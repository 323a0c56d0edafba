"""Credit by critic: PPO's advantages for every token, by GAE on what a value model foresaw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_rl.credit.by_segment import prefix_columns
from grace_rl.credit.credit import Credit
from grace_rl.credit.critic import gae, place_rewards, whiten
from grace_rl.credit.segments import (
    faded_penalty,
    one_segment,
    prefix_values,
    regressions,
    segment_rewards,
)
from grace_rl.rollout.rollouts import Rollouts


@dataclass(frozen=True)
class Estimate:
    """What GAE makes of N rollouts, T tokens at most.

    Attributes:
        advantages: (N, T), not whitened.
        returns: (N, T), what the values shall learn.
        mask: (N, T) bool, the tokens that count: written, and of a rollout that was scored.
        values: (N, T), 0 where a token does not count.
        scores: (N,) what rewards paid.
        paid: (N,) the same less the KL.
        scored: (N,) bool.
    """

    advantages: Tensor
    returns: Tensor
    mask: Tensor
    values: Tensor
    scores: Tensor
    paid: Tensor
    scored: Tensor


class CriticCredit(Credit):
    """PPO's advantages, (N, T), of rollouts with `token_values`.

    Args:
        gamma: discount per token.
        lam: lambda of GAE.
        whiten: mean 0 and variance 1 over all tokens of the batch.
        steps: pay each segment what it adds to the score, not the total at the end.
        penalty, margin: as in `grace_rl.credit.segments.ShapingConfig`.
        kl_coefficient: what each token pays for its `token_kl`.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten: bool = True,
        steps: bool = False,
        penalty: float = 0.0,
        margin: float | None = None,
        kl_coefficient: float = 0.0,
    ) -> None:
        self.gamma, self.lam, self.whiten, self.steps = gamma, lam, whiten, steps
        self.penalty, self.margin, self.kl_coefficient = penalty, margin, kl_coefficient

    def __call__(self, rollouts: Rollouts, progress: float = 0.0) -> Tensor:
        estimate = self.estimate(rollouts, progress)
        if not self.whiten:
            return estimate.advantages
        return whiten(estimate.advantages, estimate.mask)

    def estimate(self, rollouts: Rollouts, progress: float = 0.0) -> Estimate:
        """Advantages and all that comes with them.

        Raises:
            ValueError: the table has no values of a critic.
        """
        if rollouts.token_values is None:
            raise ValueError("no critic has looked at these rollouts")
        values = rollouts.token_values.cpu()
        written = ~values.isnan()
        values = values.nan_to_num()
        earned, ends = self._earned(rollouts, progress)
        scored = ~earned.isnan().any(dim=1) & written.any(dim=1)
        mask = written & scored[:, None]
        rewards = place_rewards(earned.nan_to_num(), ends, mask)
        scores = rewards.sum(1)
        if rollouts.token_kl is not None:
            rewards = rewards - self.kl_coefficient * rollouts.token_kl.cpu() * mask
        advantages, returns = gae(rewards, values, mask, self.gamma, self.lam)
        return Estimate(advantages, returns, mask, values, scores, rewards.sum(1), scored)

    def _earned(self, rollouts: Rollouts, progress: float) -> tuple[Tensor, Tensor]:
        """(N, K) rewards, NaN in rows that no reward scored, and (N, K) exclusive ends.

        Where a reward scores steps, each segment earns what it adds to the score; they sum to the
        total less s_0, which is the same for a whole group. Otherwise the total is one segment's.
        """
        totals = rollouts.totals.cpu()
        if not self.steps:
            return totals[:, None], torch.tensor([[len(ids)] for ids in rollouts.token_ids])
        scores, ends, group = prefix_columns(rollouts)
        ends = torch.where(scores.isnan().any(1, keepdim=True), one_segment(ends), ends)
        earned = segment_rewards(prefix_values(scores, ends, totals, group))
        penalty = faded_penalty(self.penalty, progress)
        earned = earned - penalty * regressions(scores, self.margin).nan_to_num()
        return earned, ends[:, 1:]

    def notes(self, progress: float) -> dict[str, Any]:
        names = ("gamma", "lam", "whiten", "steps", "penalty", "margin", "kl_coefficient")
        return {
            "kind": "critic",
            "progress": progress,
            **{name: getattr(self, name) for name in names},
        }
