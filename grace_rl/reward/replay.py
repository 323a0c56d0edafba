"""Other rewards on rollouts that a run has kept: what would have been learned from them?

Scores, totals and advantages are those that training would have had: the same batch, gates and
mask of false negatives, and the credit of that step as it was then (by group, by segment with its
calibration, by critic with its values). The run's own rewards give its own numbers again, to the
last bit where it was one process on a CPU; else matrices were multiplied in other shapes, and the
last digits differ. What cannot be replayed: a reward that answers otherwise each time (a judge, a
clock), that needs what the store does not keep (`trainer_state`, row fields that are no JSON), or
that starts from the policy's weights; and where segments are cut, which the run decided. Rewards
without steps, on a run whose credit was by segment, are given credit by group, and the other way
round; a critic foresaw the run's own total, whatever rewards are replayed.

A replay is kept beside the run, in `replays/<name>.parquet`, a row for each trained rollout:
`step example group role text rationale advantage replayed_advantage total rank replayed_rank` and
`reward/<label>` for each reward. Ranks are inside a group, 0 the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from grace_rl.credit.by_group import GroupCredit
from grace_rl.credit.by_segment import SegmentCredit
from grace_rl.credit.credit import Credit
from grace_rl.credit.restored import restored_credit
from grace_rl.credit.segments import ShapingConfig, step_labels
from grace_rl.reward.loading import LoadedReward
from grace_rl.reward.runtime import RewardRuntime
from grace_rl.reward.scores import with_scores
from grace_rl.reward.stored import stored_batch, stored_steps
from grace_rl.rollout.groups import in_groups
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.run.files import whole_file


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
    run: str | Path, rewards: Sequence[LoadedReward], steps: Iterable[int] | None = None
) -> Iterator[tuple[Rollouts, Rollouts]]:
    """Score stored steps again, one at a time.

    Args:
        run: The run directory.
        rewards: The rewards to replay with.
        steps: Only these; the default is all.

    Yields:
        The trained rollouts of a step as they were, and as they would have been.

    Raises:
        UserError: There is no such run or step, or no rollouts are stored.
        RewardError: A reward with `on_error: raise` failed.
    """
    runtime = RewardRuntime(rewards)
    for stored in stored_steps(run, steps):
        scored = runtime.score(stored_batch(stored, run))
        again = with_scores(stored, rewards, scored)
        credit, progress = credit_of(stored, rewards)
        after = again.with_advantages(credit(again.trained_rows, progress))
        yield stored.trained_rows, after.trained_rows


def credit_of(stored: Rollouts, rewards: Sequence[LoadedReward]) -> tuple[Credit, float]:
    """The credit of a stored step for these rewards, and the share of training that was over."""
    credit, progress = restored_credit(stored.notes.get("credit", {}))
    steps = bool(step_labels(rewards)) and stored.prefix_embeddings is not None
    if isinstance(credit, SegmentCredit) and not steps:
        return GroupCredit(credit.scale), progress
    if isinstance(credit, GroupCredit):
        if steps:
            return SegmentCredit(ShapingConfig(), credit.scale), progress
        credit.weights = [reward.weight for reward in rewards]
    return credit, progress


def replay_table(before: Rollouts, after: Rollouts) -> pa.Table:
    """The rows of one step as they are kept beside the run."""
    columns: dict[str, Any] = {
        "step": [before.step] * len(before),
        "example": before.example.tolist(),
        "group": before.group.tolist(),
        "role": before.roles,
        "text": before.texts,
        "rationale": before.rationales,
        "advantage": before.advantages.numpy(),
        "replayed_advantage": after.advantages.numpy(),
        "total": after.totals.numpy(),
        "rank": group_ranks(before.advantages, before.group).tolist(),
        "replayed_rank": group_ranks(after.advantages, after.group).tolist(),
    }
    columns |= {f"reward/{label}": values.numpy() for label, values in after.scores.items()}
    return pa.table(columns)


def group_ranks(values: Tensor, group: Tensor) -> Tensor:
    """(B,) rank of each rollout in its group by value, 0 the best; NaN ranks last, ties by place.

    >>> group_ranks(torch.tensor([1.0, 3.0, 2.0, 5.0]), torch.tensor([7, 7, 7, 2]))
    tensor([2, 0, 1, 0])
    """
    lines, back = in_groups(values.nan_to_num(nan=-torch.inf), group)
    order = lines.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return back(order.argsort(dim=1))


def write_replay(run: str | Path, name: str, tables: Sequence[pa.Table]) -> Path:
    """Keep a replay in `<run>/replays/<name>.parquet`; an older one of that name is replaced."""
    folder = Path(run) / "replays"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.parquet"
    with whole_file(path) as unfinished:
        pq.write_table(pa.concat_tables(tables), unfinished, compression="zstd")
    return path


def replayed_groups(before: Rollouts, after: Rollouts) -> list[ReplayedGroup]:
    """The groups of one step."""
    groups = []
    for number in before.group.unique().tolist():
        members = (before.group == number).nonzero()[:, 0]
        then, now = before.advantages[members], after.advantages[members]
        rows = members.tolist()
        groups.append(
            ReplayedGroup(
                step=before.step,
                text=before.texts[rows[0]],
                role=before.roles[rows[0]],
                rationales=[before.rationales[i] for i in rows],
                before=then.tolist(),
                after=now.tolist(),
                order_kept=order_kept(then, now),
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
