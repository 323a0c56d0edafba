"""A name leads to an object: found, checked and described without running more than is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from grace_rl.errors import UserError, describe_error
from grace_rl.plugins import REWARDS, Plugin, argument_problems, docstring, find, installed
from grace_rl.run.printing import shown

pytestmark = pytest.mark.usefixtures("cold_python")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


class Target:
    """Takes one of each."""

    def __init__(
        self,
        number: float = 1.0,
        count: int = 1,
        pair: tuple[float, float] = (0.0, 1.0),
        kind: Literal["a", "b"] = "a",
        names: Sequence[str] | None = None,
        place: Path = Path(),
        table: dict[str, Any] | None = None,
        switch: bool = False,
    ) -> None: ...


@pytest.mark.parametrize(
    "keywords",
    [
        {"number": 2, "count": 3, "pair": [1, 2.5], "kind": "b", "names": ["x"], "table": {"y": 1}},
        {"place": "a/b", "names": None, "switch": True},
    ],
)
def test_what_yaml_can_mean_is_taken(keywords: dict[str, Any]) -> None:
    assert argument_problems(Target, keywords) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", "1"),
        ("number", True),
        ("number", float("nan")),
        ("number", float("inf")),
        ("count", 1.5),
        ("count", False),
        ("pair", [1, "x"]),
        ("pair", [1, 2, 3]),
        ("kind", "c"),
        ("names", "x"),
        ("names", [1]),
        ("table", [1]),
        ("switch", 1),
        ("nmber", 1),
    ],
)
def test_a_wrong_keyword_is_named(key: str, value: object) -> None:
    [(place, said)] = argument_problems(Target, {key: value})
    assert place.split(".")[0] == key and said


def test_a_secret_that_is_wrong_is_not_shown() -> None:
    def client(batch: list, api_key: int = 0, size: int = 1) -> None: ...

    [(_, said), _] = argument_problems(client, {"api_key": "sk-abc-123", "size": 2**60})
    assert "sk-abc-123" not in shown(said)


def test_a_functions_first_parameter_is_its_callers() -> None:
    def judge(pairs: list, strict: bool, scale: float = 1.0) -> list:
        return [scale for _ in pairs]

    assert argument_problems(judge, {"strict": True}) == []
    found = argument_problems(judge, {"pairs": [], "scale": "x"})
    assert [key for key, _ in found] == ["pairs", "scale", ""]
    assert Plugin("judge", judge, {"strict": True, "scale": 2.0}).object([1, 2]) == [2.0, 2.0]


def test_a_file_runs_once_unless_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "counted.py"
    file.write_text("runs = []\n\n\ndef f(batch): ...\n", encoding="utf-8")
    first, again = (find("counted.py:f", tmp_path) for _ in range(2))
    assert first is again
    file.write_text("def f(batch): ...\n\n\ndef g(batch): ...\n", encoding="utf-8")
    assert find("counted.py:f", tmp_path) is not first
    with pytest.raises(UserError, match="it has f, g$"):
        find("counted.py", tmp_path)


def test_descriptions_import_nothing(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        '1 / 0\n\n\nclass Loud:\n    """Says it."""\n', encoding="utf-8"
    )
    code = "import sys; from grace_rl.plugins import docstring; print(docstring('loud:Loud'))"
    said = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert said.stdout == "Says it.\n", said.stderr
    assert all(docstring(place) for place in installed(REWARDS).values())
    with pytest.raises(UserError):
        docstring("no_such_module:Name")


def test_the_list_of_rewards_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from grace_rl.cli import main; main(['rewards', 'list']);"
        "print(sorted({'torch', 'trl', 'vllm', 'transformers', 'openai'} & set(sys.modules)))"
    )
    listed = python("-c", code, cwd=tmp_path)
    assert listed.stdout.splitlines()[-1] == "[]", listed.stderr


def test_an_exception_without_words_is_described() -> None:
    class Mute(BaseException):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    assert "Mute" in describe_error(Mute())


# -- names that belong to the user ----------------------------------------------------------------


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """A working directory in which the user has files of other packages' names."""
    for name in ("trl", "torch", "transformers", "datasets", "judge", "contrastive", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user own')", encoding="utf-8")
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('own')", encoding="utf-8")
    return tmp_path


def test_files_of_the_user_hide_nothing(occupied: Path) -> None:
    checked = python("-m", "grace_rl", "rewards", "check", "contrastive", cwd=occupied)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (occupied / "rewards.py").write_text("1 / 0", encoding="utf-8")
    listed = python("-m", "grace_rl", "rewards", "list", cwd=occupied)
    assert listed.returncode == 0 and "contrastive" in listed.stdout, listed.stderr
    (occupied / "mine.py").write_text("def f(batch):\n    return batch.embeddings[:, 0]\n")
    own = python("-m", "grace_rl", "rewards", "show", "mine:f", cwd=occupied)
    assert own.returncode == 0, own.stderr  # it is still found there


@pytest.mark.slow
def test_launchers_find_the_project_beside_a_users_rewards(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("1 / 0", encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone")
    accelerate = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    for launcher in (torchrun, accelerate):
        listed = python(*launcher, "-m", "grace_rl", "rewards", "list", cwd=tmp_path)
        assert "contrastive" in listed.stdout, listed.stderr


def test_no_module_imports_the_shipped_rewards(root: Path) -> None:
    """They are found as anybody's are, by their entry points."""
    importing = [
        path
        for path in (root / "grace_rl").rglob("*.py")
        if "templates" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        if str(name).split(".")[0] == "grace_rl_rewards"
    ]
    assert importing == []
