"""Stored rollouts as the batches that rewards saw: a reward can be tried on them without a model.

What the store does not keep is made up plainly: the prompt is the text, and a rationale is one
segment (`RewardBatch.prefix_embeddings` has nothing, then the whole). The row's other columns come
from the run's data set, where it can still be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grace_rl.errors import UserError
from grace_rl.reward.batch import Pool, RewardBatch, row_columns
from grace_rl.reward.example import batch_of_pool
from grace_rl.rollout.store import read_rollouts, rollout_files

COLUMNS = (
    "example",
    "group",
    "role",
    "text",
    "rationale",
    "token_ids",
    "truncated",
    "advantage",
    "embedding",
)


@dataclass(frozen=True, eq=False)
class StoredStep:
    """One stored step.

    Attributes:
        step: Optimizer step.
        batch: The B trained rollouts, with every rollout and anchor of the step as their pool.
        advantages: (B,) float32, as they were; the mean over a rationale's tokens where each
            segment had its own.
    """

    step: int
    batch: RewardBatch
    advantages: torch.Tensor


def stored_steps(
    run: str | Path,
    steps: Iterable[int] | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
) -> Iterator[StoredStep]:
    """The stored steps of a run in rising order, one in memory at a time.

    Args:
        run: The run directory.
        steps: Only these; the default is all.
        rows: The run's data set, for `RewardBatch.columns`.

    Raises:
        UserError: There is no such run or step, or no rollouts are stored.
    """
    numbers = sorted(rollout_files(run)) if steps is None else list(steps)
    if not numbers:
        raise UserError(f"{run}: no rollouts are stored there yet")
    for step in numbers:
        table = read_rollouts(run, [step], COLUMNS).to_pylist()
        if any(row["embedding"] is None for row in table):
            raise UserError(f"{run}: step {step} was stored without embeddings")
        yield _stored_step(step, table, rows)


def run_rows(run: str | Path) -> list[dict[str, Any]] | None:
    """The data set of a run, by the recipe it keeps; None where it cannot be read any more."""
    from grace_rl.data.rows import read_rows
    from grace_rl.recipe import load_recipe

    try:
        return list(read_rows(load_recipe(Path(run) / "recipe.yaml").data))
    except UserError:
        return None


def _stored_step(
    step: int, table: list[dict[str, Any]], rows: Sequence[dict[str, Any]] | None
) -> StoredStep:
    table.sort(key=lambda row: row["advantage"] is None)  # stable: anchors, never trained, last
    sides = _sides(table)
    pool = Pool(
        texts=[row["text"] for row in table],
        rationales=[row["rationale"] for row in table],
        roles=[row["role"] for row in table],
        token_ids=[row["token_ids"] for row in table],
        example=torch.tensor([row["example"] for row in table]),
        group=torch.tensor([row["group"] for row in table]),
        side=torch.tensor([sides[row["example"], row["group"]] for row in table]),
        embeddings=torch.tensor([row["embedding"] for row in table], dtype=torch.float32),
        truncated=torch.tensor([row["truncated"] for row in table]),
    )
    trained = [row for row in table if row["advantage"] is not None]
    batch = batch_of_pool(pool, torch.arange(len(trained)))
    batch = dataclasses.replace(
        batch,
        prompts=batch.texts,
        columns=_columns(trained, rows),
        step=step,
        prefix_embeddings=torch.stack([torch.zeros_like(batch.embeddings), batch.embeddings], 1),
        prefix_ends=torch.tensor([[0, len(ids)] for ids in batch.token_ids]),
    )
    advantages = torch.tensor([row["advantage"] for row in trained], dtype=torch.float32)
    return StoredStep(step, batch, advantages)


def _sides(table: Sequence[dict[str, Any]]) -> dict[tuple[int, int], int]:
    """(example, group) -> side: negatives of an example are numbered in the order of their group.

    A paraphrase of a negative belongs to the first one, as in `grace_rl.data.bundles`.
    """
    sides: dict[tuple[int, int], int] = {}
    negatives: dict[int, int] = {}
    for row in sorted(table, key=lambda row: row["group"]):
        key = row["example"], row["group"]
        if key in sides:
            continue
        if row["role"] == "negative":
            negatives[row["example"]] = negatives.get(row["example"], 0) + 1
            sides[key] = negatives[row["example"]]
        else:
            sides[key] = int(row["role"] == "negative_positive")
    return sides


def _columns(
    trained: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]] | None
) -> dict[str, list[Any]]:
    if rows is None or any(row["example"] >= len(rows) for row in trained):
        return {}
    return row_columns([rows[row["example"]] for row in trained])


def group_ranks(values: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(B,) rank of each rollout in its group by value, 0 the best; NaN ranks last, ties by place.

    >>> group_ranks(torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([7, 7, 7, 2]))
    tensor([2, 0, 1, 0])
    """
    ranks = torch.zeros(len(values), dtype=torch.long)
    finite = values.nan_to_num(nan=-math.inf)
    for number in group.unique().tolist():
        members = (group == number).nonzero()[:, 0]
        order = finite[members].argsort(descending=True, stable=True)
        ranks[members[order]] = torch.arange(len(members))
    return ranks
