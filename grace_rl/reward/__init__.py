"""The reward contract: what a reward sees, returns, and how it is loaded and run.

A plugin needs only the names of this module.
"""

from grace_rl.reward.batch import (
    Pool,
    PoolTexts,
    RewardBatch,
    RewardOutput,
    Rollouts,
    group_means,
    group_stds,
)
from grace_rl.reward.loading import LoadedReward, RewardSpec, available_rewards, load_rewards
from grace_rl.reward.outputs import score_prefixes
from grace_rl.reward.runtime import RewardError, RewardRuntime, Scored

__all__ = [
    "LoadedReward",
    "Pool",
    "PoolTexts",
    "RewardBatch",
    "RewardError",
    "RewardOutput",
    "RewardRuntime",
    "RewardSpec",
    "Rollouts",
    "Scored",
    "available_rewards",
    "group_means",
    "group_stds",
    "load_rewards",
    "score_prefixes",
]
