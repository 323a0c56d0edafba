"""The reward of the GRACE paper, as its code computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from grace_rl.reward import RewardBatch, RewardOutput


class GracePublished:
    """The published GRACE reward, for comparison with the paper.

    In plain words, with labels (rollouts of the positive, one anchor for query and negatives):

    1. positive: cosine of the rollout and its query's anchor.
    2. negative: cosine of the query's anchor and the negative's, summed over negatives.
    3. consistency: mean cosine of the rollout and its siblings.
    4. cross: for each other row the largest cosine of the query's anchor and that row's rollouts;
       the mean over rows.
    5. reward = (positive - negative + consistency_weight * consistency - cross_weight * cross)
       / temperature. A truncated rollout gets `truncated_value` instead.

    Terms 2 and 4 are the same number for all rollouts of a group and cancel in the advantage: the
    negatives do not train the policy. Use `contrastive` to train.

    Without labels (rollouts of the text, one anchor of the same text): positive is the cosine to
    the own anchor, there is no negative, and cross is the mean cosine of the *rollout* and the
    other rows' anchors, which does not cancel.

    Args:
        temperature: divides the sum; the paper's "10" is 1 / 0.1.
        consistency_weight: 0 to 1; lambda 1.
        cross_weight: 0 to 1; lambda 2.
        truncated_value: replaces the reward of a truncated rollout; it is not divided.

    Requirements: the published roles, `{positive: {samples: 8}, query: {samples: 1, train: false},
    negative: {samples: 1, train: false}}` or `{text: {samples: 8}, anchor: {samples: 1, train:
    false}}`; other trained roles raise ValueError.

    Relations: `contrastive` keeps the negatives effective; `consistency` is term 3 alone;
    `length` puts a truncated rollout below its siblings, which the constant does not promise.

    Differences from the code: two rows with the same positive text stay two groups (the code merges
    them by accident); an anchor with several samples is their mean.

    Source: GRACE (arXiv 2510.04506), eq. 13 to 17 and appendix A.2.5, and its published code.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"query": [[1, 0]], "positive": [[1, 0], [3, 4]], "negative": [[0, 1]]}],
        ...     trained=["positive"],
        ... )
        >>> GracePublished()(batch).values
        tensor([11.2000,  7.2000])
    """

    trained_roles = (("positive",), ("text",))

    def __init__(
        self,
        temperature: float = 0.1,
        consistency_weight: float = 0.2,
        cross_weight: float = 0.2,
        truncated_value: float = -1.0,
    ) -> None:
        self.check(temperature)
        self.temperature = temperature
        self.consistency_weight = consistency_weight
        self.cross_weight = cross_weight
        self.truncated_value = truncated_value

    @staticmethod
    def check(temperature: float, **others: float) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        trained = set(batch.roles)
        if trained == {"positive"}:
            terms = self._supervised(batch)
        elif trained == {"text"}:
            terms = self._unsupervised(batch)
        else:
            raise ValueError(
                f"grace_published scores rollouts of 'positive' (or of 'text') only, not of "
                f"{sorted(trained)}; set `train: false` and `samples: 1` on the other roles"
            )
        siblings, _ = batch.siblings_mean()
        terms["consistency"] = (batch.embeddings * siblings).sum(dim=1)
        total = (
            terms["positive"]
            - terms["negative"]
            + self.consistency_weight * terms["consistency"]
            - self.cross_weight * terms["cross"]
        )
        values = (total / self.temperature).masked_fill(batch.truncated, self.truncated_value)
        return RewardOutput(values, components=terms)

    def _supervised(self, batch: RewardBatch) -> dict[str, Tensor]:
        pool, texts = batch.pool, batch.pool.by_text
        query = _anchors(batch, "query")  # (B, D)
        negative = (query @ texts.centroids.T) * (
            _has_role(texts.roles, "negative", batch) & _same_row(batch, texts.example)
        )
        # The largest cosine per other row, then the mean over rows.
        cosine = query @ pool.embeddings.T  # (B, P)
        rolled_out = _has_role(pool.roles, "positive", batch)
        rows, row_of = torch.unique(pool.example, return_inverse=True)
        largest = torch.full((len(batch), len(rows)), -torch.inf, device=cosine.device)
        largest = largest.scatter_reduce(
            1,
            row_of.expand(len(batch), -1),
            cosine.masked_fill(~rolled_out, -torch.inf),
            reduce="amax",
        )
        other = largest.isfinite() & ~_same_row(batch, rows)
        return {
            "positive": (query * batch.embeddings).sum(dim=1),
            "negative": negative.sum(dim=1),
            "cross": _masked_mean(largest, other),
        }

    def _unsupervised(self, batch: RewardBatch) -> dict[str, Tensor]:
        texts = batch.pool.by_text
        anchor = _anchors(batch, "anchor")
        other = _has_role(texts.roles, "anchor", batch) & ~_same_row(batch, texts.example)
        return {
            "positive": (anchor * batch.embeddings).sum(dim=1),
            "negative": torch.zeros_like(batch.embeddings[:, 0]),
            "cross": _masked_mean(batch.embeddings @ texts.centroids.T, other),
        }


def _has_role(roles: list[str], role: str, batch: RewardBatch) -> Tensor:
    return torch.tensor([name == role for name in roles], device=batch.embeddings.device)


def _same_row(batch: RewardBatch, example: Tensor) -> Tensor:
    return batch.example[:, None] == example[None, :]


def _anchors(batch: RewardBatch, role: str) -> Tensor:
    """(B, D), the anchor of each rollout's row; the mean where a row has several."""
    texts = batch.pool.by_text
    mine = _has_role(texts.roles, role, batch) & _same_row(batch, texts.example)  # (B, G)
    if not bool(mine.any(dim=1).all()):
        raise ValueError(
            f"grace_published needs the role {role!r}; add `{role}: {{samples: 1, train: false}}`"
        )
    mean = mine.to(texts.centroids.dtype) @ texts.centroids / mine.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,), 0 where the mask leaves nothing."""
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
