"""Totals of several rewards, as TRL forms them, and what gates do to them."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_totals(rewards: Tensor, weights: Tensor) -> Tensor:
    """The total that TRL computes: (W, R) and (R,) -> (W,), NaN where a row has no reward at all.

    >>> nan = float("nan")
    >>> rewards = torch.tensor([[1.0, 2.0], [3.0, nan], [nan, nan]])
    >>> weighted_totals(rewards, torch.tensor([1.0, 0.5]))
    tensor([2., 3., nan])
    """
    totals = (rewards * weights).nansum(dim=1)
    return torch.where(rewards.isnan().all(dim=1), torch.nan, totals)


def apply_gates(rewards: Tensor, failed: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """Put the totals of rollouts that failed a gate below the passing ones of their group.

    In each group the rollouts that failed fewest gates keep their totals; those that failed more
    get at most the worst total of the better ones minus their margin. If all failed alike, nothing
    changes. The correction goes into the columns of the failed gates, in equal parts.

    Args:
        rewards: (W, R), before gates.
        failed: (W, R), 0 where passed, else the margin.
        weights: (R,); a gate with weight 0 is not applied.
        group: (W,) long.

    Returns:
        (W, R), a new tensor.

    >>> rewards = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    >>> failed = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> weighted_totals(apply_gates(rewards, failed, torch.ones(2), torch.zeros(3)), torch.ones(2))
    tensor([1., 0., 2.])
    """
    failed = torch.where(weights == 0, 0.0, failed)
    broken = (failed > 0).sum(dim=1)  # (W,) how many gates
    totals = weighted_totals(rewards, weights)
    wanted = totals.clone()
    for number in group[broken > 0].unique().tolist():
        rows = (group == number).nonzero()[:, 0]
        floor = torch.tensor(torch.inf, device=rewards.device)
        for tier in broken[rows].unique().tolist():  # ascending
            members = rows[broken[rows] == tier]
            if floor.isfinite():
                limit = floor - failed[members].amax(dim=1)
                wanted[members] = torch.fmin(wanted[members], limit)
            floor = torch.minimum(floor, wanted[members].nan_to_num(nan=torch.inf).min())
    change = (wanted - totals.nan_to_num()) / broken  # per failed gate
    lowered = (wanted != totals) & ~wanted.isnan()
    corrected = rewards.nan_to_num() + change[:, None] / weights
    return torch.where((failed > 0) & lowered[:, None], corrected, rewards)
