"""`grace-rl rewards` and `replay`: what a newcomer does before and after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grace_rl.cli import main
from grace_rl.rollout.store import write_rollouts

ROOT = Path(__file__).parents[2]
KINDS = ("contrastive", "text", "step", "remote")


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "grace_rl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environment,
    )


def test_list_names_every_reward_with_its_needs_and_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["rewards", "list"]) == 0
    shown = capsys.readouterr().out
    assert "InfoNCE as a reward" in shown and "grace_rl_rewards.length:Length" in shown
    assert "grace-rl[judge]" in shown  # not taken for markup
    assert "not stated" not in shown  # every shipped reward says what it needs


def test_show_has_signature_file_and_docstring(capsys):
    assert main(["rewards", "show", "consistency"]) == 0
    shown = capsys.readouterr().out
    assert "consistency.py" in shown and "Recommendations:" in shown
    assert main(["rewards", "show", "length"]) == 0
    assert "length(margin: float = 1.0, cost_per_token" in capsys.readouterr().out  # no quotes
    assert main(["rewards", "show", "consistancy"]) == 2
    assert "did you mean consistency" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_reward_works_and_so_does_its_test(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["rewards", "new", "own_words.py", "--kind", kind]) == 0
    assert "class OwnWords" in (tmp_path / "own_words.py").read_text(encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_own_words.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout
    if kind != "remote":  # that one asks a service
        assert main(["rewards", "check", "own_words.py:OwnWords"]) == 0


def test_nothing_is_overwritten_and_bad_names_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_mine.py").write_text("precious", encoding="utf-8")
    assert main(["rewards", "new", "mine.py"]) == 2
    assert not (tmp_path / "mine.py").exists()
    assert main(["rewards", "new", "not-a-name.py"]) == 2
    assert main(["rewards", "new", "nowhere/mine.py"]) == 2
    assert main(["rewards", "new", "_1.py"]) == 2  # would make the class "1"
    assert list(tmp_path.iterdir()) == [tmp_path / "test_mine.py"]
    errors = capsys.readouterr().err
    assert "test_mine.py: exists already" in errors and "plain name" in errors
    assert "there is no folder nowhere" in errors


def test_check_explains_mistakes_with_the_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(
        "def late(batch):\n    return [1.0 / 0 for _ in batch.texts]\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["rewards", "check", "bad.py:late"]) == 2
    assert "ZeroDivisionError" in (shown := capsys.readouterr().out) and "bad.py:2" in shown
    assert main(["rewards", "check", "bad.py:late", "--arguments", "[1]"]) == 2
    assert "must be a mapping" in capsys.readouterr().err
    assert main(["rewards", "check", "length", "--arguments", "{margn: 1}"]) == 2
    assert "did you mean margin" in capsys.readouterr().err
    assert main(["rewards", "check", "length", "--arguments", "{1: 1}"]) == 2
    assert "rewards[0].1: unknown argument" in capsys.readouterr().err
    assert main(["rewards", "check", "bad.py"]) == 2
    assert "it has late" in capsys.readouterr().err
    (tmp_path / "waits.py").write_text(
        "import time\n\ndef waits(batch):\n    time.sleep(60)\n", encoding="utf-8"
    )
    assert main(["rewards", "check", "waits.py:waits", "--timeout", "0.1"]) == 2
    assert "no answer within 0.1 s" in capsys.readouterr().out


def test_check_says_that_it_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grace_rl.commands.rewards.PATIENCE", 0.0)
    (tmp_path / "slow.py").write_text(
        "import asyncio\n\nasync def slow(batch):\n    await asyncio.sleep(0.1)\n"
        "    return [float(len(r)) for r in batch.rationales]\n",
        encoding="utf-8",
    )
    assert main(["rewards", "check", "slow.py:slow"]) == 0
    assert "slow.py:slow: no answer for 0.0 s" in capsys.readouterr().err


def test_a_replay_says_where_it_differs_from_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    recipe += "false_negatives: {guide: scenes}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    embedding = [[1.0, 0.0], [0.0, 1.0]]
    columns = {"example": [0, 0], "group": [0, 0], "role": ["query"] * 2, "text": ["a"] * 2}
    columns |= {"rationale": ["b", "c"], "token_ids": [[1], [2]], "truncated": [False] * 2}
    write_rollouts(tmp_path, 1, columns | {"advantage": [1.0, -1.0], "embedding": embedding})
    new = tmp_path / "new.yaml"
    new.write_text("rewards: [{name: length}]", encoding="utf-8")
    assert main(["replay", str(tmp_path), "--rewards", str(new), "--steps", "1", "1"]) == 0
    shown = capsys.readouterr().out
    assert "the run has false_negatives: a replay has no guide" in shown
    assert "1 groups; in 0 another" in shown
    assert main(["replay", str(tmp_path), "--rewards", str(new), "--show", "-1"]) == 2


def test_columns_of_canned_rows_can_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(
        "def states(completions, answer, **kwargs):\n"
        "    return [float(a in c) for c, a in zip(completions, answer)]\n",
        encoding="utf-8",
    )
    assert main(["rewards", "check", "r.py:states"]) == 2
    assert main(["rewards", "check", "r.py:states", "--columns", "{answer: warm}"]) == 0


@pytest.mark.slow
def test_the_example_package_is_found_by_its_entry_point(tmp_path):
    target = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--no-index", "--target", str(target)),
            str(ROOT / "examples" / "plain_words"),
        ],
        check=True,
        cwd=tmp_path,
    )
    path = f"{target}{os.pathsep}{ROOT}"
    assert (
        "plain_words.reward:PlainWords"
        in run("rewards", "list", cwd=tmp_path, PYTHONPATH=path).stdout
    )
    checked = run(
        *("rewards", "check", "plain_words", "--arguments", "{longest: 5}"),
        cwd=tmp_path,
        PYTHONPATH=path,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
