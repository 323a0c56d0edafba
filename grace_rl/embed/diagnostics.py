"""Numbers that show whether embeddings and rationales stay diverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grace_rl.embed.similarity import rank_correlation


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


# --- of a finished encoder -------------------------------------------------------------------


def uniformity(unit: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs; 0 (all equal) down to about -4 (spread).

    Source: arXiv 2005.10242, eq. 4.

    Args:
        unit: (N, H) unit vectors, N at least 2.

    >>> round(uniformity(torch.ones(3, 1)), 3)
    0.0
    """
    squared = torch.pdist(unit.float()).square()
    return float(squared.mul(-2).exp().mean().log())


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of pairs that mean the same, 0 (equal) to 4.

    Source: arXiv 2005.10242, eq. 3.

    Args:
        first, second: (N, H) unit vectors, row by row a pair.
    """
    return float((first - second).square().sum(-1).mean())


def describe_encoder(
    encoder: Any,
    rationale: str,
    texts: Sequence[str],
    pairs: Sequence[tuple[str, str, float]] = (),
    steps: int = 4,
) -> dict[str, Any]:
    """What an encoder's vectors and rationales are like.

    Args:
        encoder: A `RationaleEncoder` or another whose `encode` gives `Encoded`.
        rationale: `greedy`, `sample` or `none`.
        texts: At least 3 different texts.
        pairs: Two texts and their gold similarity, 0 to 1.
        steps: K, the prefixes of rationales that are compared.

    Returns:
        `anisotropy` (mean cosine of different texts), `shared_vectors` (share of texts whose vector
        another text has too, as those of empty rationales do), `effective_rank`, `uniformity`,
        `alignment` (of pairs whose gold is at least 0.8); where rationales are written also
        `rationales`, and `prefix_scores`: Spearman with gold when only a prefix of each rationale
        is read, from none of it (s_0) to all (s_K).
    """
    found: dict[str, Any] = {"texts": len(texts), "rationale": rationale}
    if len(texts) < 3:
        return found
    encoded = encoder.encode(list(texts), rationale)
    unit = encoded.vectors.float()
    found["anisotropy"] = mean_cosine(unit, torch.arange(len(unit)))
    _, counts = unit.round(decimals=5).unique(dim=0, return_counts=True)
    found["shared_vectors"] = int(counts[counts > 1].sum()) / len(unit)
    found["effective_rank"] = effective_rank(unit)
    found["uniformity"] = uniformity(unit)
    if alike := [pair for pair in pairs if pair[2] >= 0.8]:
        both = encoder.encode([a for a, _, _ in alike] + [b for _, b, _ in alike], rationale)
        found["alignment"] = alignment(*both.vectors.float().chunk(2))
    if encoder.writes_rationales and rationale != "none":
        found["rationales"] = describe_rationales(texts, encoded.rationales, encoded.lengths)
        scores = prefix_scores(encoder, rationale, pairs, steps) if len(pairs) > 2 else None
        if scores is not None:
            found["prefix_scores"] = scores
    return found


def describe_rationales(
    texts: Sequence[str], rationales: Sequence[str], lengths: Sequence[int]
) -> dict[str, float]:
    """Length, diversity, and how much is copied.

    Returns:
        `tokens` (mean length), `empty`, `distinct` (share of different rationales), `copied` (share
        of a rationale's words that its text has) and `repeated` (share of its words that it has
        had before).

    >>> describe_rationales(["a dog ran"], ["a dog a dog"], [4])
    {'tokens': 4.0, 'empty': 0.0, 'distinct': 1.0, 'copied': 1.0, 'repeated': 0.5}
    """
    words = [rationale.lower().split() for rationale in rationales]
    some = [(own, text) for own, text in zip(words, texts, strict=True) if own]
    copied = [sum(w in set(text.lower().split()) for w in own) / len(own) for own, text in some]
    repeated = [1 - len(set(own)) / len(own) for own, _ in some]
    count = max(1, len(some))
    return {
        "tokens": sum(lengths) / max(1, len(lengths)),
        "empty": 1 - len(some) / max(1, len(words)),
        "distinct": len(set(rationales)) / max(1, len(rationales)),
        "copied": sum(copied) / count,
        "repeated": sum(repeated) / count,
    }


def prefix_scores(
    encoder: Any, rationale: str, pairs: Sequence[tuple[str, str, float]], steps: int = 4
) -> list[float] | None:
    """Spearman with gold of pairs, when k / K of each rationale is read, for k = 0 to K.

    None for a reader that cannot read prefixes (a sentence encoder). A bottleneck that has read
    nothing tells nothing apart, so its s_0 is 0.
    """
    if not encoder.reader.config.reads_with_language_model:
        return None
    written = encoder.write([a for a, _, _ in pairs] + [b for _, b, _ in pairs], rationale)
    lengths = torch.tensor([len(item.token_ids) for item in written])
    shares = torch.arange(steps + 1) / steps
    ends = (lengths.unsqueeze(1) * shares).round().long()  # (2N, K+1)
    unit = encoder.reader.finish(encoder.reader.read(written, ends)).float().cpu()
    first, second = unit.chunk(2)
    cosines = (first * second).sum(-1)  # (N, K+1)
    gold = [score for _, _, score in pairs]
    return [rank_correlation(cosines[:, k].tolist(), gold) for k in range(steps + 1)]
