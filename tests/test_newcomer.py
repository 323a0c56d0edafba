"""A newcomer's path: write a reward, check it, train with it, look at the run, replay another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = """\
model_name_or_path: scenes
dataset_name: scenes
dataset_rows: 64
instruction: null
reader: {span: bottleneck, layers: [0, -1]}
rewards:
  - {name: mine.py:Mine, shortest: 3}
  - {name: length}
num_generations: 4
per_device_train_batch_size: 16
max_completion_length: 24
max_steps: 20
learning_rate: 1e-4
logging_steps: 5
bf16: false
use_cpu: true
report_to: none
"""


@pytest.mark.slow
def test_from_an_idea_to_a_replay(tmp_path):
    def run(*arguments):
        result = subprocess.run(
            [sys.executable, "-m", "grace_rl", *arguments],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("rewards", "new", "mine.py", "--kind", "text")
    source = (tmp_path / "mine.py").read_text(encoding="utf-8")
    edited = source.replace("word not in known", "len(word) > 4").replace(
        "shortest: int = 2", "shortest: int = 1"
    )
    assert edited.count("\n") == source.count("\n") and edited != source  # two lines
    (tmp_path / "mine.py").write_text(edited, encoding="utf-8")
    assert "no errors" in run("rewards", "check", "mine.py:Mine", "--arguments", "{shortest: 3}")

    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    run("train", "mine.yaml")
    assert "no errors" in run("rewards", "check", "mine.py:Mine", "--rollouts", "runs/mine")
    assert "Mine" in run("inspect", "runs/mine", "--terminal")

    (tmp_path / "other.yaml").write_text("rewards: [{name: contrastive}]\n", encoding="utf-8")
    shown = run("replay", "runs/mine", "--rewards", "other.yaml")
    assert "another rollout would have been the best" in shown
    assert (tmp_path / "runs/mine/replays/other.parquet").is_file()
