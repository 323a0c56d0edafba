"""Replaying what a run has stored with the run's own rewards gives the run's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.plugins import REWARDS, installed
from grace_rl.reward import RewardSpec, load_rewards
from grace_rl.reward.replay import replay
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.ppo import GracePPOTrainer
from grace_rl.train.ppo_config import GracePPOConfig

SUPERVISED = {"query": {}, "positive": {}, "negative": {"train": False}}
QUAD = {role: {} for role in ("query", "positive", "negative", "negative_positive")}
PUBLISHED = {"positive": {}, "query": {"train": False}, "negative": {"train": False}}
UNSUPERVISED = {"text": {}, "anchor": {"train": False}}
STEPS = {"segments": 3, "segment_min_tokens": 2}
ELSEWHERE = {"judge", "reconstruction"}  # a server; a model that is not in the run directory
SHIPPED = [RewardSpec(n) for n in sorted(set(installed(REWARDS)) - ELSEWHERE - {"grace_published"})]
REWARDS = [RewardSpec("contrastive"), RewardSpec("length", weight=0.5)]
STEPWISE = [RewardSpec("stepwise"), RewardSpec("length", weight=0.5)]
LINEAR = [RewardSpec("contrastive"), RewardSpec("consistency", weight=0.3)]


@pytest.mark.parametrize(
    ("method", "rewards", "roles", "settings"),
    [
        pytest.param("grpo", SHIPPED, SUPERVISED, STEPS, id="shipped, triplets"),
        pytest.param("grpo", SHIPPED, QUAD, STEPS, id="shipped, quads"),
        pytest.param(
            "grpo", [*SHIPPED, RewardSpec("grace_published")], UNSUPERVISED, STEPS, id="texts"
        ),
        pytest.param("grpo", [RewardSpec("grace_published")], PUBLISHED, {}, id="published"),
        *(
            pytest.param("grpo", REWARDS, SUPERVISED, {"scale_rewards": scale}, id=f"scale {scale}")
            for scale in ("group", "batch", "none")
        ),
        pytest.param(
            "grpo",
            LINEAR,
            SUPERVISED,
            {"multi_objective_aggregation": "normalize_then_sum"},
            id="normalized first",
        ),
        *(
            pytest.param("grpo", STEPWISE, SUPERVISED, STEPS | {"shaping": shaping}, id=name)
            for name, shaping in (
                ("lambda 1/2", {"gae_lambda": 0.5}),
                ("penalty", {"gae_lambda": 0.9, "penalty": 0.3, "calibrate": False}),
            )
        ),
        pytest.param("grpo", STEPWISE, QUAD, STEPS | {"reader": {"span": "context"}}, id="context"),
        pytest.param("ppo", REWARDS, SUPERVISED, {"whiten_advantages": False}, id="critic"),
        pytest.param("ppo", STEPWISE, SUPERVISED, STEPS, id="critic, steps"),
        pytest.param("ppo", REWARDS, SUPERVISED, {"beta": 0.05}, id="critic, KL"),
    ],
)
def test_a_replay_of_the_runs_own_rewards_is_the_run(
    tiny_trainer: Any,
    tmp_path: Path,
    method: str,
    rewards: list[RewardSpec],
    roles: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """To the last bit: scores, totals, advantages, and those of tokens."""
    classes = {
        "grpo": (GraceGRPOTrainer, GraceGRPOConfig),
        "ppo": (GracePPOTrainer, GracePPOConfig),
    }[method]
    rows = scenes.rows("train", "unsupervised" if "text" in roles else "quad", 12)
    usual = {"model": str(scenes.COLD_START), "max_steps": 3, "max_completion_length": 12}
    settings = usual | settings  # a policy that ends some of its rationales
    trainer = tiny_trainer(
        *classes, tmp_path, rewards, rows, roles=roles, run_folder=tmp_path, **settings
    )
    trainer.train()
    pairs = list(replay(tmp_path, load_rewards(rewards, ".")))
    assert len(pairs) == 3
    for before, after in pairs:
        assert before.scores.keys() == after.scores.keys()
        assert before.advantages.any() or method == "grpo"
        for label, values in before.scores.items():
            assert same(values, after.scores[label]), label
        for name in ("totals", "advantages", "step_scores", "token_advantages"):
            assert same(getattr(before, name), getattr(after, name)), name
        assert (before.step_scores is not None) == ("segments" in settings)
        assert len({len(ids) for ids in before.token_ids}) > 1


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(nan=1e9), other.nan_to_num(nan=1e9))


def test_advantages_by_group_are_trls_own(tiny_trainer: Any, tmp_path: Path) -> None:
    """To the last bit, whatever they are divided by."""
    for scale in ("group", "batch", "none"):
        trainer = tiny_trainer(
            GraceGRPOTrainer, GraceGRPOConfig, tmp_path, REWARDS, scale_rewards=scale
        )
        compared = []
        give = trainer.give_credit

        def compare(world: Any, output: Any, give: Any = give, seen: Any = compared) -> Any:
            trls = output["advantages"].clone()
            rollouts = give(world, output)
            seen.append(torch.equal(output["advantages"], trls) and bool(trls.any()))
            return rollouts

        trainer.give_credit = compare
        trainer.train()
        assert compared and all(compared), scale
