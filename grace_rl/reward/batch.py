"""What a reward sees, and what it returns.

A reward scores this process's trained rollouts (a `RewardBatch` of B) and may compare them with
everybody's (`batch.pool`, P rollouts and anchors of all processes). Comparisons are best made with
texts, not with single rollouts: `pool.by_text` has one centroid per text, which is less noisy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from grace_rl.data.false_negatives import FalseNegatives


def _check_lists(owner: object, names: tuple[str, ...], length: int) -> None:
    for name in names:
        found = len(getattr(owner, name))
        if found != length:
            raise ValueError(
                f"{type(owner).__name__}.{name} has {found} entries, expected {length}"
            )


def _check_tensor(
    owner: object, name: str, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    """`None` in `shape` allows any size."""
    tensor = getattr(owner, name)
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(
            f"{type(owner).__name__}.{name} has shape {tuple(tensor.shape)} and {tensor.dtype}, "
            f"expected {wanted} and {dtype}"
        )


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N rationales with the texts that they were written for, and their embeddings.

    Args:
        texts: the user's texts.
        rationales: what the policy wrote for them.
        roles: query, positive, negative, negative_positive, text or anchor.
        token_ids: the rationale's token ids, up to and including the first end token.
        example: (N,) long, the row's number in the data set.
        group: (N,) long; the rollouts of one text of one row share it, on every process.
        side: (N,) long; texts of one example with the same side mean the same. Query, positive,
            text and anchor are 0; the i-th negative and its paraphrase are 1 + i.
        embeddings: (N, D) float32, L2-normalised, of the policy that wrote the rationales.
        truncated: (N,) bool, True where the rationale was cut off before its end token.

    Raises:
        ValueError: a field has the wrong length, shape or dtype.
    """

    texts: list[str]
    rationales: list[str]
    roles: list[str]
    token_ids: list[list[int]]
    example: Tensor
    group: Tensor
    side: Tensor
    embeddings: Tensor
    truncated: Tensor

    def __post_init__(self) -> None:
        count = len(self.texts)
        _check_lists(self, ("rationales", "roles", "token_ids"), count)
        for name in ("example", "group", "side"):
            _check_tensor(self, name, (count,), torch.long)
        _check_tensor(self, "embeddings", (count, None), torch.float32)
        _check_tensor(self, "truncated", (count,), torch.bool)

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, eq=False)
class PoolTexts:
    """One row per text of the pool (per group), in order of first appearance.

    Args:
        texts: the G texts.
        roles: their roles.
        example: (G,) long.
        group: (G,) long.
        side: (G,) long.
        centroids: (G, D) float32, the L2-normalised mean of the text's rollouts.
        rows: (G,) long, a pool row of each text.
        index: (P,) long, the text of each pool row.
    """

    texts: list[str]
    roles: list[str]
    example: Tensor
    group: Tensor
    side: Tensor
    centroids: Tensor
    rows: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class Pool(Rollouts):
    """Every process's trained rollouts in world order, then every process's anchors: P in all.

    Args:
        false_negatives: a guide that tells which texts mean the same; None compares words only.
    """

    false_negatives: FalseNegatives | None = None

    @cached_property
    def by_text(self) -> PoolTexts:
        """The pool with one centroid per text instead of its rollouts."""
        place: dict[int, int] = {}
        index = [place.setdefault(group, len(place)) for group in self.group.tolist()]
        rows = [0] * len(place)
        for row in reversed(range(len(index))):
            rows[index[row]] = row
        device = self.embeddings.device
        index_tensor = torch.tensor(index, dtype=torch.long, device=device)
        rows_tensor = torch.tensor(rows, dtype=torch.long, device=device)
        sums = self.embeddings.new_zeros(len(rows), self.embeddings.shape[1])
        sums.index_add_(0, index_tensor, self.embeddings)
        return PoolTexts(
            texts=[self.texts[row] for row in rows],
            roles=[self.roles[row] for row in rows],
            example=self.example[rows_tensor],
            group=self.group[rows_tensor],
            side=self.side[rows_tensor],
            centroids=torch.nn.functional.normalize(sums, dim=1),
            rows=rows_tensor,
            index=index_tensor,
        )

    def mask(self, batch: Rollouts) -> Tensor:
        """(B, P) bool, False where a pool row must not be a negative of a batch row.

        Such a false negative has, word for word, a text of the batch row's own side (its own text
        or one that means the same), but belongs to another row or to another side.
        """
        words: dict[str, int] = {}
        text = torch.tensor([words.setdefault(t, len(words)) for t in [*self.texts, *batch.texts]])
        sides: dict[tuple[int, int], int] = {}
        keys = [*zip(self.example.tolist(), self.side.tolist(), strict=True)]
        keys += zip(batch.example.tolist(), batch.side.tolist(), strict=True)
        side = torch.tensor([sides.setdefault(key, len(sides)) for key in keys])
        says = torch.zeros(len(sides), len(words), dtype=torch.bool)  # which side holds which text
        says[side, text] = True
        pool, mine = side[: len(self)], side[len(self) :]
        same_text = says[mine][:, text[: len(self)]]  # (B, P)
        same_side = mine[:, None] == pool[None, :]
        return (same_side | ~same_text).to(self.embeddings.device)

    def guide_weights(self, batch: Rollouts) -> Tensor:
        """(B, P) in [0, 1], how much the guide lets a pool row count as a negative of a batch row.

        Rows of the batch row's own side (its text, and what means the same) are 1: a guide has no
        say in positives. Without a guide all are 1.
        """
        guide = self.false_negatives
        if guide is None:
            return self.embeddings.new_ones(len(batch), len(self))
        sides: dict[tuple[int, int], list[str]] = {}
        for side, text in zip(_sides(self), self.texts, strict=True):
            sides.setdefault(side, []).append(text)
        mine = list(zip(batch.texts, _sides(batch), strict=True))
        asked = {key: i for i, key in enumerate(dict.fromkeys(mine))}  # rollouts share a text's
        known = {text: i for i, text in enumerate(dict.fromkeys(self.texts))}
        counterparts = [
            next((text for text in sides.get(side, []) if text != own), None) for own, side in asked
        ]
        weights = guide.weights([own for own, _ in asked], list(known), counterparts)
        weights = weights[[asked[key] for key in mine]][:, [known[text] for text in self.texts]]
        weights = weights.to(self.embeddings)
        same_example = batch.example[:, None] == self.example[None, :]
        same_side = same_example & (batch.side[:, None] == self.side[None, :])
        trusted = same_side if guide.config.own_negatives else same_example
        return weights.masked_fill(trusted, 1.0)


