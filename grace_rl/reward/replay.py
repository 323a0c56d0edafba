"""Other rewards on rollouts that a run has kept: what would have been learned from them?

Totals and advantages are those that `GRPOTrainer` would have computed: gates applied, weighted sum,
minus the group's mean, divided as `scale_rewards` says. With step-wise credit or a critic the run's
own advantages were shaped further; a replay is compared with their means over a rationale.

A replay is kept beside the run, in `replays/<name>.parquet`, a row for each trained rollout:
`step example group role text rationale advantage replayed_advantage total rank replayed_rank` and
`reward/<label>` for each reward. Ranks are inside a group, 0 the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from grace_rl.reward.loading import LoadedReward
from grace_rl.reward.runtime import RewardRuntime, weighted_totals
from grace_rl.reward.stored import StoredStep, group_ranks
from grace_rl.rollout.groups import group_means, group_stds
from grace_rl.run.files import whole_file

Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class ReplayedGroup:
    """The rollouts of one text under the run's and under the replayed rewards.

    Attributes:
        step, text, role: Of the group.
        rationales: Of its G rollouts.
        before, after: Their advantages, then and now.
        order_kept: Share of pairs of rollouts that stand in the same order, 0 to 1; pairs that were
            tied in the run are left out. NaN where all were.
    """

    step: int
    text: str
    role: str
    rationales: list[str]
    before: list[float]
    after: list[float]
    order_kept: float

    @property
    def best_changed(self) -> bool:
        """None of the best rollouts would still have been one of the best."""
        first, then = max(self.before), max(self.after)
        pairs = zip(self.before, self.after, strict=True)
        return not any(before == first and after == then for before, after in pairs)


def replay(
    steps: Iterable[StoredStep], rewards: Sequence[LoadedReward], scale_rewards: Scale = "group"
) -> Iterator[tuple[pa.Table, list[ReplayedGroup]]]:
    """Score stored steps again, one at a time.

    Args:
        steps: From `grace_rl.reward.stored.stored_steps`.
        rewards: The rewards to replay with.
        scale_rewards: As in TRL's `GRPOConfig`.

    Yields:
        The rows of one step as above, and its groups.

    Raises:
        RewardError: A reward with `on_error: raise` failed.
    """
    runtime = RewardRuntime(rewards)
    for stored in steps:
        batch, before = stored.batch, stored.advantages
        scored = runtime.score(batch)
        totals = weighted_totals(scored.rewards, runtime.weights)
        after = advantages(totals, batch.group, scale_rewards)
        columns: dict[str, Any] = {
            "step": [stored.step] * len(batch),
            "example": batch.example.tolist(),
            "group": batch.group.tolist(),
            "role": batch.roles,
            "text": batch.texts,
            "rationale": batch.rationales,
            "advantage": before.tolist(),
            "replayed_advantage": after.tolist(),
            "total": totals.tolist(),
            "rank": group_ranks(before, batch.group).tolist(),
            "replayed_rank": group_ranks(after, batch.group).tolist(),
        }
        for i, label in enumerate(runtime.labels):
            columns[f"reward/{label}"] = scored.values[:, i].tolist()
        yield pa.table(columns), _groups(stored, after)


def advantages(totals: Tensor, group: Tensor, scale_rewards: Scale) -> Tensor:
    """(B,) GRPO's advantages from (B,) totals; 0 where a rollout has no reward at all.

    >>> import torch
    >>> advantages(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]), "none")
    tensor([-1.,  1.])
    """
    centred = totals - group_means(totals, group)
    if scale_rewards == "group":
        centred = centred / (group_stds(totals, group) + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (totals[~totals.isnan()].std() + 1e-4)
    return centred.nan_to_num()


def write_replay(run: str | Path, name: str, tables: Sequence[pa.Table]) -> Path:
    """Keep a replay in `<run>/replays/<name>.parquet`; an older one of that name is replaced."""
    folder = Path(run) / "replays"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.parquet"
    with whole_file(path) as unfinished:
        pq.write_table(pa.concat_tables(tables), unfinished, compression="zstd")
    return path


def _groups(stored: StoredStep, after: Tensor) -> list[ReplayedGroup]:
    batch, before = stored.batch, stored.advantages
    groups = []
    for number in batch.group.unique().tolist():
        members = (batch.group == number).nonzero()[:, 0].tolist()
        groups.append(
            ReplayedGroup(
                step=stored.step,
                text=batch.texts[members[0]],
                role=batch.roles[members[0]],
                rationales=[batch.rationales[i] for i in members],
                before=before[members].tolist(),
                after=after[members].tolist(),
                order_kept=order_kept(before[members], after[members]),
            )
        )
    return groups


def order_kept(before: Tensor, after: Tensor) -> float:
    """Share of pairs, not tied in (G,) `before`, that (G,) `after` puts in the same order.

    >>> import torch
    >>> order_kept(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([3.0, 1.0, 2.0]))
    0.66...
    """
    first = (before[:, None] - before[None, :]).sign()
    second = (after[:, None] - after[None, :]).sign()
    pairs = first > 0
    return float((second[pairs] > 0).float().mean()) if bool(pairs.any()) else float("nan")
