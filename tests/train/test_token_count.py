"""Every method counts the tokens that training reads, and ends when a budget of them is spent."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grace_rl.data import scenes
from grace_rl.recipe import load_recipe
from grace_rl.rollout.policy import load_policy
from grace_rl.run.records import read_metrics, read_status
from grace_rl.train.run import train
from grace_rl.train.stop import Budget

EVERY = {
    "model_name_or_path": "scenes",
    "dtype": "float32",
    "dataset_name": "scenes",
    "dataset_rows": 16,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
METHODS = {
    "infonce": {"dataset_options": {"form": "triplet"}},
    "gircse": {"dataset_options": {"form": "triplet"}, "gircse_steps": 2},
    "reconstruction": {
        "dataset_options": {"form": "triplet"},
        "instruction": None,
        "writing_share": 0.0,
    },
    "sft": {"dataset_options": {"form": "sft"}, "instruction": None},
    "grpo": {
        "dataset_options": {"form": "triplet"},
        "instruction": None,
        "roles": {"query": {}, "positive": {"train": False}},
        "rewards": [{"name": "contrastive"}],
        "num_generations": 2,
        "max_completion_length": 4,
        "print_rollouts_steps": 0,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_counted_and_end_a_run(tmp_path: Path, method: str) -> None:
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(EVERY | METHODS[method] | {"method": method}))
    overrides = ["--output_dir", str(run)]
    assert train(load_recipe(file, overrides)) == 0
    counts = [line["num_tokens"] for line in read_metrics(run)]
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert len(counts) == 4 and min(steps) > 4

    budget, seldom = Budget(tokens=int(counts[1])), ["--seed", "42", "--logging_steps", "100"]
    assert train(load_recipe(file, [*overrides, *seldom]), overwrite=True, budget=budget) == 0
    status = read_status(run)
    assert status is not None and status["status"] == "finished"
    assert [line["step"] for line in read_metrics(run)] == [2]  # its last step is logged


def test_what_is_counted_is_what_is_read(tmp_path: Path) -> None:
    """InfoNCE on one batch of all rows: three texts of each, with the end token of each."""
    from grace_rl.train.infonce import InfoNCETrainer
    from grace_rl.train.infonce_config import InfoNCEConfig

    rows = scenes.rows("train", "triplet", 8)
    model, tokenizer = load_policy(str(scenes.COLD_START))
    args = InfoNCEConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = InfoNCETrainer((model, tokenizer), args, rows)
    trainer.train()
    texts = [text for row in rows for text in (row["query"], row["positive"], *row["negative"])]
    own = trainer.encoder().model.tokenize(texts)["attention_mask"].sum()
    assert trainer.state.num_input_tokens_seen == int(own)
