"""Stored rollouts come back as the batches that rewards saw, and score as they did."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from grace_rl.credit.by_group import GroupCredit
from grace_rl.errors import UserError
from grace_rl.inspect import Run
from grace_rl.inspect.replays import replayed_groups as shown_groups
from grace_rl.reward import RewardRuntime, RewardSpec, load_rewards
from grace_rl.reward.example import random_batch
from grace_rl.reward.replay import replay, replay_table, replayed_groups, write_replay
from grace_rl.reward.scores import with_scores
from grace_rl.reward.stored import stored_batch, stored_steps
from grace_rl.rollout.rollouts import Rollouts, row_fields
from grace_rl.rollout.store import read_rollouts, write_rollouts

REWARDS = [RewardSpec("contrastive"), RewardSpec("length", weight=0.5)]


@pytest.fixture
def run(tmp_path):
    """A run with two stored steps, scored by `REWARDS`, and their batches."""
    batches = {}
    for step, form in ((1, "triplet"), (2, "quad")):
        batch = random_batch(form, seed=step)
        rewards = load_rewards(REWARDS, ".")
        world = with_scores(as_table(batch, step), rewards, RewardRuntime(rewards).score(batch))
        world = world.with_advantages(GroupCredit()(world.trained_rows))
        write_rollouts(tmp_path, step, world.to_arrow())
        batches[step] = batch
    return tmp_path, batches


def as_table(batch, step=1):
    """The pool of a batch as the table of a step."""
    pool = batch.pool
    columns = {name: getattr(pool, name) for name in row_fields(pool)}
    columns["trained"] = torch.arange(len(pool)) < len(batch)
    return Rollouts(**columns, step=step, notes={"credit": GroupCredit().notes(0.0)})


# -- other rewards ---------------------------------


def test_a_stored_batch_scores_as_it_did(run):
    folder, batches = run
    runtime = RewardRuntime(load_rewards(REWARDS, "."))
    for stored in stored_steps(folder):
        batch, original = stored_batch(stored, folder), batches[stored.step]
        assert torch.equal(batch.side, original.side)
        assert torch.equal(batch.pool.embeddings, original.pool.embeddings)
        again, first = runtime.score(batch), runtime.score(original)
        assert same(again.values, first.values)


def test_the_opposite_reward_turns_every_group_around(run):
    folder, _ = run
    opposite = load_rewards([RewardSpec("contrastive", weight=-1.0)], ".")
    plain = load_rewards([RewardSpec("contrastive")], ".")
    there = [group for pair in replay(folder, plain) for group in replayed_groups(*pair)]
    back = [group for pair in replay(folder, opposite) for group in replayed_groups(*pair)]
    for one, other in zip(there, back, strict=True):
        assert one.after == pytest.approx([-value for value in other.after], abs=1e-5)
        assert other.best_changed


def test_rewards_that_say_nothing_put_no_other_rollout_first(run):
    """The page and the command agree, also on rollouts that are equally good."""
    folder, _ = run

    def constant(batch):
        return [1.0] * len(batch)

    def brief(batch):
        return [-float(len(rationale) > 11) for rationale in batch.rationales]

    (folder / "status.json").write_text("{}", encoding="utf-8")
    for reward in (constant, brief):
        pairs = list(replay(folder, load_rewards([reward], ".")))
        groups = [group for pair in pairs for group in replayed_groups(*pair)]
        write_replay(folder, reward.__name__, [replay_table(*pair) for pair in pairs])
        table = shown_groups(Run(folder), reward.__name__)
        assert table["best_changed"].sum() == sum(group.best_changed for group in groups)
        assert not any(group.best_changed for group in groups)


def test_a_step_without_embeddings_cannot_be_scored_again(tmp_path):
    names = ("example", "group", "role", "text", "rationale", "token_ids", "truncated")
    values = (0, 0, "query", "a", "b", [1], False)
    write_rollouts(tmp_path, 1, {n: [v] for n, v in zip(names, values, strict=True)})
    with pytest.raises(UserError, match="step 1: they were stored without embeddings"):
        list(stored_steps(tmp_path))


def test_fields_of_the_rows_are_kept_where_json_keeps_them(tmp_path):
    table = as_table(random_batch("triplet"))
    rows = [{"number": 0.1 + i, "nested": {"a": [i, None]}} for i in range(4)]
    columns = {name: [rows[e][name] for e in table.example.tolist()] for name in rows[0]}
    columns["object"] = [object()] * len(table)
    table = dataclasses.replace(table, columns=columns)
    write_rollouts(tmp_path, 1, table.with_advantages(torch.zeros(32)).to_arrow())
    [stored] = stored_steps(tmp_path)
    assert stored.columns == {name: columns[name] for name in rows[0]}


def test_a_replay_is_kept_beside_the_run_and_replaces_its_older_self(run):
    folder, _ = run
    tables = [replay_table(*pair) for pair in replay(folder, load_rewards(REWARDS, "."))]
    first = write_replay(folder, "mine", tables)
    assert write_replay(folder, "mine", tables[:1]) == first
    assert pq.read_table(first).num_rows == tables[0].num_rows
    assert read_rollouts(folder).num_rows > 0  # the rollouts themselves are untouched


def test_a_run_without_rollouts_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no rollouts are stored"):
        list(stored_steps(tmp_path))


# -- whose word it takes ---------------------------------


def replay_command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grace_rl", "replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize(
    "reward",
    [
        {"name": "subprocess:Popen", "args": ["touch", "ran"]},
        {"name": "evil.py:touch"},
        {"name": "stepwise", "potential": {"name": "evil.py:touch"}},
        {"name": "judge", "url": "http://127.0.0.1:9/v1"},
    ],
)
def test_what_a_run_names_is_not_run_unasked(run, reward):
    folder, _ = run
    source = "from pathlib import Path\nPath('ran').touch()\ndef touch(batch): return [0.0] * 32\n"
    (folder / "evil.py").write_text(source, encoding="utf-8")
    (folder / "recipe.yaml").write_text(json.dumps({"rewards": [reward]}), encoding="utf-8")
    done = replay_command(str(folder), folder=folder)
    assert done.returncode == 2, done.stderr
    assert "--rewards" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "ran").exists()


def test_installed_rewards_are_replayed_without_a_word(run):
    folder, _ = run
    (folder / "recipe.yaml").write_text("rewards: [{name: contrastive}]", encoding="utf-8")
    done = replay_command(str(folder), "--show", "0", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "replays" / "own.parquet").is_file()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=1e9), other.nan_to_num(nan=1e9))
