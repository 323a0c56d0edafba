"""What the rewards say of a batch, as columns of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grace_rl.reward.loading import LoadedReward
from grace_rl.reward.runtime import Scored, weighted_totals
from grace_rl.rollout.rollouts import Rollouts


def with_scores(
    rollouts: Rollouts,
    rewards: Sequence[LoadedReward],
    scored: Scored,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Rollouts:
    """The table of all processes with the scores of its rollouts.

    Args:
        rollouts: W trained ones, then anchors.
        rewards: as given to the runtime.
        scored: from the runtime.
        gather: as given to the runtime.
    """
    weights = torch.tensor([reward.weight for reward in rewards], device=scored.rewards.device)
    labels = [reward.label for reward in rewards]
    return rollouts.with_scores(
        dict(zip(labels, scored.values.unbind(1), strict=True)),
        weighted_totals(scored.rewards, weights),
        gather(step_scores(rewards, scored)) if scored.steps else None,
    )


def step_scores(rewards: Sequence[LoadedReward], scored: Scored) -> Tensor:
    """(B, K+1) the weighted sum of what rewards say of each prefix, on this process; where all have
    the weight 0, the plain sum, to look at."""
    weights = {reward.label: reward.weight for reward in rewards if reward.steps and reward.weight}
    named = scored.steps.items()
    return torch.stack([weights.get(name, float(not weights)) * s for name, s in named]).sum(0)
