"""InfoNCE over the texts of a pool: what `contrastive` pays and the reader loss minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grace_rl.reward.batch import RewardBatch


@dataclass(frozen=True)
class TextContrast:
    """How near each rollout is to what means the same, and to all that does not.

    Texts of the pool take part as centroids of their rollouts. The counterpart is what means the
    same; where no text does, the rollout's siblings, the others of the same text.

    Attributes:
        counterpart: (B,) cosine to it.
        similarity: (B, G) cosines to the texts.
        weights: (B, G) in [0, 1], how much each text counts as a negative.
        scored: (B,) bool, False where there is no counterpart or no negative.
    """

    counterpart: Tensor
    similarity: Tensor
    weights: Tensor
    scored: Tensor

    @property
    def hardest(self) -> Tensor:
        """(B,) cosine to the nearest negative, -inf where there is none."""
        return self.similarity.masked_fill(self.weights == 0, -torch.inf).amax(dim=1)

    @property
    def accuracy(self) -> Tensor:
        """(B,) 1 where the counterpart is nearer than every negative, else 0."""
        return (self.counterpart > self.hardest).float()

    def log_softmax(self, temperature: float) -> Tensor:
        """(B,) log-probability of the counterpart among the negatives, in nats; at most 0."""
        negatives = self.similarity.masked_fill(self.weights == 0, -torch.inf)
        logits = torch.cat([self.counterpart[:, None], negatives], dim=1) / temperature
        logits[:, 1:] += self.weights.log()
        return logits.log_softmax(dim=1)[:, 0]


def contrast_texts(batch: RewardBatch) -> TextContrast:
    """Compare every rollout of a batch with the texts of its pool; differentiable."""
    texts = batch.pool.by_text
    similarity = batch.embeddings @ texts.centroids.T  # (B, G)
    positive = batch.positives()[:, texts.rows]  # (B, G)
    weights = batch.negative_weights()[:, texts.rows]  # (B, G), 0 where it is no negative
    siblings, count = batch.siblings_mean()
    siblings = torch.nn.functional.normalize(siblings, dim=1)
    counterpart = torch.where(
        positive.any(dim=1),
        (similarity * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1),
        (batch.embeddings * siblings).sum(dim=1),
    )
    scored = (weights > 0).any(dim=1) & (positive.any(dim=1) | (count > 0))
    return TextContrast(counterpart, similarity, weights, scored)
