"""Two processes on a CPU: DDP and DeepSpeed ZeRO, every method, from recipe to model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grace_rl.rollout.store import read_rollouts
from grace_rl.train.run_directory import read_metrics

ROLLOUTS: dict[str, Any] = {
    "method": "grpo",
    "dataset_options": {"form": "quad"},
    "roles": {"query": {}, "positive": {}, "negative": {"train": False}},
    "rewards": [{"name": "contrastive"}, {"name": "length"}],
    "num_generations": 4,
    "per_device_train_batch_size": 12,  # 24 rollouts, 3 bundles of 8: the middle one lies on both
    "max_completion_length": 12,
    "print_rollouts_steps": 0,
}
PPO = ROLLOUTS | {"method": "ppo", "beta": 0.05, "num_iterations": 2, "save_steps": 4}
SFT: dict[str, Any] = {"method": "sft", "dataset_options": {"form": "sft"}}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
CHECKPOINTING = {"gradient_checkpointing": True}
EVALUATION = {"evaluation": {"dataset_splits": ["test"], "rows": 4}}

RUNS = {
    "ddp": {
        "grpo": ROLLOUTS | EVALUATION,
        "sft": SFT,
    },
    "zero1": {
        "grpo-untrained": ROLLOUTS | {"model_name_or_path": "scenes/untrained"},
    },
    "zero2": {
        "grpo": ROLLOUTS | CHECKPOINTING | {"reader": {"span": "context"}, "beta": 0.05},
        "ppo-lora": PPO | LORA,
        "sft": SFT | CHECKPOINTING,
    },
    "zero3": {
        "grpo": ROLLOUTS | CHECKPOINTING | EVALUATION,
        "grpo-lora": ROLLOUTS | LORA | CHECKPOINTING | EVALUATION,
        "grpo-frozen": ROLLOUTS | {"reader": {"weights": "frozen"}},
        "ppo": PPO | {"critic": "separate"},
        "sft-lora": SFT | LORA | CHECKPOINTING,
    },
}
"""Per mode, what each run adds to `EVERY`: a new method is one line."""

EVERY: dict[str, Any] = {
    "model_name_or_path": "scenes",
    "dtype": "float32",
    "dataset_name": "scenes",
    "dataset_rows": 24,
    "instruction": None,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "learning_rate": 1.0e-3,
    "seed": 0,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 4,
    "report_to": "none",
}

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def launch(
    *command: str, processes: int = 2, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run a Python program on several processes, with one thread each."""
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return subprocess.run(
        [*LAUNCHER, str(processes), *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def deepspeed(mode: str, folder: Path) -> dict[str, Any]:
    """Keys of a recipe for `ddp` or `zero1` to `zero3`."""
    if mode == "ddp":
        return {}
    file = folder / f"{mode}.json"
    stage = {"zero_optimization": {"stage": int(mode[-1])}}
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    auto = dict.fromkeys((*sizes, "gradient_clipping"), "auto")
    file.write_text(json.dumps(stage | auto), encoding="utf-8")
    return {"deepspeed": str(file)}


def skip_without(mode: str) -> None:
    if mode != "ddp" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(RUNS))
def test_runs_resume_and_leave_a_model(tmp_path: Path, mode: str) -> None:
    skip_without(mode)
    commands: list[dict[str, Any]] = []

    def train(name: str, output: str, **how: Any) -> None:
        arguments = ["train", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / output)]
        commands.append({"arguments": arguments, "interrupt_at": None, "exit": 0} | how)

    for name, settings in RUNS[mode].items():
        recipe = EVERY | settings | deepspeed(mode, tmp_path)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        train(name, name)
        train(name, f"{name}-cut", interrupt_at=4, exit=130)
        train(name, f"{name}-cut")
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    program = str(Path(__file__).with_name("several_runs.py"))
    done = launch(program, str(tmp_path / "commands.json"), timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    for name, settings in RUNS[mode].items():
        whole, cut = tmp_path / name, tmp_path / f"{name}-cut"
        loaded, report = AutoModelForCausalLM.from_pretrained(
            whole / "model", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        start = AutoModelForCausalLM.from_pretrained(start_of(settings, whole))
        moved = [
            not torch.equal(p, q)
            for p, q in zip(loaded.parameters(), start.parameters(), strict=True)
        ]
        assert any(moved)
        weights = [load_file(run / "model" / "model.safetensors") for run in (whole, cut)]
        for key, tensor in weights[0].items():
            assert torch.equal(weights[1][key], tensor), (name, key)
        steps = [line["step"] for line in read_metrics(cut)]
        assert steps == list(range(1, 9))
        if settings["method"] != "sft":
            assert read_rollouts(cut).to_pylist() == read_rollouts(whole).to_pylist()
        if "evaluation" in settings:
            rows = json.loads((whole / "evaluation.json").read_text(encoding="utf-8"))["rows"]
            assert len(rows) == 3


def start_of(settings: dict[str, Any], run: Path) -> Path:
    """Folder of the model that a run started from."""
    from grace_rl.data import scenes

    return run / "untrained" if "model_name_or_path" in settings else scenes.COLD_START
