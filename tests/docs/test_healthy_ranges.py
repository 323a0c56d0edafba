"""docs/troubleshooting.md names every metric that runs really log, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grace_rl.cli import main
from grace_rl.run.records import read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
RECIPE = """
method: {method}
model_name_or_path: scenes
dtype: float32
dataset_name: scenes
dataset_rows: 32
dataset_options: {{form: triplet}}
instruction: null
roles: {{query: {{}}, positive: {{}}, negative: {{}}}}
rewards: [{{name: contrastive}}, {{name: length}}, {{name: format}}, {{name: hard_negative}}{more}]
num_generations: 2
per_device_train_batch_size: 12
max_completion_length: 8
max_steps: 2
beta: 0.01
use_cpu: true
bf16: false
gradient_checkpointing: false
logging_steps: 1
save_strategy: "no"
print_rollouts_steps: 0
report_to: none
"""
ELSEWHERE = re.compile(  # what these two short runs do not have
    r"sampling/|alarms/"  # vLLM
    r"|shaping/beta_"  # rationales of several segments
    r"|false_negatives/"  # a guide
    r"|anchors/"  # anchors that are kept
)


def documented() -> list[str]:
    table = PAGE.read_text(encoding="utf-8").partition("## Healthy ranges")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in first for name in re.findall(r"`([^`]+)`", cell) if name != "beta"]


def pattern(name: str) -> str:
    return re.escape(name).replace("<label>", "[^/]+").replace("<k>", r"\d+")


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    names: set[str] = set()
    for method, more in (("grpo", ", {name: stepwise}"), ("ppo", "")):
        folder = tmp_path_factory.mktemp(method)
        recipe = RECIPE.format(method=method, more=more) + "reader_loss: {weight: 0.1}\n"
        recipe += "reader: {span: joint}\n" if method == "grpo" else ""
        (folder / "recipe.yaml").write_text(recipe)
        run = folder / "run"
        assert main(["train", str(folder / "recipe.yaml"), "--output_dir", str(run)]) == 0
        names |= {name for line in read_metrics(run) for name in line}
    return names


def test_every_logged_metric_has_a_healthy_range(logged):
    patterns = [re.compile(pattern(name)) for name in documented()]
    missing = [name for name in logged if not any(p.fullmatch(name) for p in patterns)]
    assert not missing


def test_no_range_is_that_of_a_metric_nobody_logs(logged):
    stale = [
        name
        for name in documented()
        if not ELSEWHERE.match(name) and not any(re.fullmatch(pattern(name), n) for n in logged)
    ]
    assert not stale


def test_no_metric_has_two_ranges():
    names = documented()
    assert len(names) > 60 and len(set(names)) == len(names)
