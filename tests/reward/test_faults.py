"""Whatever a reward does, the run goes on or ends on all processes alike, and names the reward.

Every fault, with `raise` and `abstain`, on one process and on two of which one has the fault:
docs/reliability.md, "Rewards that fail", has a row for each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from grace_rl.reward import RewardError, RewardOutput, RewardRuntime
from grace_rl.reward import load_rewards as load
from grace_rl.reward.example import example_batch, split_batch

LIMIT = 1.0  # seconds, for the faults that never end by themselves; others answer at once
WAITING = threading.Event()  # never set


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Unusual(BaseException):
    pass


def raising(error):
    def fault(batch):
        raise error

    return fault


def returning(value):
    return lambda batch: value(len(batch))


async def coroutine_fails(batch):
    raise OSError("away")


async def never(batch):
    await asyncio.Event().wait()


async def holds_on(batch):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue


async def blocks_its_loop(batch):
    WAITING.wait(900)


async def cancels_itself(batch):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def leaves_from_a_task(batch):
    async def task():
        raise SystemExit(3)

    await asyncio.create_task(task())


def sleeps(batch):
    WAITING.wait(900)


def slow_generator(batch):
    yield 0.0
    WAITING.wait(900)


def endless_generator(batch):
    while True:
        yield 0.0


class NotStarted:
    def start_from(self, policy):
        raise OSError("no weights")

    def __call__(self, batch):
        return [0.0] * len(batch)


FAULTS = {
    "an exception": raising(ValueError("no")),
    "an exception without a message": raising(Mute()),
    "SystemExit": raising(SystemExit(3)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "CancelledError": raising(asyncio.CancelledError()),
    "GeneratorExit": raising(GeneratorExit()),
    "a BaseException of its own": raising(Unusual("odd")),
    "StopIteration": raising(StopIteration()),
    "an exception in a coroutine": coroutine_fails,
    "a coroutine that cancels itself": cancels_itself,
    "SystemExit in a task of its own": leaves_from_a_task,
    "a coroutine that never ends": never,
    "a coroutine that ignores cancelling": holds_on,
    "a coroutine that blocks its loop": blocks_its_loop,
    "a function that never ends": sleeps,
    "a generator that never ends": slow_generator,
    "a generator without end": endless_generator,
    "nothing": returning(lambda n: None),
    "a number": returning(lambda n: 1.0),
    "a text": returning(lambda n: "1" * n),
    "a mapping": returning(lambda n: dict.fromkeys(range(n), 1.0)),
    "too few values": returning(lambda n: [1.0] * (n - 1)),
    "too many values": returning(lambda n: [1.0] * (n + 1)),
    "texts for numbers": returning(lambda n: ["a"] * n),
    "lists for numbers": returning(lambda n: [[1.0]] * n),
    "a column": returning(lambda n: torch.zeros(n, 1)),
    "complex numbers": returning(lambda n: torch.zeros(n, dtype=torch.complex64)),
    "an undeclared gate": returning(lambda n: RewardOutput([0.0] * n, gate=[True] * n)),
    "undeclared steps": returning(lambda n: RewardOutput([0.0] * n, steps=torch.zeros(n, 2))),
    "an infinite margin": returning(lambda n: RewardOutput([0.0] * n, margin=float("inf"))),
    "components that are none": returning(lambda n: RewardOutput([0.0] * n, components=3)),
    "a failing start_from": NotStarted(),
}
ENDLESS = {name for name in FAULTS if "never ends" in name or "loop" in name or "ignores" in name}


def two_texts():
    """Two texts with two rollouts each."""
    return example_batch(
        [{"query": [[1, 0], [3, 4]], "positive": [[1, 0], [0, 1]]}], ["query", "positive"]
    )


@pytest.fixture
def batch():
    return two_texts()


def healthy(batch):
    return batch.embeddings[:, 0]


def on_the_second(fault):
    """The fault where rollouts of the positive are scored, which is the second process's part."""
    if not callable(fault) or hasattr(fault, "start_from"):
        return fault

    def reward(batch):
        return fault(batch) if "positive" in batch.roles else healthy(batch)

    return reward


