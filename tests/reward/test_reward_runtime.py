"""The one place that calls rewards: whatever they do, all processes go on or stop alike."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import signal
import warnings
from collections import deque
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch

from grace_rl.errors import UserError
from grace_rl.reward import RewardError, RewardOutput, RewardRuntime, load_rewards
from grace_rl.reward.example import example_batch, random_batch, split_batch, with_prefixes
from grace_rl.reward.runtime import FLAT_BATCHES, apply_gates, weighted_totals

nan, inf = math.nan, math.inf


def runtime_of(*rewards, weights=None, on_error="raise"):
    loaded = load_rewards(list(rewards), ".")
    weights = weights or [1.0] * len(loaded)
    return RewardRuntime(
        [
            dataclasses.replace(r, weight=w, on_error=on_error)
            for r, w in zip(loaded, weights, strict=True)
        ]
    )


def returns(values, name="given", gates=False, steps=False):
    """A reward that returns what it is told to."""

    def reward(batch):
        return values(batch) if callable(values) else values

    reward.__name__ = name
    reward.gates = gates
    reward.steps = steps
    return reward


@pytest.fixture
def batch():
    """Two texts with two rollouts each: groups 0, 0, 1, 1."""
    return example_batch(
        [{"query": [[1, 0], [3, 4]], "positive": [[1, 0], [0, 1]]}], ["query", "positive"]
    )


def same(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2, None, nan],
        torch.tensor([1.0, 2.0, nan, nan], dtype=torch.float64),
        np.array([1.0, 2.0, nan, nan]),
        [torch.tensor(1.0), np.float32(2.0), None, None],
        RewardOutput([1, 2, None, None]),
        (1.0, Fraction(2), None, None),
        np.array([1.0, 2.0, None, None], dtype=object),
        np.array([nan, nan, 2.0, 1.0])[::-1],
        torch.tensor([1.0, 2.0, nan, nan]).to_sparse(),
        torch.tensor([1.0, 2.0, nan, nan], requires_grad=True),
        lambda batch: (value for value in [1.0, 2.0, None, None]),
        lambda batch: map(float, ["1", "2", "nan", "nan"]),
        pandas.Series([1.0, 2.0, nan, nan], index=[9, 9, 0, 7]),
        pandas.Series([1.0, 2.0, None, None], dtype=object),
        deque([1.0, 2.0, None, None]),
    ],
)
def test_every_usual_return_becomes_float32_with_nan_for_none(batch, values):
    scored = runtime_of(returns(values)).score(batch)
    assert scored.rewards.dtype == torch.float32
    same(scored.rewards[:, 0], [1.0, 2.0, nan, nan])
    assert scored.group.tolist() == batch.group.tolist()
    assert scored.metrics["rewards/given/unscored"] == 0.5


def test_there_is_at_least_one_reward():
    with pytest.raises(UserError, match="at least one"):
        RewardRuntime([])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1.0], "1 values, but there are 4 rollouts"),
        (torch.zeros(4, 1), r"shape \(4, 1\)"),
        (3.0, "is a float; return 4 numbers"),
        (None, "is a NoneType"),
        ([1.0, "two", 3.0, 4.0], "entry 1 is 'two', expected a number or None"),
        (RewardOutput([1.0] * 4, steps=torch.zeros(4, 2)), "steps = True"),
        (RewardOutput([1.0] * 4, components={"x": [1.0]}), "component 'x' has 1 values"),
        (RewardOutput([1.0] * 4, components={"std": [1.0] * 4}), "component names must not"),
        (RewardOutput([1.0] * 4, gate=torch.ones(4).bool()), "declare it with the attribute"),
    ],
)
def test_a_wrong_return_names_the_reward_and_the_rows(batch, values, says):
    with pytest.raises(RewardError, match=says) as caught:
        runtime_of(returns(values)).score(batch)
    assert "the reward 'given' failed at step 0, data rows 0:" in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (RewardOutput([1.0] * 4, steps=torch.zeros(4, 3)), r"\(4, 3\), expected .* \(4, 2\)"),
        (RewardOutput([1.0] * 4), "returned none"),
        ([1.0] * 4, "returned none"),
    ],
)
def test_steps_have_the_shape_of_the_prefixes(batch, output, says):
    with pytest.raises(RewardError, match=says):
        runtime_of(returns(output, steps=True)).score(with_prefixes(batch, segments=1))


def test_a_reward_with_steps_that_abstains_leaves_steps_unscored(batch):
    def reward(batch):
        raise OSError("away")

    reward.steps = True
    batch = with_prefixes(batch, segments=2)
    with pytest.warns(UserWarning, match="abstains"):
        scored = runtime_of(reward, on_error="abstain").score(batch)
    assert scored.steps["reward"].shape == (4, 3) and scored.steps["reward"].isnan().all()


def test_a_gate_is_bool(batch):
    output = RewardOutput([1.0] * 4, gate=torch.ones(4))
    with pytest.raises(RewardError, match="torch.bool"):
        runtime_of(returns(output, gates=True)).score(batch)


def test_an_exception_names_the_line_and_keeps_its_cause(batch):
    def reward(batch):
        return [1 / 0]

    with pytest.raises(RewardError, match=r"ZeroDivisionError: division by zero \(.*") as caught:
        runtime_of(reward).score(batch)
    line = reward.__code__.co_firstlineno + 1
    assert f"({__file__}:{line})" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("failure", [SystemExit(3), asyncio.CancelledError()])
def test_leaving_and_being_cancelled_are_a_rewards_mistakes(batch, failure):
    def at_once(batch):
        raise failure

    async def later(batch):
        raise failure

    for reward in (at_once, later):
        with pytest.raises(RewardError, match=type(failure).__name__):
            runtime_of(reward).score(batch)
        with pytest.warns(UserWarning, match="it abstains"):
            values = runtime_of(reward, on_error="abstain").score(batch).values
        assert values.isnan().all()


@pytest.mark.parametrize("on_error", ["raise", "abstain"])
def test_an_exception_on_one_process_reaches_all_alike(batch, world, on_error):
    def fails_on_positives(batch):
        if "positive" in batch.roles:
            raise OSError("the judge is away")
        return [1.0, 2.0]

    loaded = load_rewards([fails_on_positives, returns(lambda b: [0.0] * len(b))], ".")
    simulated = world([dataclasses.replace(r, on_error=on_error) for r in loaded], 2)
    parts = split_batch(batch, 2)
    if on_error == "raise":
        results = simulated.score(parts)
        assert [type(result) for result in results] == [RewardError] * 2
        assert str(results[0]) == str(results[1])
        assert "the reward 'fails_on_positives' failed on process 1 of 2 at step 0" in str(
            results[0]
        )
        assert "OSError: the judge is away" in str(results[0])
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = simulated.score(parts)
        simulated.score(parts)
    assert [str(w.message) for w in caught if "abstains" in str(w.message)][1:] == []  # once
    assert torch.equal(first.rewards.nan_to_num(9.0), second.rewards.nan_to_num(9.0))
    same(first.rewards[:, 0], [1.0, 2.0, nan, nan])
    assert first.metrics["rewards/fails_on_positives/errors"] == 1
    assert first.metrics == pytest.approx(second.metrics, nan_ok=True)


def test_async_rewards_wait_together_on_one_loop(batch):
    loops = []
    meeting: list[asyncio.Event] = []

    async def first(batch):
        loops.append(asyncio.get_running_loop())
        meeting.append(asyncio.Event())
        await asyncio.wait_for(meeting[-1].wait(), 900)  # only ends if `second` runs meanwhile
        return [1.0] * len(batch)

    async def second(prompts, completions, **columns):
        while not meeting:
            await asyncio.sleep(0)
        meeting.pop().set()
        return [None, 2.0, 2.0, 2.0]

    async def fails(batch):
        raise RuntimeError("later")

    runtime = runtime_of(first, second)
    for _ in range(2):
        scored = runtime.score(batch)
        same(scored.values[:, 0], [1.0] * 4)
        same(scored.values[:, 1], [nan, 2.0, 2.0, 2.0])
    assert loops[0] is loops[1]  # clients keep connections that belong to a loop
    with pytest.raises(RewardError, match=r"'fails' failed .*RuntimeError: later"):
        runtime_of(first, second, fails).score(batch)

    async def inside_a_running_loop():
        return runtime.score(batch)

    same(asyncio.run(inside_a_running_loop()).values[:, 0], [1.0] * 4)


def test_plain_trl_functions_work_unchanged(batch):
    batch = dataclasses.replace(batch, columns={"solution": ["a", "b", "c", "d"]}, step=7)

    def from_the_docs(completions, solution, **kwargs):
        assert kwargs["trainer_state"].global_step == 7
        kwargs["log_metric"]("seen", 1.0)
        assert kwargs["completion_ids"] == batch.token_ids
        return [
            None if s == "a" else float(len(c)) for c, s in zip(completions, solution, strict=True)
        ]

    scored = runtime_of(from_the_docs).score(batch)
    same(scored.rewards[:, 0], [nan, 11.0, 11.0, 11.0])
    logged = {}
    arguments = {
        "trainer_state": type("State", (), {"global_step": 7}),
        "log_metric": logged.__setitem__,
    }
    runtime_of(from_the_docs).score(batch, arguments)
    assert logged == {"seen": 1.0}


def test_what_trl_would_have_given_and_we_do_not_is_explained(batch):
    """TRL gives conversations where the rows have them; here prompts and completions are texts."""

    def of_conversations(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    def alarmed(batch):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    with pytest.raises(RewardError, match=r"completions are texts here"):
        runtime_of(of_conversations).score(batch)
    with pytest.raises(RewardError, match="`timeout`"):
        runtime_of(alarmed).score(batch)

    def unwrapped(*args, **kwargs):
        return of_conversations(*args, **kwargs)

    with pytest.raises(UserError, match=r"functools\.wraps"):
        load_rewards([unwrapped], ".")


def test_rewards_are_called_without_gradient(batch):
    seen = []

    def plain(batch):
        seen.append(torch.is_grad_enabled())
        return batch.embeddings[:, 0]

    async def later(batch):
        seen.append(torch.is_grad_enabled())
        return batch.embeddings[:, 0]

    runtime_of(plain, later).score(batch)
    assert seen == [False, False] and torch.is_grad_enabled()


def test_an_infinite_value_never_reaches_an_advantage(batch):
    steps = torch.tensor([[0.0, 1.0], [0.0, inf], [1.0, 1.0], [1.0, 1.0]])
    output = RewardOutput([1.0, 3.0, -inf, 4.0], steps=steps, components={"part": [inf, 1, 1, 1]})
    batch = with_prefixes(batch, segments=1)
    wild = returns(output, "wild", steps=True)
    runtime = runtime_of(wild, returns([0.0, 0.0, 5.0, 5.0], "calm"))
    with pytest.warns(UserWarning, match="'wild' returned an infinite value at step 0") as caught:
        scored = runtime.score(batch)
        runtime.score(batch)
    assert len(caught) == 1
    assert scored.metrics["rewards/wild/nonfinite"] == 2  # rows: one in steps, one in values
    same(scored.values[:, 0], [1.0, 3.0, nan, 4.0])
    assert scored.rewards.isfinite().all()
    assert not scored.steps["wild"].isinf().any()
    assert not scored.components["wild/part"].isinf().any()
    assert steps[1, 1] == inf  # what the reward keeps is not changed


def test_a_row_that_one_reward_did_not_score_is_moved_by_the_others_only(batch):
    runtime = runtime_of(returns([-8.0, None, -8.0, -9.0], "a"), returns([1.0, 2.0, 0.0, 0.0], "b"))
    scored = runtime.score(batch)
    totals = weighted_totals(scored.rewards, runtime.weights)
    same(totals[1] - totals[0], 1.0)  # by b alone; TRL's 0 for None would say 9
    same(scored.values[:, 0], [-8.0, nan, -8.0, -9.0])
    alone = runtime_of(returns([1.0, None, None, None])).score(batch)
    same(alone.rewards[:, 0], [1.0, nan, nan, nan])


def gate(flags, margin=1.0, name="gate", values=0.0):
    output = RewardOutput([values] * len(flags), gate=torch.tensor(flags), margin=margin)
    return returns(output, name, gates=True)


@pytest.mark.parametrize("weight", [1.0, 0.25, -2.0])
def test_a_gate_puts_a_rollout_below_the_worst_passing_one(batch, weight):
    runtime = runtime_of(
        returns([5.0, 3.0, 1.0, 2.0], "score"),
        gate([False, True, False, False], margin=0.5),
        weights=[2.0, weight],
    )
    scored = runtime.score(batch)
    # Group 0: 10 fails, so 6 - 0.5. In group 1 everybody fails, so nothing changes.
    same(weighted_totals(scored.rewards, runtime.weights), [5.5, 6.0, 2.0, 4.0])
    same(scored.rewards[:, 0], [5.0, 3.0, 1.0, 2.0])
    assert scored.metrics["rewards/gate/gated"] == 0.75
    assert runtime.gates == ["gate"]


def test_a_gate_never_raises_a_total(batch):
    runtime = runtime_of(returns([-9.0, 3.0, 1.0, 2.0]), gate([False, True, True, True]))
    scored = runtime.score(batch)
    same(weighted_totals(scored.rewards, runtime.weights), [-9.0, 3.0, 1.0, 2.0])


def test_a_gate_of_weight_zero_is_only_logged(batch):
    runtime = runtime_of(
        returns([5.0, 3.0, 1.0, 2.0]), gate([False, True, True, True]), weights=[1.0, 0.0]
    )
    assert runtime.gates == []
    same(runtime.score(batch).rewards[:, 0], [5.0, 3.0, 1.0, 2.0])


def test_a_gate_holds_for_rows_that_nothing_scored(batch):
    runtime = runtime_of(returns([1.0, None, 1.0, 1.0]), gate([True, False, True, True]))
    totals = weighted_totals(runtime.score(batch).rewards, runtime.weights)
    same(totals[:2], [1.0, 0.0])


def test_rollouts_that_fail_more_gates_come_later():
    rewards = torch.tensor([[9.0, 0.0, 0.0], [8.0, 0.0, 0.0], [7.0, 0.0, 0.0], [6.0, 0.0, 0.0]])
    failed = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    weights = torch.tensor([1.0, 1.0, 0.5])
    group = torch.zeros(4, dtype=torch.long)
    totals = weighted_totals(apply_gates(rewards, failed, weights, group), weights)
    same(totals, [2.0, 5.0, 4.0, 6.0])
    same(rewards[:, 0], [9.0, 8.0, 7.0, 6.0])  # a new tensor


def test_two_processes_give_what_one_gives(world):
    def ragged(batch):  # a component that only some processes have
        query = torch.tensor([role == "query" for role in batch.roles])
        extra = {"query": batch.embeddings[:, 1].where(query, nan)} if query.any() else {}
        steps = batch.prefix_embeddings[:, :, 0]
        return RewardOutput(batch.embeddings[:, 0], components=extra, steps=steps)

    def truncated_gate(batch):
        return RewardOutput([0.0] * len(batch), gate=batch.embeddings[:, 2] > 0)

    ragged.steps = truncated_gate.gates = True
    batch = with_prefixes(
        random_batch("quad", rows=3, samples=2)
    )  # 24 rollouts; 8 processes cut through groups
    loaded = load_rewards([ragged, truncated_gate, "grace_rl_rewards.contrastive:Contrastive"], ".")
    whole = RewardRuntime(loaded).score(batch)
    for processes in (2, 3, 8):
        simulated = world(loaded, processes).score(split_batch(batch, processes))
        for scored in simulated:
            torch.testing.assert_close(scored.rewards, whole.rewards)
            assert scored.group.tolist() == whole.group.tolist()
            assert scored.metrics == pytest.approx(whole.metrics, nan_ok=True, abs=1e-5)
            assert list(scored.components) == list(whole.components)
        steps = torch.cat([scored.steps["ragged"] for scored in simulated])
        torch.testing.assert_close(steps, whole.steps["ragged"])


def test_within_group_std_is_the_mean_over_groups(batch):
    scored = runtime_of(returns([1.0, 3.0, 10.0, 14.0])).score(batch)
    assert scored.metrics["rewards/given/within_group_std"] == pytest.approx(1.5 * 2**0.5)


def test_metrics_are_finite_even_where_nothing_was_scored(batch):
    output = RewardOutput([None] * 4, components={"part": [None] * 4})
    metrics = runtime_of(returns(output)).score(batch).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["rewards/given/unscored"] == 1


def flat_warnings(runtime, batch, times):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            runtime.score(batch)
    return [str(warning.message) for warning in caught]


def test_a_reward_that_never_varies_inside_groups_is_named_once(batch):
    flat = returns([1.0, 1.0, 7.0, 7.0], "flat")  # varies between groups only
    lively = returns([1.0, 2.0, 1.0, 1.0], "lively")
    silent = returns([None] * 4, "silent")
    logged = returns([0.0] * 4, "logged")
    calm_gate = gate([True] * 4)
    runtime = runtime_of(flat, lively, silent, logged, calm_gate, weights=[1, 1, 1, 0, 1])
    assert flat_warnings(runtime, batch, FLAT_BATCHES - 1) == []
    messages = flat_warnings(runtime, batch, 2 * FLAT_BATCHES)
    assert len(messages) == 2
    assert (
        "the reward 'flat' (weight 1) did not vary inside any group for 10 batches" in messages[0]
    )
    assert "the reward 'silent' (weight 1) scored nothing" in messages[1]


def test_the_count_starts_again_when_the_reward_varies(batch):
    values = [[1.0] * 4] * 9 + [[1.0, 2.0, 3.0, 4.0]] + [[1.0] * 4] * 9
    runtime = runtime_of(returns(lambda batch: values.pop()))
    assert flat_warnings(runtime, batch, 19) == []


def test_a_resumed_run_warns_as_if_it_had_never_stopped(batch):
    flat = returns([1.0] * 4, "flat")
    first = runtime_of(flat)
    assert flat_warnings(first, batch, 6) == []
    second = runtime_of(flat)
    second.load_state_dict(first.state_dict())
    assert len(flat_warnings(second, batch, 4)) == 1
    third = runtime_of(flat)
    third.load_state_dict(second.state_dict())
    assert flat_warnings(third, batch, 20) == []
