"""Keep away from the texts of other rows that come closest."""

from __future__ import annotations

import math

import torch

from grace_rl.reward import RewardBatch, RewardOutput


class HardNegative:
    """Minus the (smooth) largest cosine of a rollout and the texts that mean something else.

    In plain words, for each rollout:

    1. Take one centroid per text of the other rows, false negatives excepted.
    2. Take the smooth maximum of the cosines: temperature * log(mean(exp(cosine / temperature))).
    3. The reward is minus that.

    It looks from the rollout, so it differs between the rollouts of a group and does not cancel in
    the advantage; the published cross-group term looks from the query's anchor and does.

    Args:
        temperature: towards 0 only the closest text counts, a large one makes it the plain mean;
            0.05 to 0.2 is common.
        own_row: count the row's own hard negatives too.

    Requirements: at least two rows in the pool (or `own_row` and a negative); a rollout without any
    negative is not scored. No columns.

    Recommendations: beside a reward that pulls (a weight of 0.2 to 1); alone it only spreads.

    Relations: `contrastive` weighs pull and push in one softmax; this is its push alone. Term 4 of
    `grace_published` with labels cancels, this does not.

    Source: R_hard of GRACE (arXiv 2510.04506, eq. 13 to 17), scored from the document's side.

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch(
        ...     [{"text": [[1, 0], [3, 4]]}, {"text": [[0, 1]]}], trained=["text"]
        ... )
        >>> [round(value, 2) for value in HardNegative()(batch).values.tolist()]
        [-0.0, -0.8, -0.45]
    """

    def __init__(self, temperature: float = 0.1, own_row: bool = False) -> None:
        self.check(temperature, own_row)
        self.temperature = temperature
        self.own_row = own_row

    @staticmethod
    def check(temperature: float, own_row: bool) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        texts = batch.pool.by_text
        negative = batch.others() | batch.hard_negatives() if self.own_row else batch.others()
        negative = negative[:, texts.rows]  # (B, G)
        weights = batch.negative_weights()[:, texts.rows] * negative
        cosine = (batch.embeddings @ texts.centroids.T).masked_fill(~negative, -torch.inf)
        total = weights.sum(dim=1).where(negative.any(dim=1), 1.0)
        smooth = (cosine / self.temperature + weights.log()).logsumexp(dim=1) - total.log()
        scored = negative.any(dim=1)
        hardest = cosine.amax(dim=1)
        return RewardOutput(
            values=(-self.temperature * smooth).where(scored, math.nan),
            components={"hardest": hardest.where(scored, math.nan)},
        )
