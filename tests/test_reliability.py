"""The short form of benchmarks/reliability.py: the same code, a few kills, inputs and steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def measured(root: Path, *arguments: str) -> dict:
    script = [sys.executable, str(root / "benchmarks" / "reliability.py"), *arguments]
    result = subprocess.run(script, capture_output=True, text=True, cwd=root)
    assert result.stdout, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "processes", "count"),
    [("train", 1, 3), ("train", 2, 1), ("curate", 1, 2), ("embed", 1, 3), ("compare", 1, 1)],
)
def test_killed_at_random_moments_the_work_ends_as_if_it_had_not_been(
    root: Path, what: str, processes: int, count: int
) -> None:
    flags = ["--what", what, "--processes", str(processes), "--count", str(count)]
    result = measured(root, "kills", *flags)
    assert result["wrong"] == [] and result["kills"] == count


def test_generated_inputs_are_read_or_refused(root: Path) -> None:
    result = measured(root, "inputs", "--count", "400", "--seed", "1")
    assert result["wrong"] == []
    assert {name.partition(":")[0] for name in result["outcomes"]} >= {
        "recipe", "overrides", "rows", "tasks", "rollouts", "run records"
    }  # fmt: skip


@pytest.mark.slow
def test_a_value_of_a_key_trains_or_is_refused_by_its_key(root: Path) -> None:
    result = measured(root, "values", "--one_of", "211", "--seed", "5")
    assert result["wrong"] == [] and result["values"] > 10
    assert {name.partition(": ")[2] for name in result["outcomes"]} == {"runs", "refused"}


@pytest.mark.slow
def test_a_longer_run_keeps_its_memory_and_files(root: Path) -> None:
    result = measured(root, "long", "--steps", "100")
    assert result["wrong"] == [] and result["steps"] == 100
