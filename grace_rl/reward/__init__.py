"""The reward contract: what a reward sees, returns, and how it is loaded and run.

A plugin needs only the names of this module.
"""

from grace_rl.recipe.rewards import RewardSpec
from grace_rl.reward.batch import (
    Pool,
    PoolTexts,
    RewardBatch,
    RewardOutput,
)
from grace_rl.reward.infonce import TextContrast, contrast_texts
from grace_rl.reward.loading import LoadedReward, build_rewards, load_rewards
from grace_rl.reward.outputs import score_prefixes
from grace_rl.reward.runtime import RewardError, RewardRuntime, Scored
from grace_rl.rollout.groups import group_means, group_stds
from grace_rl.rollout.rollouts import Rollouts

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
    "TextContrast",
    "build_rewards",
    "contrast_texts",
    "group_means",
    "group_stds",
    "load_rewards",
    "score_prefixes",
]
