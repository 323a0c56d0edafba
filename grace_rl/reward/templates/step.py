"""A step-wise reward: a score after each segment of the rationale, so that credit reaches it."""

from __future__ import annotations

import torch

from grace_rl.reward import RewardBatch, RewardOutput


class MyReward:
    """Cosine to the row's other text, after each segment of the rationale.

    What a segment adds to the score is its credit; the whole rationale's score is the reward.
    """

    steps = True

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        if batch.prefix_embeddings is None:  # there, because of `steps = True`
            raise RuntimeError("batch.prefix_embeddings must be there")
        texts = batch.pool.by_text
        positive = batch.positives()[:, texts.rows].float()  # (B, G)
        weights = positive / positive.sum(1, keepdim=True)  # NaN, not scored, without a positive
        target = weights @ texts.centroids  # (B, D)
        steps = torch.einsum("bkd,bd->bk", batch.prefix_embeddings, target)  # (B, K+1)
        return RewardOutput(values=steps[:, -1], steps=steps)
