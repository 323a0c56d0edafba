"""The table of rollouts: the same in memory, between processes and on disk."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from grace_rl.data.bundles import RoleText
from grace_rl.rollout.rollouts import TOKENS, Rollouts, row_fields
from grace_rl.rollout.store import read_rollouts, write_rollouts


def table(trained: int = 5, anchors: int = 2, seed: int = 0) -> Rollouts:
    """Every column filled with what is hard to keep."""
    count, generator = trained + anchors, torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * 1e-3

    lengths = torch.tensor([[1 + (seed + i) % 4] for i in range(count)])
    ended = torch.arange(4) >= lengths
    is_trained = torch.arange(count) < trained
    hidden = ~is_trained
    return Rollouts(
        texts=[f"text {seed} {i} 🦊" for i in range(count)],
        rationales=["" if i == 1 else f"said {i}" for i in range(count)],
        roles=["query"] * trained + ["negative"] * anchors,
        token_ids=[list(range(n)) for [n] in lengths.tolist()],
        example=torch.arange(count) // 2,
        group=torch.arange(count) // 2 + 10 * seed,
        side=torch.arange(count) % 3,
        truncated=torch.arange(count) % 2 == 0,
        embeddings=random(3),
        prompts=[f"Describe: {i}" for i in range(count)],
        columns={"score": [0.1 * i for i in range(count)], "nested": [{"a": [1, None]}] * count},
        prefix_ends=torch.minimum(torch.tensor([[0, 2, 9]]), lengths),
        prefix_embeddings=random(3, 3),
        trained=is_trained,
        scores={
            "one": random().masked_fill(hidden, torch.nan),
            "two": torch.full((count,), torch.nan),
        },
        step_scores=random(3).masked_fill(hidden[:, None], torch.nan),
        totals=random().masked_fill(hidden, torch.nan),
        advantages=random().masked_fill(hidden, torch.nan),
        **{
            name: random(4).masked_fill(ended, empty).masked_fill(hidden[:, None], empty)
            for name, empty in TOKENS.items()
        },
        step=7,
        seed=3,
        notes={"credit": {"kind": "group", "weights": [0.1]}},
    )


def assert_same(one: Rollouts, other: Rollouts, names: list[str]) -> None:
    for name in names:
        here, there = getattr(one, name), getattr(other, name)
        pairs = here.items() if isinstance(here, dict) else [(name, here)]
        for key, value in pairs:
            match = there[key] if isinstance(here, dict) else there
            if isinstance(value, torch.Tensor):
                assert torch.equal(value.nan_to_num(nan=1e9), match.nan_to_num(nan=1e9)), key
                assert value.dtype == match.dtype, key
            else:
                assert value == match, key


def test_what_is_stored_comes_back_to_the_last_bit(tmp_path) -> None:
    before = table()
    write_rollouts(tmp_path, 7, before.to_arrow())
    after = Rollouts.from_arrow(read_rollouts(tmp_path, [7]))
    names = [f.name for f in dataclasses.fields(Rollouts)]
    per_prefix = {"prefix_ends", "prefix_embeddings"}  # an anchor has no prefixes but itself
    assert_same(before, after, [name for name in names if name not in per_prefix])
    rows = before.trained
    for name in per_prefix:
        assert torch.equal(getattr(before, name)[rows], getattr(after, name)[rows])
    assert (after.prefix_embeddings[~rows] == after.embeddings[~rows][:, None]).all()


def test_columns_that_a_run_does_not_have_come_back_empty(tmp_path) -> None:
    optional = ("step_scores", "prefix_embeddings", "prefix_ends", *TOKENS)
    bare = dataclasses.replace(table(), prompts=[], columns={}, **dict.fromkeys(optional))
    write_rollouts(tmp_path, 7, bare.to_arrow())
    after = Rollouts.from_arrow(read_rollouts(tmp_path, [7]))
    assert all(getattr(after, name) is None for name in optional)
    assert after.prompts == [] and after.columns == {}


def test_rows_are_taken_from_every_column() -> None:
    whole = table()
    rows = torch.tensor([3, 0])
    taken = whole.take(rows)
    for name in row_fields(whole):
        value = getattr(whole, name)
        some = next(iter(value.values())) if isinstance(value, dict) else value
        part = getattr(taken, name)
        part = next(iter(part.values())) if isinstance(part, dict) else part
        assert len(part) == 2, name
        if isinstance(some, list):
            assert part == [some[3], some[0]], name
    assert whole.take(slice(1, 3)).embeddings.data_ptr() == whole.embeddings[1:].data_ptr()
    assert len(whole.trained_rows) == 5


def test_processes_gather_trained_rollouts_first_and_no_anchor_twice() -> None:
    """Two processes of four rollouts and two anchors, three in all: the last is a repeat."""
    names = ["texts", "token_ids", "prompts", "example", "group", "truncated", "embeddings",
             "prefix_ends", "prefix_embeddings"]  # fmt: skip
    later = {"columns": {}, "scores": {}, "step_scores": None} | dict.fromkeys(TOKENS)
    own = [dataclasses.replace(table(4, 2, seed), **later) for seed in (0, 1)]
    barrier, seen = threading.Barrier(2, timeout=900), [None, None]

    def exchange(process: int, item: Any) -> list[Any]:
        seen[process] = item
        barrier.wait()
        everybody = list(seen)
        barrier.wait()
        return everybody

    def world(process: int) -> Rollouts:
        return own[process].gather(
            3,
            lambda tensor: torch.cat(exchange(process, tensor)),
            lambda items: [item for part in exchange(process, items) for item in part],
        )

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(world, range(2))
    assert_same(first, second, names)
    assert first.texts == own[0].texts[:4] + own[1].texts[:4] + own[0].texts[4:] + own[1].texts[4:5]
    assert first.trained.tolist() == [True] * 8 + [False] * 3
    for process, rows in enumerate((slice(0, 4), slice(4, 8))):
        assert_same(first.take(rows), own[process].take(slice(0, 4)), names)


def test_a_table_begins_with_texts_to_write_for() -> None:
    text, anchor = RoleText("query", "a", 1, 2, 0), RoleText("negative", "b", 1, 3, 1)
    empty = Rollouts.to_write([text], [anchor], torch.device("cpu"))
    assert empty.roles == ["query", "negative"] and empty.side.tolist() == [0, 1]
    assert empty.trained.tolist() == [True, False]
    assert empty.embeddings.shape == (2, 0) and empty.totals.isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rationales", ["one"]),
        ("totals", torch.zeros(3)),
        ("step_scores", torch.zeros(7, 2)),
        ("scores", {"one": torch.zeros(2)}),
        ("token_values", torch.zeros(3, 4)),
    ],
)
def test_a_wrong_column_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name if name != "scores" else "one"):
        dataclasses.replace(table(), **{name: value})
