"""A resumed run goes on exactly as one that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from grace_rl.data import scenes
from grace_rl.rollout.store import read_rollouts
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

STEPS = 8  # an epoch has six
ROWS = scenes.rows("train", "quad", 12)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def build(policy: str, run: Path, **settings: Any) -> GraceGRPOTrainer:
    args = GraceGRPOConfig(
        output_dir=str(run / "checkpoints"),
        num_generations=2,
        per_device_train_batch_size=8,
        max_completion_length=8,
        max_steps=STEPS,
        learning_rate=1e-3,
        roles={"query": {}, "positive": {}, "negative": {"train": False}},
        instruction=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        print_rollouts_steps=0,
        disable_tqdm=True,
        **settings,
    )
    return GraceGRPOTrainer(policy, args, ROWS, ["contrastive", "length"], run_folder=run)


def rollouts(run: Path) -> list[dict[str, Any]]:
    return read_rollouts(run).to_pylist()


@pytest.fixture(scope="module")
def uninterrupted(policy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    run = tmp_path_factory.mktemp("whole")
    trainer = build(policy, run)
    trainer.train()
    return dict(trainer.model.named_parameters()), rollouts(run)


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_resumed_equals_uninterrupted(
    policy: str, tmp_path: Path, uninterrupted: Any, stop: int
) -> None:
    first = build(policy, tmp_path)
    first.add_callback(StopAt(stop))
    first.train()
    assert first.state.global_step == stop

    second = build(policy, tmp_path)
    second.train(resume_from_checkpoint=True)
    weights, written = uninterrupted
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert rollouts(tmp_path) == written
    assert second.reader.centre is not None


def test_another_seed_writes_other_rollouts(
    policy: str, tmp_path: Path, uninterrupted: Any
) -> None:
    trainer = build(policy, tmp_path, seed=1)
    trainer.train()
    assert rollouts(tmp_path) != uninterrupted[1]
