"""Anchors that are not written anew for every batch: `anchor_steps`.

A policy hardly moves within a few steps, and an anchor is only compared with. What was written for
it then serves until it is so many optimizer steps old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grace_rl.data.bundles import RoleText
from grace_rl.rollout.rollouts import Rollouts


class KeptAnchors:
    """What was written for anchors, the same on every process.

    Args:
        steps: How many optimizer steps it serves, the one that it was written for included; 0 keeps
            nothing.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._known: dict[int, tuple[int, list[list[int]]]] = {}  # group -> step, token ids

    def known(self, anchors: Sequence[RoleText], step: int) -> list[list[int]]:
        """Token ids for each anchor in that step; none where it must be written."""
        samples = {
            group: iter(ids)
            for group, (written, ids) in self._known.items()
            if step - written < self.steps
        }
        return [next(samples.get(anchor.group, iter([])), []) for anchor in anchors]

    def remember(self, rollouts: Rollouts) -> dict[str, float]:
        """Keep the anchors of a batch of all processes; returns metrics: their mean age in steps,
        and tokens newly written for them.

        A text of which some rationales are old and some new counts as old.
        """
        if not self.steps:
            return {}
        groups: dict[int, list[list[int]]] = {}
        for row in (~rollouts.trained).nonzero()[:, 0].tolist():
            if ids := rollouts.token_ids[row]:  # else nothing is ever written for its role
                groups.setdefault(int(rollouts.group[row]), []).append(ids)
        step, ages, new = rollouts.step, [], 0
        for group, samples in groups.items():
            written, before = self._known.get(group, (step, []))
            written = written if any(ids in before for ids in samples) else step
            self._known[group] = (written, samples)
            ages += [step - written] * len(samples)
            new += sum(len(ids) for ids in samples if ids not in before)
        fresh = {g: kept for g, kept in self._known.items() if step - kept[0] + 1 < self.steps}
        self._known = fresh
        if not ages:
            return {}
        trained = sum(map(len, rollouts.trained_rows.token_ids))
        return {
            "anchors/age": sum(ages) / len(ages),
            "anchors/tokens_per_trained_token": new / max(1, trained),
        }

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {str(group): list(kept) for group, kept in self._known.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._known = {int(group): (kept[0], kept[1]) for group, kept in state.items()}


def to_write(known: Sequence[Sequence[int]], processes: int) -> tuple[list[int], list[int]]:
    """Numbers of the anchors that all processes write together, and of those that are kept.

    Both are multiples of the number of processes, so that each writes and reads as many: a few are
    written again, and where the anchors are no multiple all are, the first to fill up a share.

    >>> to_write([[5], [], [6], [7]], 2)
    ([1, 0], [2, 3])
    >>> to_write([[5], [], [6]], 2)
    ([0, 1, 2, 0], [])
    """
    missing, count = sum(not ids for ids in known), len(known)
    if count % processes:
        return [*range(count), *[0] * (-count % processes)], []
    order = sorted(range(count), key=lambda i: bool(known[i]))
    cut = -(-missing // processes) * processes
    return order[:cut], order[cut:]
