"""Scores of vectors on triplets. Ties are errors: vectors that tell nothing apart earn nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

TIE = 1e-6  # equal vectors may differ in their last bits


def retrieval_scores(queries: Tensor, positives: Tensor, negatives: Tensor) -> dict[str, float]:
    """Recall@1 of the positive and triplet accuracy, each in 0 to 1.

    Recall@1 is among all positives and hard negatives.

    Args:
        queries, positives, negatives: (N, H) unit vectors.

    >>> same = torch.ones(2, 1)
    >>> retrieval_scores(same, same, same)
    {'recall_at_1': 0.0, 'triplet_accuracy': 0.0}
    """
    similarity = queries @ torch.cat([positives, negatives]).T  # (N, 2N)
    own = similarity.diagonal().clone() - TIE
    negative = similarity.diagonal(len(queries)).clone()
    similarity.diagonal().fill_(-torch.inf)
    return {
        "recall_at_1": float((own > similarity.amax(1)).float().mean()),
        "triplet_accuracy": float((own > negative).float().mean()),
    }


def rank_correlation(found: Sequence[float], gold: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; 0 where all of `found` are equal, which ranks nothing.

    >>> rank_correlation([0.1, 0.2, 0.9], [0, 1, 5]), rank_correlation([0.5, 0.5, 0.5], [0, 1, 5])
    (1.0, 0.0)
    """
    if max(found) == min(found):
        return 0.0
    correlation = float(spearmanr(found, gold).statistic)
    return 0.0 if math.isnan(correlation) else correlation
