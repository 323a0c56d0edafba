"""The training methods, one entry each: where its config is, and what makes its trainer.

Everything is named, not imported, so that a recipe's method can be looked up without torch. A new
method is one entry here, `train/<method>_config.py` and `train/<method>.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        config: `module:Class` of the trainer's arguments, a `grace_rl.recipe.fields.TrainerConfig`;
            every field of it is a recipe key, with its range, and the rules are its own.
        plan: `module:function`, called as `plan(recipe, args, rows)` before any model loads. It
            raises UserError for rows or rewards that the method cannot use, and returns a
            `grace_rl.train.start.Build`.
        rollouts: It writes rationales while it trains and needs rewards.
    """

    config: str
    plan: str
    rollouts: bool = False

    def config_class(self) -> Any:
        return named(self.config)


METHODS = {
    "grpo": Method(
        config="grace_rl.train.grpo_config:GraceGRPOConfig",
        plan="grace_rl.train.grpo_config:plan",
        rollouts=True,
    ),
    "ppo": Method(
        config="grace_rl.train.ppo_config:GracePPOConfig",
        plan="grace_rl.train.grpo_config:plan",
        rollouts=True,
    ),
    "sft": Method(
        config="grace_rl.train.sft_config:GraceSFTConfig", plan="grace_rl.train.sft:plan"
    ),
    "infonce": Method(
        config="grace_rl.train.infonce_config:InfoNCEConfig", plan="grace_rl.train.infonce:plan"
    ),
    "gircse": Method(
        config="grace_rl.train.gircse_config:GIRCSEConfig", plan="grace_rl.train.gircse:plan"
    ),
    "reconstruction": Method(
        config="grace_rl.train.reconstruction_config:ReconstructionConfig",
        plan="grace_rl.train.reconstruction:plan",
    ),
}


def named(place: str) -> Any:
    """What `module:attribute` names.

    >>> named("math:sqrt")(9.0)
    3.0
    """
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
