"""Means and deviations inside groups: the rollouts of one text of one row, on every process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def group_means(values: Tensor, group: Tensor) -> Tensor:
    """The mean of each row's group, without the NaN entries: (N,) or (N, R) like `values`.

    NaN where the whole group is NaN.

    >>> group_means(torch.tensor([1.0, 3.0, float("nan"), 5.0]), torch.tensor([7, 7, 7, 2]))
    tensor([2., 2., 2., 5.])
    """
    index, counts = _group_index(values, group)
    sums = torch.zeros_like(counts).index_add_(0, index, values.nan_to_num())
    return (sums / counts)[index]


def group_stds(values: Tensor, group: Tensor) -> Tensor:
    """The sample standard deviation of each row's group, like `group_means`.

    NaN where fewer than two rows of the group are scored.

    >>> group_stds(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2]))
    tensor([1.4142, 1.4142,    nan])
    """
    index, counts = _group_index(values, group)
    squares = (values - group_means(values, group)).nan_to_num() ** 2
    sums = torch.zeros_like(counts).index_add_(0, index, squares)
    return torch.where(counts > 1, (sums / (counts - 1)).sqrt(), torch.nan)[index]


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """The sum of each row's group, (N,) or (N, K) like `values`; NaN counts as 0."""
    _, index = torch.unique(group, return_inverse=True)
    return torch.zeros_like(values).index_add_(0, index, values.nan_to_num())[index]


def group_counts(values: Tensor, group: Tensor) -> Tensor:
    """How many rows of each row's group are not NaN, like `values`."""
    return group_sums((~values.isnan()).to(values.dtype), group)


def _group_index(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) long, the place of each row's group, and how many rows of it are scored, per column."""
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    scored = (~values.isnan()).to(values.dtype)
    return index, values.new_zeros(groups, *values.shape[1:]).index_add_(0, index, scored)


def fill_unscored(values: Tensor, group: Tensor) -> Tensor:
    """(N, R): a row that other rewards scored gets the group's mean of the one that did not.

    TRL would count it as 0, which is far above or below its siblings for most rewards.
    """
    other = ~values.isnan().all(dim=1, keepdim=True)
    return torch.where(values.isnan() & other, group_means(values, group), values)


def in_groups(values: Tensor, group: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """One line for each group: (N, ...) -> (G, S, ...), S the largest group, and the way back.

    Groups with fewer rows are filled up with NaN.

    >>> lines, back = in_groups(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7, 7, 2]))
    >>> lines, back(lines)
    (tensor([[5., nan],
            [1., 3.]]), tensor([1., 3., 5.]))
    """
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    order = index.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(index)
    place[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    size = int(counts.max()) if len(counts) else 0
    lines = values.new_full((len(counts), size, *values.shape[1:]), torch.nan)
    lines[index, place] = values
    return lines, lambda lines: lines[index, place]
