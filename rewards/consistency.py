"""How much a rollout agrees with the other rollouts of its text."""

from __future__ import annotations

import torch

from grace_rl.reward import RewardBatch


class Consistency:
    """Mean cosine of a rollout and its siblings, the other rollouts of the same text.

    In plain words: the policy is paid for saying the same about a text each time, so the embedding
    of a sampled rationale becomes stable. The rollout itself does not count.

    Requirements: at least two samples per trained role; a lone rollout is not scored. No columns.

    Recommendations: a weight of 0.1 to 0.5 of the main reward, never alone: saying the same about
    *every* text is the best answer to this reward. Watch `embedding/mean_cosine`.

    Relations: the label-free part of `contrastive`; term 3 of `grace_published`, there divided by
    its temperature. Negatives do not enter.

    Source: GRACE (arXiv 2510.04506), eq. 13 to 17 (R_consist).

    Example:
        >>> from grace_rl.reward.example import example_batch
        >>> batch = example_batch([{"text": [[1, 0], [1, 0], [0, 1]]}], trained=["text"])
        >>> Consistency()(batch)
        tensor([0.5000, 0.5000, 0.0000])
    """

    def __call__(self, batch: RewardBatch) -> torch.Tensor:
        siblings, count = batch.siblings_mean()
        return (batch.embeddings * siblings).sum(dim=1).where(count > 0, torch.nan)
