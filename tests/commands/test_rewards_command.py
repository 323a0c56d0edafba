"""`grace-rl rewards` and `replay`: what a newcomer does before and after a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grace_rl.cli import main
from grace_rl.credit.by_group import GroupCredit
from grace_rl.reward import RewardRuntime, load_rewards
from grace_rl.reward.example import random_batch
from grace_rl.reward.scores import with_scores
from grace_rl.rollout.rollouts import Rollouts, row_fields
from grace_rl.rollout.store import write_rollouts

ROOT = Path(__file__).parents[2]
KINDS = ("contrastive", "text", "step", "remote")


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "grace_rl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
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


@pytest.fixture
def stored(tmp_path):
    """A run with one stored step, whose recipe names code of its own."""
    batch = random_batch("triplet")
    rewards = load_rewards(["contrastive"], ".")
    pool = batch.pool
    columns = {name: getattr(pool, name) for name in row_fields(pool)}
    columns["trained"] = torch.arange(len(pool)) < len(batch)
    world = Rollouts(**columns, step=1, notes={"credit": GroupCredit().notes(0.0)})
    world = with_scores(world, rewards, RewardRuntime(rewards).score(batch))
    run = tmp_path / "run"
    run.mkdir()
    write_rollouts(run, 1, world.with_advantages(GroupCredit()(world.trained_rows)).to_arrow())
    (run / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n\n"
        "class Evil:\n    def __call__(self, batch): ...\n",
        encoding="utf-8",
    )
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    recipe["rewards"] = [
        {"name": "evil.py:Evil"},
        {"name": f"{run}/evil.py:Evil"},
        {"name": "subprocess:Popen", "args": ["touch", f"{run}/ran"]},
    ]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return run


def test_a_replay_shows_what_other_rewards_would_change(stored, tmp_path, capsys):
    new = tmp_path / "new.yaml"
    new.write_text("rewards: [{name: consistency}]", encoding="utf-8")
    assert main(["replay", str(stored), "--rewards", str(new), "--steps", "1", "1"]) == 0
    assert "8 groups; in " in capsys.readouterr().out
    assert (stored / "replays" / "new.parquet").is_file()
    assert main(["replay", str(stored), "--rewards", str(new), "--show", "-1"]) == 2


def test_checking_on_the_rollouts_of_a_run_runs_nothing_that_it_names(stored, capsys):
    assert main(["rewards", "check", "contrastive", "--rollouts", str(stored)]) == 0
    assert f"step 1 of {stored}" in capsys.readouterr().out.replace("\n", "")
    assert main(["replay", str(stored)]) == 2  # its own rewards are code, and ask for a word
    assert not (stored / "ran").exists()


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