@dataclass(frozen=True, eq=False)
class RewardBatch(Rollouts):
    """This process's trained rollouts, B of them, and the pool to compare them with.

    Args:
        prompts: the rendered prompts, as the policy read them.
        columns: the other fields of the data row, each a list of B.
        pool: the rollouts and anchors of all processes; contains this batch.
        step: the trainer's global step.
        seed: for rewards that sample.
        prefix_embeddings: (B, K+1, D) float32, or None where no reward asks for them: the embedding
            without any rationale, then after each of K segments; the last is `embeddings`. A reader
            that sees the rationale only has zeros without one.
        prefix_ends: (B, K+1) long, or None: the number of rationale tokens in each prefix, from 0
            to all. A rationale too short for K segments is one: 0, n, ..., n.
    """

    prompts: list[str]
    columns: dict[str, list]
    pool: Pool
    step: int
    seed: int
    prefix_embeddings: Tensor | None = None
    prefix_ends: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count, dim = self.embeddings.shape
        _check_lists(self, ("prompts",), count)
        for name, values in self.columns.items():
            if len(values) != count:
                raise ValueError(
                    f"RewardBatch.columns['{name}'] has {len(values)} entries, expected {count}"
                )
        if self.pool.embeddings.shape[1] != dim:
            raise ValueError(
                f"RewardBatch.pool.embeddings has {self.pool.embeddings.shape[1]} dimensions, "
                f"expected {dim} like RewardBatch.embeddings"
            )
        if (self.prefix_embeddings is None) != (self.prefix_ends is None):
            raise ValueError("RewardBatch.prefix_embeddings and prefix_ends come together or not")
        if self.prefix_embeddings is not None:
            _check_tensor(self, "prefix_embeddings", (count, None, dim), torch.float32)
            _check_tensor(self, "prefix_ends", (count, self.prefix_embeddings.shape[1]), torch.long)

    def prefix(self, number: int) -> RewardBatch:
        """The batch as if every rollout had been embedded after that many of its segments.

        Only `embeddings` differ: pool, masks and siblings are those of the whole rationales, so
        that a rollout's prefixes are scored against the same.

        Args:
            number: 0 (no rationale) to K (the whole).

        Raises:
            ValueError: the batch has no prefix embeddings.
        """
        if self.prefix_embeddings is None:
            raise ValueError(
                "the batch has no prefix embeddings; a reward that needs them declares it with the "
                "attribute `steps = True`"
            )
        return self.read_as(self.prefix_embeddings[:, number])

    def read_as(self, embeddings: Tensor) -> RewardBatch:
        """The batch as if its rollouts had other embeddings, (B, D); else as `prefix`."""
        other = dataclasses.replace(
            self, embeddings=embeddings, prefix_embeddings=None, prefix_ends=None
        )
        other.__dict__.update(_relations=self._relations, _siblings=self._siblings)
        return other

    def positives(self) -> Tensor:
        """(B, P) bool: the same example and side, another text."""
        return self._relations[0]

    def negative_weights(self) -> Tensor:
        """(B, P) float in [0, 1]: how much a pool row counts as a negative of a rollout.

        1 for hard negatives and others; less where a guide's `soft` mode doubts it; 0 for
        positives, siblings and false negatives. In a softmax, add its logarithm to the logit.
        """
        return self._relations[3]

    def masked_share(self) -> float:
        """The share of candidates (texts of other sides) that are masked as false negatives."""
        same_example = self.example[:, None] == self.pool.example[None, :]
        candidates = ~(same_example & (self.side[:, None] == self.pool.side[None, :]))
        masked = candidates & (self.negative_weights() == 0)
        return float(masked.sum() / candidates.sum().clamp(min=1))

    def hard_negatives(self) -> Tensor:
        """(B, P) bool: the same example, another side, not a false negative."""
        return self._relations[1]

    def others(self) -> Tensor:
        """(B, P) bool: every text of the other examples that is not a false negative."""
        return self._relations[2]

    def siblings_mean(self) -> tuple[Tensor, Tensor]:
        """The leave-one-out mean of each rollout's group, from all processes.

        Returns:
            (B, D) mean of the embeddings of the other rollouts of the same text, not normalised
            (zero where there are none), and (B,) long, how many others there are.
        """
        return self._siblings

    @cached_property
    def _relations(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positives, hard negatives, others, and the weights of the two kinds of negatives."""
        same_example = self.example[:, None] == self.pool.example[None, :]
        same_side = same_example & (self.side[:, None] == self.pool.side[None, :])
        other_text = self.group[:, None] != self.pool.group[None, :]
        weights = self.pool.guide_weights(self) * self.pool.mask(self)
        hard = same_example & ~same_side & (weights > 0)
        others = ~same_example & (weights > 0)
        return same_side & other_text, hard, others, weights * (hard | others)

    @cached_property
    def _siblings(self) -> tuple[Tensor, Tensor]:
        same = (self.group[:, None] == self.pool.group[None, :]).to(self.embeddings.dtype)
        count = same.sum(1).long() - 1
        total = same @ self.pool.embeddings - self.embeddings
        mean = total / count.clamp(min=1)[:, None]
        return torch.where(count[:, None] > 0, mean, torch.zeros_like(mean)), count


@dataclass(frozen=True, eq=False)
class RewardOutput:
    """What a reward returns when values alone are not enough.

    Args:
        values: (B,), one reward per rollout; NaN = not scored. A list may hold None.
        steps: (B, K+1), the score of each prefix as in `RewardBatch.prefix_embeddings`, or None;
            what a segment adds to the score is its credit. The class (or function) must declare it
            with the attribute `steps = True`.
        components: named parts of the reward, each (B,), for the log only.
        gate: (B,) bool; False puts the rollout's total below the worst passing total of its group.
            The class (or function) must declare it with the attribute `gates = True`.
        margin: by how much; > 0, in units of the weighted total.
    """

    values: Tensor | list[float | None]
    steps: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    gate: Tensor | None = None
    margin: float = 1.0

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"RewardOutput.margin is {self.margin}; it must be above 0")


def _sides(rollouts: Rollouts) -> list[tuple[int, int]]:
    return list(zip(rollouts.example.tolist(), rollouts.side.tolist(), strict=True))


def _group_index(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) long, the place of each row's group, and how many rows of it are scored, per column."""
    _, index = torch.unique(group, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    scored = (~values.isnan()).to(values.dtype)
    return index, values.new_zeros(groups, *values.shape[1:]).index_add_(0, index, scored)


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


def row_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' own fields as columns; a field that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
