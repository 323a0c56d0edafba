"""What is shipped, and that the promises of setup.cfg hold."""

from __future__ import annotations

import ast
import configparser
import hashlib
import importlib
import os
import re
import sys
from pathlib import Path

import grace_rl

ROOT = Path(__file__).resolve().parents[1]


def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_every_entry_point_exists():
    groups = config()["options.entry_points"]
    for line in (groups["console_scripts"] + groups["grace_rl.rewards"]).strip().splitlines():
        module, _, name = line.partition("=")[2].strip().partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_shipped_reward_is_an_entry_point():
    lines = config()["options.entry_points"]["grace_rl.rewards"].strip().splitlines()
    files = {path.stem for path in (ROOT / "rewards").glob("*.py")} - {"__init__"}
    assert {line.split("=")[0].strip() for line in lines} == files


def test_the_extras_are_those_promised():
    assert set(config()["options.extras_require"]) == {
        "vllm",
        "deepspeed",
        "mteb",
        "compare",
        "judge",
        "inspect",
        "ray",
        "docs",
        "dev",
    }


def test_lazy_names_are_all_there():
    for name in grace_rl.__all__:
        assert getattr(grace_rl, name) is not None


def test_the_licence_is_the_standard_text():
    words = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert words.startswith("Apache License Version 2.0, January 2004") and words.endswith(
        "limitations under the License."
    )
    assert hashlib.sha256(words.encode()).hexdigest().startswith(LICENCE_WORDS)


def test_ci_runs_the_command_of_the_readme():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "make test" in commands
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


LICENCE_WORDS = "0ffddef9e48f8a09"


def test_what_modules_import_at_once_is_installed_with_the_package():
    """CI has the extra dev, so only this test (or a plain install) notices a missing one."""
    extra = {"inspect", "local_tasks.py", "mteb_encoder.py"}  # their commands name the extra
    names = {"pyyaml": "yaml"}
    lines = config()["options"]["install_requires"].strip().splitlines()
    base = {re.split(r"[<>=!~ ]", line.strip())[0] for line in lines if line.strip()}
    base = {names.get(name, name).replace("-", "_") for name in base}
    known = base | set(sys.stdlib_module_names) | {"grace_rl", "grace_rl_rewards"}
    missing = {}
    for path in [*(ROOT / "grace_rl").rglob("*.py"), *(ROOT / "rewards").glob("*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module]
            new = {name.partition(".")[0] for name in found} - known
            if new and not extra & set(path.relative_to(ROOT).parts):
                missing[str(path.relative_to(ROOT))] = new
    assert missing == {}
