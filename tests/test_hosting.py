"""Files for others' machines: they parse, and name what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HOSTED = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]


@pytest.mark.parametrize("path", HOSTED, ids=lambda path: path.name)
def test_it_parses(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_workflows_run_targets_that_there_are() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    run = " ".join(step.get("run", "") for step in steps)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z-]+)", run))
    assert {"lint", "test-fast", "test", "docs"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_ruff_is_the_same_everywhere() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    version = next(one["rev"] for one in hooks["repos"] if "ruff" in one["repo"]).lstrip("v")
    assert f"ruff>={version}" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_cluster_examples_name_files_and_options_that_there_are() -> None:
    slurm = ROOT / "examples" / "cluster" / "slurm.sh"
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", slurm], check=True)
    sky = yaml.safe_load((slurm.parent / "skypilot.yaml").read_text(encoding="utf-8"))
    assert (ROOT / sky["envs"]["RECIPE"]).is_file() and sky["num_nodes"] == 2
    for text in (slurm.read_text(encoding="utf-8"), sky["run"]):
        assert "recipes/accelerate/multi-node.yaml" in text
        assert "--machine_rank" in text and "--main_process_ip" in text
