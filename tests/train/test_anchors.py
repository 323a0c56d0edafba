"""Anchors that are kept for some steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.data.bundles import RoleText
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.train.anchors import KeptAnchors, to_write
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig


def anchors(*groups: int) -> list[RoleText]:
    return [RoleText("negative", f"text {group}", 0, group, 1) for group in groups]


def table(step: int, written: dict[int, list[list[int]]]) -> Rollouts:
    rows = anchors(*(group for group, ids in written.items() for _ in ids))
    empty = Rollouts.to_write([], rows, torch.device("cpu"))
    ids = [one for several in written.values() for one in several]
    return Rollouts(**vars(empty) | {"token_ids": ids, "step": step})


def test_what_was_written_serves_for_so_many_steps() -> None:
    kept = KeptAnchors(3)
    assert kept.known(anchors(4, 4, 7), 1) == [[], [], []]
    assert kept.remember(table(1, {4: [[1, 2], [3]]}))["anchors/age"] == 0
    kept.load_state_dict(json.loads(json.dumps(kept.state_dict())))  # as a checkpoint has it
    assert kept.known(anchors(4, 4, 7), 3) == [[1, 2], [3], []]
    assert kept.known(anchors(4), 4) == [[]]
    assert kept.remember(table(3, {4: [[1, 2], [3]], 7: [[5]]}))["anchors/age"] == 4 / 3
    assert kept.known(anchors(4, 7), 4) == [[], [5]], "being used again makes nothing younger"


def test_nothing_is_kept_by_default() -> None:
    kept = KeptAnchors(0)
    assert kept.remember(table(1, {4: [[1]]})) == {}
    assert kept.known(anchors(4), 1) == [[]]
    assert kept.state_dict() == {}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("known", ["", "1", "0", "0110", "101101", "000111"])
def test_every_process_writes_as_many(known: str, processes: int) -> None:
    new, kept = to_write([[1] if one == "1" else [] for one in known], processes)
    assert len(new) % processes == len(kept) % processes == 0
    assert set(new) | set(kept) == set(range(len(known)))
    assert all(known[i] == "1" for i in kept)
    assert not set(new) & set(kept)


def test_a_run_writes_fewer_anchors(tiny_trainer: Any, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        GraceGRPOTrainer,
        GraceGRPOConfig,
        tmp_path,
        rows=scenes.rows("train", "triplet", 2),
        roles={"query": {}, "negative": {"train": False, "samples": 2}},
        rewards=["hard_negative"],
        num_generations=4,
        per_device_train_batch_size=4,
        max_steps=6,
        reader={"span": "context"},
        anchor_steps=4,
    )
    tables: list[Rollouts] = []
    trainer.keep = tables.append
    trainer.train()
    written: dict[int, list[tuple[int, list[list[int]]]]] = {}
    for one in tables:
        rows = one.take(~one.trained)
        written.setdefault(int(rows.group[0]), []).append((one.step, rows.token_ids))
    fresh = 0
    for batches in written.values():
        since, ids = batches[0]
        for step, now in batches[1:]:
            if now != ids:
                since, ids, fresh = step, now, fresh + 1
            assert step - since < 4
    assert 0 < fresh < 4
    logs = trainer.state.log_history[:-1]
    spent = [log["anchors/tokens_per_trained_token"] for log in logs]
    ages = [log["anchors/age"] for log in logs]
    assert all((age > 0) == (share == 0) for age, share in zip(ages, spent, strict=True))
    assert max(ages) > 0
