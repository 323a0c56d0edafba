"""Arguments of `GracePPOTrainer`: those of `GraceGRPOConfig` and the critic's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from grace_rl.credit.segments import loss_problems
from grace_rl.recipe.fields import Rule
from grace_rl.train.grpo_config import GraceGRPOConfig


def ppo_problems(config: GracePPOConfig) -> Iterator[str]:
    """What PPO cannot use."""
    if config.kl_target is not None and not config.beta:
        yield "kl_target: adapts beta, which is 0; give beta its first value, such as 0.05"
    if config.scale_rewards not in ("group", True):
        yield "scale_rewards: the critic takes the place of the group; remove it"
    for key in ("gae_lambda", "calibrate"):
        if key in config.shaping.model_fields_set:
            yield f"shaping.{key}: PPO has lam and its critic for that; remove it"
    yield from loss_problems(config, "PPO gives credit to tokens")


@dataclass
class GracePPOConfig(GraceGRPOConfig):
    """`GraceGRPOConfig` for PPO.

    From TRL: `epsilon` clips the policy's ratio, `beta` is the KL coefficient (0 needs no reference
    model), `num_iterations` are the epochs over a batch of rollouts, `steps_per_generation` over
    `gradient_accumulation_steps` its mini-batches, `entropy_coef` the entropy bonus, `loss_type`
    how token losses are averaged.

    Args:
        critic: `shared` (a linear head on the policy's hidden states; the value loss also shapes
            the policy's backbone), `detached` (the same head, no gradient into the policy) or
            `separate` (a copy of the decoder stack of its own: twice the memory).
        value_learning_rate: Of the critic's parameters; `None` is the policy's. A head alone wants
            more, 1e-3 to 1e-2; a separate critic about the policy's or a few times it.
        vf_coef: Weight of the value loss, above 0; usual are 0.1 to 1.
        value_clip: How far a value may usefully move from the rollout's, in units of the reward;
            `None` does not clip.
        gamma: Discount per token, in [0, 1]. Rationales are short and end: 1 is usual.
        lam: Lambda of GAE, per token, in [0, 1]. 1 trusts rewards only, less trusts the critic.
        whiten_advantages: Mean 0 and variance 1 over all tokens of a batch of rollouts.
        kl_in: Where `beta` times the KL to the reference goes: `reward` (every token pays its
            own) or `loss` (TRL's penalty).
        kl_target: Adapt `beta` to hold this KL per rollout, in nats; `None` keeps `beta`.
        kl_horizon: Rollouts in which `beta` may change by about a fifth.

    Raises:
        UserError: Values that PPO cannot use, all together.
    """

    trainer: ClassVar[str] = "grace_rl.train.ppo:GracePPOTrainer"

    critic: Literal["shared", "detached", "separate"] = "shared"
    value_learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    vf_coef: Annotated[float, Field(gt=0)] = 0.1
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    whiten_advantages: bool = True
    kl_in: Literal["reward", "loss"] = "reward"
    kl_target: Annotated[float, Field(gt=0)] | None = None
    kl_horizon: Annotated[int, Field(ge=1)] = 10_000

    rules: ClassVar[tuple[Rule, ...]] = (*GraceGRPOConfig.rules, ppo_problems)
