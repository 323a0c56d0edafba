"""What a reward sees, and what it returns.

A reward scores this process's trained rollouts (a `RewardBatch` of B) and may compare them with
everybody's (`batch.pool`, P rollouts and anchors of all processes). Comparisons are best made with
texts, not with single rollouts: `pool.by_text` has one centroid per text, which is less noisy.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from grace_rl.rollout.rollouts import Rollouts, row_fields

if TYPE_CHECKING:
    from grace_rl.data.false_negatives import FalseNegatives


SEEN = {
    *("texts", "rationales", "roles", "token_ids", "example", "group", "side", "truncated"),
    *("embeddings", "prompts", "columns", "prefix_embeddings", "prefix_ends", "step", "seed"),
}
"""Columns that a reward sees; what rewards say and what follows from it is not among them."""


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Rollouts):
    """Every process's trained rollouts in world order, then every process's anchors: P in all.

    Args:
        false_negatives: a guide that tells which texts mean the same; None compares words only.
    """

    false_negatives: FalseNegatives | None = None

    def apart(self) -> Self:
        """The same pool in memory of its own."""
        return dataclasses.replace(self, **_copies(self))

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
        same_example = batch.example[:, None] == self.example[None, :]
        same_side = same_example & (batch.side[:, None] == self.side[None, :])
        return guide.trust_labels(weights.to(self.embeddings), same_side, same_example)


@dataclass(frozen=True, eq=False, kw_only=True)
class RewardBatch(Rollouts):
    """This process's trained rollouts, B of them, and the pool to compare them with.

    Has the columns of `Rollouts` up to `prefix_ends`, and `step` and `seed` for schedules and for
    rewards that sample; what rewards say and what follows from it is not in it.

    Args:
        pool: the rollouts and anchors of all processes; contains this batch.
    """

    pool: Pool

    def __post_init__(self) -> None:
        super().__post_init__()
        dim = self.embeddings.shape[1]
        if self.pool.embeddings.shape[1] != dim:
            raise ValueError(
                f"RewardBatch.pool.embeddings has {self.pool.embeddings.shape[1]} dimensions, "
                f"expected {dim} like RewardBatch.embeddings"
            )
        if (self.prefix_embeddings is None) != (self.prefix_ends is None):
            raise ValueError("RewardBatch.prefix_embeddings and prefix_ends come together or not")

    def apart(self) -> RewardBatch:
        """The same batch in memory of its own: whatever a reward does to it, no other sees it."""
        alone = dataclasses.replace(self, **_copies(self), pool=self.pool.apart())
        alone.__dict__["_source"] = self
        return alone

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

    def read_as(self, embeddings: Tensor, **columns: Any) -> RewardBatch:
        """The batch as if its rollouts had other embeddings, (B, D), and maybe other words (their
        columns by name); else as `prefix`."""
        prefixes = {"prefix_embeddings": None, "prefix_ends": None}
        other = dataclasses.replace(self, embeddings=embeddings, **prefixes | columns)
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
        if source := self.__dict__.get("_source"):
            positives, hard, others, weights = source._relations
            return positives.clone(), hard.clone(), others.clone(), weights.clone()
        same_example = self.example[:, None] == self.pool.example[None, :]
        same_side = same_example & (self.side[:, None] == self.pool.side[None, :])
        other_text = self.group[:, None] != self.pool.group[None, :]
        weights = self.pool.guide_weights(self) * self.pool.mask(self)
        hard = same_example & ~same_side & (weights > 0)
        others = ~same_example & (weights > 0)
        return same_side & other_text, hard, others, weights * (hard | others)

    @cached_property
    def _siblings(self) -> tuple[Tensor, Tensor]:
        if source := self.__dict__.get("_source"):
            mean, count = source._siblings
            return mean.clone(), count.clone()
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


def reward_batch(
    world: Rollouts, rows: slice, false_negatives: FalseNegatives | None = None
) -> RewardBatch:
    """What the rewards of one process see.

    Args:
        world: every process's rollouts and anchors.
        rows: the process's own among them.
        false_negatives: see `Pool`.
    """

    def seen(of: Rollouts) -> dict[str, Any]:
        return {f.name: getattr(of, f.name) for f in dataclasses.fields(of) if f.name in SEEN}

    pool = Pool(**seen(world), false_negatives=false_negatives)
    return RewardBatch(**seen(world.take(rows)), pool=pool)


def _copies(rollouts: Rollouts) -> dict[str, Any]:
    """Every column, copied: what is in lists and mappings too."""
    seen: dict[int, Any] = {}  # rollouts of a row share its values, and so do their copies
    values = {name: getattr(rollouts, name) for name in row_fields(rollouts)}
    return {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value, seen)
        for name, value in values.items()
    }


def _sides(rollouts: Rollouts) -> list[tuple[int, int]]:
    return list(zip(rollouts.example.tolist(), rollouts.side.tolist(), strict=True))
