"""Stored rollouts come back as the batches that rewards saw."""

from __future__ import annotations

import pytest
import torch

from grace_rl.errors import UserError
from grace_rl.inspect import Run
from grace_rl.inspect.replays import replayed_groups
from grace_rl.reward import RewardRuntime, RewardSpec, load_rewards
from grace_rl.reward.example import random_batch
from grace_rl.reward.replay import advantages as grpo_advantages
from grace_rl.reward.replay import replay, write_replay
from grace_rl.reward.runtime import weighted_totals
from grace_rl.reward.stored import stored_steps
from grace_rl.rollout.store import read_rollouts, write_rollouts

REWARDS = [RewardSpec("contrastive"), RewardSpec("length", weight=0.5)]


@pytest.fixture
def run(tmp_path):
    """A run with two stored steps, scored by `REWARDS`, and their batches."""
    batches = {}
    for step, form in ((1, "triplet"), (2, "quad")):
        batch = random_batch(form, seed=step)
        runtime = RewardRuntime(load_rewards(REWARDS, "."))
        scored = runtime.score(batch)
        advantage = grpo_advantages(
            weighted_totals(scored.rewards, runtime.weights), batch.group, "group"
        )
        pool, anchors = batch.pool, [None] * (len(batch.pool) - len(batch))
        columns = {
            "example": pool.example.tolist(),
            "group": pool.group.tolist(),
            "role": pool.roles,
            "text": pool.texts,
            "rationale": pool.rationales,
            "token_ids": pool.token_ids,
            "truncated": pool.truncated.tolist(),
            "advantage": advantage.tolist() + anchors,
            "embedding": pool.embeddings.tolist(),
        }
        write_rollouts(tmp_path, step, columns)
        batches[step] = batch
    return tmp_path, batches


def test_a_stored_batch_scores_as_it_did(run):
    folder, batches = run
    runtime = RewardRuntime(load_rewards(REWARDS, "."))
    for stored in stored_steps(folder):
        original = batches[stored.step]
        assert torch.equal(stored.batch.side, original.side)
        again, first = runtime.score(stored.batch), runtime.score(original)
        torch.testing.assert_close(again.values, first.values, equal_nan=True)


def test_replaying_the_same_rewards_changes_nothing(run):
    folder, _ = run
    for table, groups in replay(stored_steps(folder), load_rewards(REWARDS, ".")):
        torch.testing.assert_close(
            torch.tensor(table["replayed_advantage"].to_pylist()),
            torch.tensor(table["advantage"].to_pylist()),
            atol=1e-4,
            rtol=1e-4,
        )
        assert table["rank"].to_pylist() == table["replayed_rank"].to_pylist()
        assert not any(group.best_changed for group in groups)
        assert all(group.order_kept == 1 for group in groups)


def test_the_opposite_reward_turns_every_group_around(run):
    folder, _ = run

    opposite = load_rewards([RewardSpec("contrastive", weight=-1.0)], ".")
    plain = load_rewards([RewardSpec("contrastive")], ".")
    there = [groups for _, groups in replay(stored_steps(folder), plain)]
    back = [groups for _, groups in replay(stored_steps(folder), opposite)]
    for one, other in zip(sum(there, []), sum(back, []), strict=True):
        assert one.after == pytest.approx([-value for value in other.after], abs=1e-5)
        assert other.order_kept == 0 and other.best_changed


def test_rewards_that_say_nothing_put_no_other_rollout_first(run):
    """The page and the command agree, also on rollouts that are equally good."""
    folder, _ = run

    def constant(batch):
        return [1.0] * len(batch)

    def brief(batch):
        return [-float(len(rationale) > 11) for rationale in batch.rationales]

    (folder / "status.json").write_text("{}", encoding="utf-8")
    for reward in (constant, brief):
        replayed = list(replay(stored_steps(folder), load_rewards([reward], ".")))
        groups = [group for _, some in replayed for group in some]
        write_replay(folder, reward.__name__, [table for table, _ in replayed])
        table = replayed_groups(Run(folder), reward.__name__)
        assert table["best_changed"].sum() == sum(group.best_changed for group in groups)
        assert not any(group.best_changed for group in groups)


def test_a_step_without_embeddings_cannot_be_scored_again(tmp_path):
    names = ("example", "group", "role", "text", "rationale", "token_ids", "truncated")
    values = (0, 0, "query", "a", "b", [1], False)
    write_rollouts(tmp_path, 1, {n: [v] for n, v in zip(names, values, strict=True)})
    with pytest.raises(UserError, match="step 1 was stored without embeddings"):
        list(stored_steps(tmp_path))


def test_columns_of_the_row_come_back_where_the_data_set_is_known(run):
    folder, _ = run

    def answer_length(batch):
        return [float(len(answer)) for answer in batch.columns["answer"]]

    rows = [{"query": "q", "answer": "a" * (i + 1)} for i in range(4)]
    stored = next(stored_steps(folder, [1], rows))
    assert answer_length(stored.batch) == [float(e + 1) for e in stored.batch.example.tolist()]
    assert next(stored_steps(folder, [1], rows[:1])).batch.columns == {}


def test_a_step_wise_reward_is_replayed_on_whole_rationales(run):
    folder, _ = run
    stepwise = load_rewards([RewardSpec("stepwise")], ".")
    contrastive = load_rewards([RewardSpec("contrastive")], ".")
    for (one, _), (other, _) in zip(
        replay(stored_steps(folder), stepwise),
        replay(stored_steps(folder), contrastive),
        strict=True,
    ):
        assert one["total"].to_pylist() == pytest.approx(other["total"].to_pylist(), nan_ok=True)


def test_a_replay_is_kept_beside_the_run_and_replaces_its_older_self(run):
    folder, _ = run
    tables = [table for table, _ in replay(stored_steps(folder), load_rewards(REWARDS, "."))]
    first = write_replay(folder, "mine", tables)
    assert write_replay(folder, "mine", tables[:1]) == first
    assert read_rollouts(folder).num_rows > 0  # the rollouts themselves are untouched


def test_a_run_without_rollouts_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no rollouts are stored"):
        list(stored_steps(tmp_path))
