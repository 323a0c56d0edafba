"""Arguments of `GracePPOTrainer`: those of `GraceGRPOConfig` and the critic's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from grace_rl.credit.segments import loss_problems
from grace_rl.errors import UserError
from grace_rl.train.grpo_config import GraceGRPOConfig

CRITICS = ("shared", "detached", "separate")
KL_PLACES = ("reward", "loss")


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

    critic: str = "shared"
    value_learning_rate: float | None = None
    vf_coef: float = 0.1
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = ppo_problems(vars(self))
        if problems:
            raise UserError(problems)


def ppo_problems(settings: Mapping[str, Any]) -> list[str]:
    """What PPO cannot use, each as `key: what to do`.

    Args:
        settings: Fields of `GracePPOConfig` by name, all of them.
    """

    def bad(key: str, message: str) -> None:
        problems.append(f"{key}: {message}")

    problems: list[str] = []
    for key, choices in (("critic", CRITICS), ("kl_in", KL_PLACES)):
        if settings[key] not in choices:
            bad(key, f"must be one of {', '.join(choices)}, not {settings[key]!r}")
    for key in ("gamma", "lam"):
        if not 0 <= settings[key] <= 1:
            bad(key, f"must be from 0 to 1, not {settings[key]}")
    for key in ("value_learning_rate", "vf_coef", "value_clip", "kl_target", "kl_horizon"):
        if settings[key] is not None and not settings[key] > 0:
            bad(key, f"must be above 0, not {settings[key]}")
    if settings["kl_target"] is not None and not settings["beta"]:
        bad("kl_target", "adapts beta, which is 0; give beta its first value, such as 0.05")
    if settings["scale_rewards"] not in ("group", True):
        bad("scale_rewards", "the critic takes the place of the group; remove it")
    for key in {"gae_lambda", "calibrate"} & set(settings["shaping"]):
        bad(f"shaping.{key}", "PPO has lam and its critic for that; remove it")
    return problems + loss_problems(settings, "PPO gives credit to tokens")
