"""A reward cannot change what another one sees, nor what is trained on and stored."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from grace_rl.reward import RewardBatch, RewardRuntime, load_rewards
from grace_rl.reward.example import random_batch, with_prefixes


def a_batch() -> RewardBatch:
    batch = with_prefixes(random_batch("quad"))
    columns: dict[str, list[Any]] = {"number": [[1, 2]] * len(batch)}
    return dataclasses.replace(batch, columns=columns)


TENSORS = (
    "example",
    "group",
    "side",
    "truncated",
    "embeddings",
    "prefix_embeddings",
    "prefix_ends",
)
POISONS = {
    **{f"batch.{name}": lambda b, n=name: getattr(b, n).zero_() for name in TENSORS},
    **{f"pool.{name}": lambda b, n=name: getattr(b.pool, n).zero_() for name in TENSORS[:5]},
    "through numpy": lambda b: b.embeddings.numpy().fill(0),
    "texts": lambda b: b.texts.reverse(),
    "pool.roles": lambda b: b.pool.roles.clear(),
    "token_ids": lambda b: b.token_ids[0].append(1),
    "prompts": lambda b: b.prompts.clear(),
    "columns": lambda b: b.columns.clear(),
    "in columns": lambda b: b.columns["number"][0].append(3),
    "positives": lambda b: b.positives().zero_(),
    "weights": lambda b: b.negative_weights().zero_(),
    "siblings": lambda b: b.siblings_mean()[0].zero_(),
    "centroids": lambda b: b.pool.by_text.centroids.zero_(),
    "prefix": lambda b: b.prefix(0).embeddings.zero_(),
}


def everything(batch: RewardBatch) -> list[Any]:
    """All that a reward can see, copied."""
    names = [f.name for f in dataclasses.fields(batch.pool) if f.name != "false_negatives"]
    fields = [getattr(part, name) for part in (batch, batch.pool) for name in names]
    derived = [batch.positives(), batch.negative_weights(), batch.hard_negatives(), batch.others()]
    derived += [*batch.siblings_mean(), batch.pool.by_text.centroids]
    return [repr(v.tolist() if isinstance(v, torch.Tensor) else v) for v in [*fields, *derived]]


@pytest.mark.parametrize("poison", POISONS)
def test_what_one_reward_does_no_other_sees(poison: str) -> None:
    batch, seen = a_batch(), []

    def poisoner(batch: RewardBatch) -> torch.Tensor:
        POISONS[poison](batch)
        return torch.zeros(len(batch))

    async def late(batch: RewardBatch) -> torch.Tensor:
        seen.append(everything(batch))
        return torch.zeros(len(batch))

    def reader(batch: RewardBatch) -> torch.Tensor:
        seen.append(everything(batch))
        return torch.zeros(len(batch))

    before = everything(batch)
    # Cached relations that the first reward would spoil must not be computed by it either.
    fresh = a_batch()
    RewardRuntime(load_rewards([poisoner, reader, late], ".")).score(fresh)
    assert seen == [before, before]
    assert everything(fresh) == before


def test_copies_cost_little() -> None:
    """Of a reward that compares 4,096 rollouts with their pool, and far less of a step with it."""
    torch.manual_seed(0)
    batch = random_batch("triplet", rows=256, samples=8, dim=256)
    assert len(batch) == 4096
    [reward] = load_rewards(["contrastive"], ".")
    reward(batch, {})  # relations are computed once for all rewards
    copying = min(seconds(batch.apart) for _ in range(3))
    scoring = min(seconds(lambda: reward(batch.apart(), {})) for _ in range(3))
    assert copying < scoring / 2, (copying, scoring)


def seconds(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start