def rewards_of(fault, on_error, limit):
    faulty, sound = load([fault, healthy], ".")
    return [
        dataclasses.replace(faulty, label="faulty", on_error=on_error, timeout=limit),
        dataclasses.replace(sound, label="sound"),
    ]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("on_error", ["raise", "abstain"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_on_every_process(name, on_error, processes, batch, world):
    limit = LIMIT if name in ENDLESS else None
    simulated = world(rewards_of(on_the_second(FAULTS[name]), on_error, limit), processes)
    parts = split_batch(batch, processes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = simulated.start()
        results = simulated.score(parts) if started == [None] * processes else started
    if on_error == "raise":
        assert {type(result) for result in results} == {RewardError}
        [message] = {str(result) for result in results}
        assert message.startswith("the reward 'faulty' failed")
        assert ("on process 1 of 2" in message) == (processes == 2)
        return
    [first, *others] = results
    failed = first.values[:, 0].isnan()
    both = name == "a failing start_from" or processes == 1
    assert failed.tolist() == ([True] * 4 if both else [False, False, True, True])
    assert first.rewards[:, 1].isfinite().all()
    assert first.metrics["rewards/faulty/errors"] == (processes if both else 1)
    told = [str(one.message) for one in caught if "abstains" in str(one.message)]
    assert len(told) == 1 and "'faulty'" in told[0]
    for other in others:
        assert torch.equal(other.rewards.nan_to_num(9.0), first.rewards.nan_to_num(9.0))


def test_every_fault_has_its_row_in_the_docs(root: Path):
    text = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [name for name in FAULTS if f"| {name} |" not in text] == []


def test_what_stops_the_loop_or_its_tasks_does_not_keep_others_waiting(batch):
    async def stops(batch):
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0)
        return [1.0] * len(batch)

    async def cancels_all(batch):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return [1.0] * len(batch)

    async def another(batch):
        await asyncio.sleep(0.01)
        return [2.0] * len(batch)

    stopped = RewardRuntime(load([stops, another], ".")).score(batch).values
    assert stopped.tolist() == [[1.0, 2.0]] * 4
    with pytest.raises(RewardError, match="'another' failed .*CancelledError"):
        RewardRuntime(load([cancels_all, another], ".")).score(batch)


def test_one_that_hangs_is_not_called_again_and_the_others_go_on(batch):
    calls, leave = [], threading.Event()

    def hangs(batch):
        calls.append(batch.step)
        leave.wait()
        return [1.0] * len(batch)

    async def blocks(batch):
        calls.append(batch.step)
        leave.wait()
        return [1.0] * len(batch)

    async def waits(batch):
        await asyncio.sleep(0)
        return healthy(batch)

    limits = [LIMIT, LIMIT, None, None]
    loaded = [
        dataclasses.replace(reward, on_error="abstain", timeout=limit)
        for reward, limit in zip(load([hangs, blocks, waits, healthy], "."), limits, strict=True)
    ]
    runtime = RewardRuntime(loaded)
    with pytest.warns(UserWarning, match=f"no answer within {LIMIT:g} s"):
        scored = runtime.score(batch)  # waits shares the event loop that blocks has blocked
    assert scored.values[:, :3].isnan().all() and scored.values[:, 3].isfinite().all()
    scored = runtime.score(dataclasses.replace(batch, step=1))
    assert scored.values[:, :2].isnan().all() and calls == [0, 0]
    assert torch.equal(scored.values[:, 2], batch.embeddings[:, 0])
    assert torch.equal(scored.values[:, 3], batch.embeddings[:, 0])
    leave.set()


def test_the_time_limit_is_for_one_call_and_quick_ones_keep_it(batch):
    async def quick(batch):
        await asyncio.sleep(0.01)
        return healthy(batch)

    loaded = [dataclasses.replace(r, timeout=30.0) for r in load([healthy, quick], ".")]
    runtime = RewardRuntime(loaded)
    for _ in range(3):
        assert runtime.score(batch).values.isfinite().all()


@pytest.mark.parametrize("fault", [sleeps, never, blocks_its_loop, holds_on])
def test_ctrl_c_does_not_wait_for_a_reward(fault, batch):
    """It reaches the main thread only, which leaves; no reward can catch it."""
    called = threading.Event()

    def reward(batch):
        called.set()
        return fault(batch)

    def interrupt():
        called.wait()
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        RewardRuntime(rewards_of(reward, "abstain", None)).score(batch)


def test_what_an_abstaining_reward_says_is_harmless_on_a_terminal(batch):
    def coloured(batch):
        raise ValueError("\x1b]0;title\x07 red")

    loaded = [dataclasses.replace(r, on_error="abstain") for r in load([coloured], ".")]
    with pytest.warns(UserWarning, match="title") as caught:
        RewardRuntime(loaded).score(batch)
    assert not {"\x1b", "\x07"} & set(str(caught[0].message))


def test_a_reward_that_could_not_start_and_abstains_is_asked_again(batch):
    class Late:
        told = 0

        def start_from(self, policy):
            self.told += 1
            if self.told < 3:
                raise OSError("not there yet")

        def __call__(self, batch):
            return [1.0] * len(batch)

    runtime = RewardRuntime([dataclasses.replace(load([Late()], ".")[0], on_error="abstain")])
    with pytest.warns(UserWarning, match="before the first step"):
        runtime.start_from("policy")
    assert runtime.score(batch).values.isnan().all()
    assert runtime.score(batch).values.isfinite().all()
    assert runtime.score(batch).values.isfinite().all()
    assert runtime.rewards[0].function.told == 3


TWO = """
import dataclasses, importlib.util, json, sys, warnings
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from grace_rl.reward import RewardError, RewardRuntime
from grace_rl.reward.example import split_batch

spec = importlib.util.spec_from_file_location("faults", sys.argv[1])
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
warnings.simplefilter("ignore")
state = PartialState(cpu=True)
batch = split_batch(faults.two_texts(), 2)[state.process_index]
seen = {}
for name, fault in faults.FAULTS.items():
    for on_error in ("raise", "abstain"):
        limit = faults.LIMIT if name in faults.ENDLESS else None
        rewards = faults.rewards_of(faults.on_the_second(fault), on_error, limit)
        try:
            runtime = RewardRuntime(
                rewards, gather=gather, gather_object=lambda item: gather_object([item])
            )
            runtime.start_from("policy")
            values = runtime.score(batch).values
            seen[f"{name}, {on_error}"] = values.nan_to_num(9.0).tolist()
        except RewardError as error:
            seen[f"{name}, {on_error}"] = str(error)
with open(f"{sys.argv[2]}/{state.process_index}.json", "w") as out:
    json.dump(seen, out)
"""


@pytest.mark.slow
def test_all_faults_one_after_the_other_on_two_real_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(script), __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first == second and len(first) == 2 * len(FAULTS)
    for name, seen in first.items():
        if name.endswith("raise"):
            assert seen.startswith("the reward 'faulty' failed on process"), name
        else:
            assert seen[2][0] == 9.0 and seen[2][1] != 9.0, name
