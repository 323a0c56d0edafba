"""A reward that compares embeddings: nearer to the counterpart than to the nearest other text."""

from __future__ import annotations

import torch

from grace_rl.reward import RewardBatch


class MyReward:
    """Cosine to the row's other text, minus `scale` times the cosine to the nearest negative.

    Args:
        scale: weight of the negative, 0 to 1.
    """

    def __init__(self, scale: float = 0.5) -> None:
        self.check(scale)
        self.scale = scale

    @staticmethod
    def check(scale: float) -> None:
        if not 0 <= scale <= 1:
            raise ValueError(f"scale must be from 0 to 1, not {scale}")

    def __call__(self, batch: RewardBatch) -> torch.Tensor:
        texts = batch.pool.by_text  # one centroid per text of all processes
        cosine = batch.embeddings @ texts.centroids.T  # (B, G)
        positive = batch.positives()[:, texts.rows]  # (B, G) bool
        negative = (batch.hard_negatives() | batch.others())[:, texts.rows]
        near = (cosine * positive).sum(1) / positive.sum(1)  # NaN, not scored, without a positive
        far = cosine.masked_fill(~negative, -1.0).amax(1)
        return near - self.scale * far
