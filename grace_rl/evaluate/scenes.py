"""Scores of a policy on held-out scenes, where the world knows the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Written
from grace_rl.embed.settings import RationaleMode
from grace_rl.embed.similarity import rank_correlation, retrieval_scores

SIMILARITY_SCORES = ("recall_at_1", "triplet_accuracy", "spearman")
ROW_SEED = 1  # the cold start and the recipes were chosen while looking at the rows of seed 0


def task_name(split: str) -> str:
    """Prefix of a split's scores: `scenes` for the test split, else `scenes_<split>`."""
    return "scenes" if split == "test" else f"scenes_{split}"


def score_policy(
    encoder: Any,
    splits: Sequence[str],
    count: int,
    rationale: RationaleMode = "greedy",
) -> dict[str, float]:
    """Scores on `count` triplets and `count` graded pairs of each split.

    - `recall_at_1`: the query's positive beats every other positive and every hard negative.
    - `triplet_accuracy`: it beats the query's own hard negative. Ties are errors in both.
    - `spearman`: of the similarities of graded pairs with the share of facts they have in common.
    - `coverage`, `precision`: share of true facts that rationales state, and of statements that are
      true; only where rationales are written.

    Every split's texts are centred by their own mean where the reader centres, so that policies
    compare on equal terms whether or not they have trained a centre. An encoder that writes no
    rationales (`writes_rationales` is false) is scored on the vectors that it gives.

    Args:
        encoder: A `RationaleEncoder`, or one whose `encode(texts)` gives `Encoded` unit vectors.
        splits: Splits of scenes.
        count: Triplets, and pairs, of each split.
        rationale: `none` has the text read in the rationale's place.

    Returns:
        `{"scenes/recall_at_1": ..., ...}`, in 0 to 1, Spearman in -1 to 1.
    """
    scores: dict[str, float] = {}
    for split in splits:
        known: Any = split  # `rows` refuses a split that is none
        triplets = scenes.rows(split=known, form="triplet", count=count, seed=ROW_SEED)
        pairs = scenes.rows(split=known, form="pair", count=count, seed=ROW_SEED)
        texts = [row["query"] for row in triplets] + [row["positive"] for row in triplets]
        texts += [row["negative"][0] for row in triplets]
        texts += [row["sentence1"] for row in pairs] + [row["sentence2"] for row in pairs]
        written: list[Written] = []
        if encoder.writes_rationales:
            written = encoder.write(texts, rationale)
            raw = encoder.reader.read(written)
            unit = encoder.reader.finish(raw, encoder.reader.mean(raw))
        else:
            unit = encoder.encode(texts).vectors
        queries, positives, negatives, first, second = unit.split(count)
        found = retrieval_scores(queries, positives, negatives)
        gold = [row["score"] for row in pairs]
        found["spearman"] = rank_correlation((first * second).sum(-1).tolist(), gold)
        if written and rationale != "none":
            found |= score_facts(triplets, [item.rationale for item in written[: 3 * count]])
        scores |= {f"{task_name(split)}/{name}": value for name, value in found.items()}
    return scores


def score_facts(rows: Sequence[dict[str, Any]], rationales: Sequence[str]) -> dict[str, float]:
    """Mean share of true facts that are stated (coverage), of statements that hold (precision)."""
    truth = [row["scene"] for row in rows] * 2 + [row["negative_scene"] for row in rows]
    readings = [scenes.read_facts(rationale) for rationale in rationales]
    return {
        "coverage": sum(r.coverage(t) for r, t in zip(readings, truth, strict=True)) / len(truth),
        "precision": sum(r.precision(t) for r, t in zip(readings, truth, strict=True)) / len(truth),
    }


def example_rationales(encoder: RationaleEncoder, count: int = 3) -> list[dict[str, str]]:
    """Greedy rationales for the first queries of the test split, to look at."""
    texts = [
        row["query"]
        for row in scenes.rows(split="test", form="triplet", count=count, seed=ROW_SEED)
    ]
    rationales = [item.rationale for item in encoder.write(texts)]
    return [{"text": t, "rationale": r} for t, r in zip(texts, rationales, strict=True)]
