"""Numbers that show whether embeddings and rationales stay diverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values, 1 (collapsed) to min(N, H).

    Source: Roy and Vetterli 2007.

    Args:
        vectors: (N, H).

    >>> round(effective_rank(torch.eye(4)), 3)
    4.0
    """
    values = torch.linalg.svdvals(vectors.float())
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(shares * shares.clamp(min=1e-12).log()).sum()))


def mean_cosine(unit: Tensor, example: Tensor) -> float:
    """Mean cosine of vectors from different examples, -1 to 1; NaN with fewer than two examples.

    Args:
        unit: (N, H), unit length.
        example: (N,).
    """
    different = example.unsqueeze(0) != example.unsqueeze(1)
    return float((unit @ unit.T)[different].mean())


def collapse_metrics(unit: Tensor, raw: Tensor, example: Tensor) -> dict[str, float]:
    """Collapse of a batch: of the (centred) vectors that rewards see, and of the raw ones.

    Centring would hide a collapse of the raw ones.

    Args:
        unit: (N, H) embeddings as rewards see them.
        raw: (N, H) vectors before centring.
        example: (N,) row numbers.
    """
    example = example.to(unit.device)
    return {
        "embedding/mean_cosine": mean_cosine(unit, example),
        "embedding/raw_mean_cosine": mean_cosine(normalize(raw, dim=-1), example),
        "embedding/effective_rank": effective_rank(unit),
    }


def distinct_n(token_ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """Share of distinct token 1-grams and 2-grams among all that were written, 0 to 1.

    >>> distinct_n([[1, 2], [1, 2]])
    {'completions/distinct_1': 0.5, 'completions/distinct_2': 0.5}
    """
    metrics = {}
    for n in (1, 2):
        grams = [tuple(ids[i : i + n]) for ids in token_ids for i in range(len(ids) - n + 1)]
        metrics[f"completions/distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    return metrics
