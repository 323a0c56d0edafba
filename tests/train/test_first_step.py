"""Training on nothing is refused, or said at the first step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grace_rl.reward import RewardError
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.ppo import GracePPOTrainer
from grace_rl.train.ppo_config import GracePPOConfig

METHODS = [(GraceGRPOTrainer, GraceGRPOConfig), (GracePPOTrainer, GracePPOConfig)]


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def enormous(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1e30 * (i % 2) for i in range(len(completion_ids))]


def large(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [1e6 * (i % 2) for i in range(len(completion_ids))]


@pytest.mark.parametrize("classes", METHODS, ids=["grpo", "ppo"])
def test_rewards_too_large_for_a_deviation_are_named(
    tiny_trainer: Any, tmp_path: Path, classes: Any
) -> None:
    trainer = tiny_trainer(*classes, tmp_path, [constant, enormous])
    with pytest.raises(RewardError, match="step 1, mostly by 'enormous'"):
        trainer.train()
    assert trainer.state.global_step == 0
    tiny_trainer(*classes, tmp_path, [large], max_steps=1).train()


def test_a_first_batch_that_teaches_nothing_is_said_once(tiny_trainer: Any, tmp_path: Path) -> None:
    said = {}
    for reward in (constant, large):
        output = io.StringIO()
        console = Console(file=output, width=500)
        tiny_trainer(*METHODS[0], tmp_path, [reward], console=console).train()
        said[reward.__name__] = output.getvalue().count("every advantage of the first batch is 0")
    assert said == {"constant": 1, "large": 0}


def test_empty_rationales_are_counted(tiny_trainer: Any, tmp_path: Path) -> None:
    trainer = tiny_trainer(*METHODS[0], tmp_path, [large], max_steps=1)
    write = trainer.generate

    def half_empty(rollouts: Any, how: Any) -> Any:
        rollouts, logps = write(rollouts, how)
        rollouts.rationales[:8:2] = ["", " ", "\n", ""]
        return rollouts, logps

    trainer.generate = half_empty
    trainer.train()
    assert trainer.state.log_history[0]["rollouts/empty"] == 0.5
