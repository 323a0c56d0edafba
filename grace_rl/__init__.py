"""Reinforcement learning for text embeddings that come with a written rationale.

The names below are imported when they are first used, so that `import grace_rl` (and with it the
command line's `--help`) does not load torch.

>>> import grace_rl
>>> grace_rl.__version__
'0.1.0'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace_rl.embed.encoder import RationaleEncoder
    from grace_rl.recipe import load_recipe
    from grace_rl.reward.batch import RewardBatch, RewardOutput
    from grace_rl.train.grpo import GraceGRPOTrainer
    from grace_rl.train.grpo_config import GraceGRPOConfig

__version__ = "0.1.0"

__all__ = [
    "GraceGRPOConfig",
    "GraceGRPOTrainer",
    "RationaleEncoder",
    "RewardBatch",
    "RewardOutput",
    "load_recipe",
]

_HOME = {
    "GraceGRPOConfig": "grace_rl.train.grpo_config",
    "GraceGRPOTrainer": "grace_rl.train.grpo",
    "RationaleEncoder": "grace_rl.embed.encoder",
    "RewardBatch": "grace_rl.reward.batch",
    "RewardOutput": "grace_rl.reward.batch",
    "load_recipe": "grace_rl.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grace_rl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
