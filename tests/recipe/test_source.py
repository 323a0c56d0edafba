"""Text that is made to hang is an error at once; numbers arrive as they were written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from grace_rl.errors import UserError
from grace_rl.evaluate.comparison import load_comparison
from grace_rl.evaluate.tasks import load_tasks
from grace_rl.recipe.curation import load_curation
from grace_rl.recipe.recipe import recipe_keys
from grace_rl.recipe.source import read_source
from grace_rl.recipe.stages import load

READERS: dict[str, Callable[[Path], Any]] = {
    "recipe": load,
    "curation": load_curation,
    "comparison": load_comparison,
    "tasks": load_tasks,
}
LAUGHS = "\n".join(
    ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
)
BOMBS = {
    "aliases": LAUGHS,
    "list of aliases": f"- {{{LAUGHS.replace(chr(10), ', ')}}}",
    "flow": "a: " + "[" * 3000 + "]" * 3000,
    "list": "- " + "[" * 3000 + "]" * 3000,
    "mappings": "- " + "{a: " * 3000 + "1" + "}" * 3000,
    "indented": "\n".join(" " * i + f"k{i}:" for i in range(3000)),
    "digits": "dataset_rows: " + "9" * 5000,
    "digits in a list": "- {name: a, rows: " + "9" * 5000 + "}",
    "rows": "model_name_or_path: scenes\ndataset_name: scenes\ndataset_rows: 1000000000000\n",
    "itself": "a: &x [*x]",
    "long": "a: [" + "1, " * 200_000 + "]",
}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    recipe_keys("grpo")  # imports TRL, which takes longer than any bomb may
    with contextlib.suppress(ImportError):
        import_module("mteb")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_an_error_in_under_two_seconds(tmp_path: Path, bomb: str, reader: str) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[bomb], encoding="utf-8")
    began = time.process_time()  # of this process alone: a busy machine is not our fault
    with pytest.raises(UserError) as error:
        READERS[reader](file)
    assert time.process_time() - began < 2
    assert all(len(problem) < 400 for problem in error.value.problems)


@pytest.mark.parametrize("bomb", ["[" * 3000, LAUGHS.replace("\n", ", ").join("{}"), "9" * 5000])
def test_bombs_in_an_override(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: 1", encoding="utf-8")
    began = time.process_time()
    (problem,) = read_source(file, ["--b", bomb]).problems
    assert problem.startswith("--b: ") and time.process_time() - began < 2


@pytest.mark.parametrize(
    "text", [".nan", ".inf", "-.inf", "1e400", "1e-400", "9007199254740993", "-9007199254740993"]
)
def test_a_number_that_would_change_is_a_mistake(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"a:\n  b: [{text}]\n", encoding="utf-8")
    (problem,) = read_source(file).problems
    assert problem.startswith(f"{file}:2: a.b.0: ")
    file.write_text("a: 1\n", encoding="utf-8")
    (problem,) = read_source(file, ["--c.d", text]).problems
    assert problem.startswith("--c.d: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [("9007199254740992", 2**53), ("-0.0", 0.0), ("0e-400", 0.0), ("007", 7), ("1e-4", 1e-4)],
)
def test_other_numbers_are_kept(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "a.yaml").write_text(f"a: {text}\n", encoding="utf-8")
    source = read_source(tmp_path / "a.yaml", ["--b", text])
    assert source.tree == {"a": value, "b": value} and not source.problems
    assert type(source.tree["a"]) is type(value)


def test_home_is_expanded_wherever_a_path_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: {b: [~/x]}\nc: ~\nd: ~other\n", encoding="utf-8")
    source = read_source(tmp_path / "a.yaml", ["--e", "~/y"])
    home = Path.home()
    assert source.tree == {
        "a": {"b": [str(home / "x")]}, "c": None, "d": "~other", "e": str(home / "y"),
    }  # fmt: skip


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufeffa: 1", encoding="utf-8")
    assert read_source(tmp_path / "a.yaml").tree == {"a": 1}
