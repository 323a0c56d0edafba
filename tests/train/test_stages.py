"""Chains that run: one directory, each stage from the last one's model, resumable after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.errors import UserError
from grace_rl.recipe.stages import Chain, load
from grace_rl.run.records import read_metrics, read_status
from grace_rl.train.stages import check_stages, train_chain
from grace_rl.train.stop import INTERRUPTED

SHARED: dict[str, Any] = {
    "model_name_or_path": "scenes",
    "dtype": "float32",
    "dataset_name": "scenes",
    "dataset_rows": 24,
    "instruction": None,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": "none",
}
SFT = {"method": "sft", "dataset_options": {"form": "sft"}, "save_steps": 2, "max_steps": 40}
GRPO = {
    "method": "grpo",
    "rewards": [
        {"name": "contrastive"},
        {"name": "reconstruction", "model": "stage:reconstruction"},
    ],
    "multi_objective_aggregation": "normalize_then_sum",
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 12,
    "max_steps": 1,
    "print_rollouts_steps": 0,
}


def chain_file(folder: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    tree = {"output_dir": str(folder / "run")} | SHARED | changes | {"stages": list(stages)}
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def loaded(file: Path) -> Chain:
    chain = load(file)
    assert isinstance(chain, Chain)
    return chain


@pytest.mark.slow
def test_a_chain_leaves_one_directory_and_a_model_that_writes(tmp_path: Path) -> None:
    stage = {"method": "reconstruction", "max_steps": 2}
    chain = loaded(chain_file(tmp_path, stage, SFT | {"max_steps": 2}, GRPO))
    assert train_chain(chain) == 0
    run = tmp_path / "run"
    starts = [scenes.COLD_START, *(run / "stages" / f for f in ("1-reconstruction", "2-sft"))]
    for stage_, start in zip(chain.stages, starts, strict=True):
        assert (read_status(stage_.folder) or {})["status"] == "finished"
        before = start if start == scenes.COLD_START else start / "model"
        first, last = (
            load_file(f / "model.safetensors") for f in (before, stage_.folder / "model")
        )
        moved = [float((first[name] - last[name]).abs().max()) for name in first]
        assert 0 < max(moved) < 0.05  # a few steps from there
    logged = read_metrics(chain.stages[2].folder)[0]
    assert logged["rewards/reconstruction/within_group_std"] > 0
    top, last = (
        load_file(f / "model" / "model.safetensors") for f in (run, chain.stages[2].folder)
    )
    assert all(torch.equal(top[name], last[name]) for name in top)
    rows = scenes.rows(form="triplet", count=3)
    encoded = RationaleEncoder.from_pretrained(run / "model").encode([r["query"] for r in rows])
    assert encoded.vectors.shape == (3, 128)
    with pytest.raises(UserError, match="finished run"):
        train_chain(loaded(tmp_path / "chain.yaml"))


@pytest.mark.slow
def test_a_chain_that_is_killed_goes_on_in_the_stage_where_it_was(
    root: Path, tmp_path: Path
) -> None:
    file = chain_file(tmp_path, {"method": "reconstruction", "max_steps": 2}, SFT)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "grace_rl", "train", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        wanted = run / "stages" / "2-sft" / "checkpoints" / "checkpoint-4" / "COMPLETE"
        while not wanted.exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = run / "stages" / "1-reconstruction"
    assert (read_status(run) or {})["status"] == "running"
    assert (read_status(first) or {})["status"] == "finished"
    made = (first / "model" / "model.safetensors").stat().st_mtime_ns

    assert train_chain(loaded(file)) == 0
    assert (first / "model" / "model.safetensors").stat().st_mtime_ns == made
    second = run / "stages" / "2-sft"
    environment_file = json.loads((second / "environment.json").read_text(encoding="utf-8"))
    assert environment_file["resumed"][0]["from_step"] >= 4
    assert [line["step"] for line in read_metrics(second)] == list(range(1, 41))
    assert (run / "model" / "grace.json").exists()

    longer = chain_file(tmp_path, {"method": "reconstruction", "max_steps": 3}, SFT)
    with pytest.raises(UserError, match=r"stage 1 .*max_steps: is finished with 2, now 3"):
        train_chain(loaded(longer))

    other = chain_file(tmp_path, {"method": "reconstruction", "max_steps": 2, "alpha": 0.5}, SFT)
    (run / "status.json").write_text(json.dumps((read_status(run) or {}) | {"status": "running"}))
    with pytest.raises(UserError, match=r"stages.1.alpha: 0.2 in the run, now 0.5"):
        train_chain(loaded(other))


def test_rows_and_rewards_of_every_stage_are_looked_at_before_the_first_starts(
    tmp_path: Path,
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"t {i}"}) + "\n" for i in range(4)))
    file = chain_file(
        tmp_path,
        {"method": "reconstruction", "dataset_name": str(texts)},
        {"method": "sft", "dataset_name": str(texts)},
        GRPO | {"dataset_rows": 3},
    )
    chain = loaded(file)
    with pytest.raises(UserError) as error:
        train_chain(chain)
    said = error.value.problems
    assert len(said) == 2
    assert said[0].startswith("stage 1 (reconstruction): ") and "needs pairs" in said[0]
    assert said[1].startswith("stage 2 (sft): ") and "has a rationale" in said[1]
    assert not (tmp_path / "run").exists()
    good = loaded(chain_file(tmp_path, {"method": "reconstruction"}, GRPO))
    assert check_stages(good) == [24, 24]


def test_a_chain_goes_on_with_the_rows_it_began_with_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in scenes.rows(form="triplet", count=8)]
    rows.write_text("".join(lines))
    own = {"dataset_name": str(rows), "dataset_rows": None}
    file = chain_file(tmp_path, {"method": "reconstruction"}, {"method": "infonce"}, **own)
    monkeypatch.setattr("grace_rl.train.stages.run_stage", lambda stage, run: INTERRUPTED)
    assert train_chain(loaded(file)) == INTERRUPTED  # between two stages, say
    rows.write_text("".join(lines[::-1]))
    with pytest.raises(UserError) as error:
        train_chain(loaded(file))
    keys = [problem.split(":")[0] for problem in error.value.problems[1:]]
    assert keys == ["stages.1.dataset_name", "stages.2.dataset_name"]
    rows.write_text("".join(lines))
    assert train_chain(loaded(file)) == INTERRUPTED


@pytest.mark.slow
def test_curated_rows_feed_the_next_stage(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = scenes.rows(form="triplet", count=8)
    wanted = ("query", "positive", "negative")
    pairs.write_text("".join(json.dumps({k: row[k] for k in wanted}) + "\n" for row in rows))
    curation = {
        "dataset_name": str(pairs),
        "rate": {"judge": "likelihood", "model_name_or_path": "scenes", "engine": "transformers"},
        "filter": {"alpha": 0.0, "beta": 5.0, "gamma": 0.0},
    }
    recipe = tmp_path / "curate.yaml"
    recipe.write_text(yaml.safe_dump(curation), encoding="utf-8")
    stage = {"method": "reconstruction", "max_steps": 1}
    shared = {"dataset_rows": None}
    chain = loaded(chain_file(tmp_path, {"curate": str(recipe)}, stage, **shared))
    assert train_chain(chain) == 0
    assert (tmp_path / "run" / "stages" / "1-curate" / "rows.jsonl").is_file()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
