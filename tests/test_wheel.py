"""What is built installs into an empty environment, and its first steps run from anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from grace_rl import __version__

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("grace_rl", "rewards", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
FEW = [
    "--max_steps", "10", "--save_steps", "10", "--logging_steps", "10", "--dataset_rows", "64",
    "--per_device_train_batch_size", "32", "--evaluation.rows", "10",
]  # fmt: skip


def call(*words: str | Path, cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_and_the_quickstarts_first_steps_run(tmp_path: Path) -> None:
    tree, dist = tmp_path / "tree", tmp_path / "dist"  # so that nothing that is built stays behind
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=unwanted)
        else:
            shutil.copy(source, tree / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    call(sys.executable, "-c", SDIST, dist, cwd=tree)
    [sdist] = dist.glob("*.tar.gz")
    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", dist, sdist, cwd=tmp_path)
    [wheel] = dist.glob("*.whl")
    assert __version__ in wheel.name and __version__ in sdist.name
    with zipfile.ZipFile(wheel) as built:
        in_wheel = set(built.namelist())
    missing = {
        str(path.relative_to(tree))
        for path in (tree / "grace_rl").rglob("*")
        if path.is_file() and str(path.relative_to(tree)) not in in_wheel
    }
    assert missing == set()

    place, away = tmp_path / "env", tmp_path / "away"
    venv.create(place, symlinks=True)
    python, program = place / "bin" / "python", place / "bin" / "grace-rl"
    call(*pip, "--python", python, "install", *offline, wheel, cwd=tmp_path)
    [packages] = place.glob("lib/python*/site-packages")
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "packages.pth").write_text("\n".join(theirs))  # what it depends on
    away.mkdir()
    where = call(python, "-c", "import grace_rl; print(grace_rl.__file__)", cwd=away)
    assert where.startswith(str(packages))
    assert call(program, "--version", cwd=away) == f"grace-rl {__version__}\n"
    call(program, "new", "mine", cwd=away)
    call(program, "train", "recipe.yaml", "--max_steps", "1", cwd=away / "mine")
    assert (away / "mine" / "runs" / "first" / "model" / "model.safetensors").is_file()
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", away)
    call(program, "train", "quickstart.yaml", *FEW, cwd=away)
    run = away / "runs" / "quickstart"
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
