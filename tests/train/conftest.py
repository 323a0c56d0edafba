"""The tiny policy that the trainers' tests start from, and short runs of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grace_rl.data import scenes


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a random policy with the tokenizer of scenes."""
    return str(scenes.save_untrained(tmp_path_factory.mktemp("policy"), 0))


@pytest.fixture
def tiny_trainer(policy: str) -> Callable[..., Any]:
    """Makes a trainer for two steps of the tiny policy; settings are its config's, or its own."""

    def make(
        trainer: Any, config: Any, folder: Path, rewards: Any = None, rows: Any = None, **given: Any
    ) -> Any:
        own = ("peft_config", "eval_dataset", "run_folder", "console")
        extra = {name: given.pop(name) for name in own if name in given}
        settings = {
            "output_dir": str(folder / "checkpoints"),
            "num_generations": 2,
            "per_device_train_batch_size": 8,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "instruction": None,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "print_rollouts_steps": 0,
            "disable_tqdm": True,
        }
        model, rows = given.pop("model", policy), rows or scenes.rows("train", "quad", 12)
        arguments = config(**settings | given)
        return trainer(model, arguments, rows, rewards or ["contrastive"], **extra)

    return make
