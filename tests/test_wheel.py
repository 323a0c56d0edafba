"""What is built installs into an empty environment, and its first steps run from anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from grace_rl import __version__

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("grace_rl", "rewards", "recipes", "docs", "setup.cfg", "pyproject.toml", "README.md")
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


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
def test_the_wheel_installs_and_its_first_steps_run(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # so that nothing that is built stays behind
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*SHIPPED, "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=unwanted)
        else:
            shutil.copy(source, tree / name)
    call(sys.executable, "-c", BUILD, cwd=tree)
    [wheel], [sdist] = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    assert __version__ in wheel.name and __version__ in sdist.name
    with zipfile.ZipFile(wheel) as built, tarfile.open(sdist) as source:
        in_wheel = set(built.namelist())
        in_sdist = {name.partition("/")[2] for name in source.getnames()}
    for name in in_wheel:
        if name.startswith("grace_rl/"):
            assert name in in_sdist, f"{name} is not in the sdist"
    missing = {
        str(path.relative_to(tree))
        for path in (tree / "grace_rl").rglob("*")
        if path.is_file() and str(path.relative_to(tree)) not in in_wheel
    }
    assert missing == set()

    place = tmp_path / "env"
    venv.create(place, symlinks=True)
    [packages] = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as built:
        built.extractall(packages)  # as an installer does with a wheel of pure Python
    theirs = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "packages.pth").write_text("\n".join(theirs))  # what it depends on
    python, away = place / "bin" / "python", tmp_path / "away"
    away.mkdir()
    where = call(python, "-c", "import grace_rl; print(grace_rl.__file__)", cwd=away)
    assert where.startswith(str(packages))
    assert call(python, "-m", "grace_rl", "--version", cwd=away) == f"grace-rl {__version__}\n"
    call(python, "-m", "grace_rl", "new", "mine", cwd=away)
    call(python, "-m", "grace_rl", "train", "recipe.yaml", "--max_steps", "1", cwd=away / "mine")
    assert (away / "mine" / "runs" / "first" / "model" / "model.safetensors").is_file()
