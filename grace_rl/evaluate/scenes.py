"""Scores of a policy on held-out scenes, where the world knows the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder, RationaleMode
from grace_rl.embed.reader import Written
from grace_rl.evaluate.similarity import retrieval_scores

SIMILARITY_SCORES = ("recall_at_1", "triplet_accuracy", "spearman")
FACT_SCORES = ("coverage", "precision")


def task_name(split: str) -> str:
    """Prefix of a split's scores: `scenes` for the test split, else `scenes_<split>`."""
    return "scenes" if split == "test" else f"scenes_{split}"


def score_policy(
    encoder: RationaleEncoder, splits: Sequence[str], count: int, rationale: RationaleMode = "greedy"
) -> dict[str, float]:
    """Scores on the first `count` triplets of each split.

    Returns:
        `{"scenes/recall_at_1": ..., ...}`; all scores in 0 to 1 but Spearman (-1 to 1). Fact scores only where
        rationales are written.
    """
    scores: dict[str, float] = {}
    for split in splits:
        rows = scenes.rows(split=split, form="triplet", count=count)
        written = encoder.write(_texts(rows), rationale)
        scores |= {f"{task_name(split)}/{k}": v for k, v in score_written(encoder, rows, written).items()}
        if rationale != "none":
            facts = score_facts(rows, [item.rationale for item in written])
            scores |= {f"{task_name(split)}/{k}": v for k, v in facts.items()}
    return scores


def score_written(encoder: RationaleEncoder, rows: Sequence[dict[str, Any]], written: list[Written]) -> dict[str, float]:
    """Similarity scores of given rationales for `_texts(rows)`.

    The corpus is centred by its own mean, so that policies which never trained a centre compare on equal terms.
    """
    raw = encoder.reader.read(written)
    if encoder.reader.config.centre:
        raw = raw - raw.mean(0)
    vectors = torch.nn.functional.normalize(raw, dim=-1)
    return similarity_scores(rows, *vectors.chunk(3))


def similarity_scores(
    rows: Sequence[dict[str, Any]], queries: Tensor, positives: Tensor, negatives: Tensor
) -> dict[str, float]:
    """Recall@1, triplet accuracy, and Spearman of all query-document pairs with gold similarity.

    Args:
        rows: N triplets with their scenes.
        queries, positives, negatives: (N, H) unit vectors.
    """
    similarity = queries @ torch.cat([positives, negatives]).T  # (N, 2N)
    documents = [row["scene"] for row in rows] + [row["negative_scene"] for row in rows]
    gold = [scenes.gold_similarity(row["scene"], document) for row in rows for document in documents]
    correlation = float(spearmanr(similarity.flatten().cpu().numpy(), gold).statistic)
    return retrieval_scores(queries, positives, negatives) | {
        "spearman": 0.0 if math.isnan(correlation) else correlation
    }


def score_facts(rows: Sequence[dict[str, Any]], rationales: Sequence[str]) -> dict[str, float]:
    """Mean share of true facts that are stated (coverage) and of statements that are true (precision)."""
    truth = [row["scene"] for row in rows] * 2 + [row["negative_scene"] for row in rows]
    readings = [scenes.read_facts(rationale) for rationale in rationales]
    return {
        "coverage": sum(r.coverage(t) for r, t in zip(readings, truth, strict=True)) / len(truth),
        "precision": sum(r.precision(t) for r, t in zip(readings, truth, strict=True)) / len(truth),
    }


def _texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Queries, then positives, then first negatives."""
    return [row["query"] for row in rows] + [row["positive"] for row in rows] + [_first_negative(row) for row in rows]


def _first_negative(row: dict[str, Any]) -> str:
    negative = row["negative"]
    return negative if isinstance(negative, str) else str(negative[0])


def example_rationales(encoder: RationaleEncoder, count: int = 3) -> list[dict[str, str]]:
    """Greedy rationales for the first queries of the test split, to look at."""
    texts = [row["query"] for row in scenes.rows(split="test", form="triplet", count=count)]
    rationales = [item.rationale for item in encoder.write(texts)]
    return [{"text": t, "rationale": r} for t, r in zip(texts, rationales, strict=True)]
