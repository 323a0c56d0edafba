"""Scores: what they reward, and that ties earn nothing."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from grace_rl.data import scenes
from grace_rl.embed.diagnostics import collapse_metrics, effective_rank
from grace_rl.embed.similarity import retrieval_scores
from grace_rl.evaluate.scenes import score_facts, task_name
from grace_rl.evaluate.tables import rationale_table, score_table


def unit(count: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_perfect_and_confused_vectors() -> None:
    queries, negatives = unit(20, 0), unit(20, 1)
    perfect = retrieval_scores(queries, queries, negatives)
    assert perfect == {"recall_at_1": 1.0, "triplet_accuracy": 1.0}
    confused = retrieval_scores(queries, negatives, queries)
    assert confused == {"recall_at_1": 0.0, "triplet_accuracy": 0.0}


def test_a_hard_negative_as_close_as_the_positive_is_an_error() -> None:
    queries, documents = unit(20, 0), unit(20, 1)
    assert retrieval_scores(queries, documents, documents)["triplet_accuracy"] == 0.0


def test_another_rows_positive_can_spoil_recall_alone() -> None:
    queries = unit(20, 0)
    scores = retrieval_scores(queries, queries.roll(1, 0) * 0.9 + queries * 0.1, -queries)
    assert scores == {"recall_at_1": 0.0, "triplet_accuracy": 1.0}


def test_facts_are_scored_against_each_texts_own_scene() -> None:
    rows = scenes.rows("test", "triplet", 10)
    own = [row["rationale"] for row in rows] * 2 + [row["negative_rationale"] for row in rows]
    assert score_facts(rows, own) == {"coverage": 1.0, "precision": 1.0}
    of_the_query = [row["rationale"] for row in rows] * 3
    assert score_facts(rows, of_the_query)["precision"] < 1.0


def test_collapse_shows_in_raw_vectors_that_centring_hides() -> None:
    common = torch.ones(1, 32) * 5
    raw = unit(40, 0) + common
    centred = normalize(raw - raw.mean(0), dim=-1)
    metrics = collapse_metrics(centred, raw, torch.arange(40))
    assert metrics["embedding/raw_mean_cosine"] > 0.9
    assert abs(metrics["embedding/mean_cosine"]) < 0.1
    assert effective_rank(common.expand(40, 32)) < 1.5 < metrics["embedding/effective_rank"]


def test_tables_show_every_row_and_hostile_text_as_text() -> None:
    rows = [
        {
            "name": "cold_start",
            "rationale": "greedy",
            "scores": {"scenes/recall_at_1": 0.25, "scenes_x/spearman": 0.5},
        }
    ]
    assert score_table(rows).row_count == 2
    examples = {
        "cold_start": [{"text": "[bold]x", "rationale": "[/]"}],
        "grpo": [{"text": "[bold]x", "rationale": "y"}],
    }
    assert rationale_table(examples).row_count == 1


def test_task_names_are_what_scripts_rely_on() -> None:
    assert (task_name("test"), task_name("transfer")) == ("scenes", "scenes_transfer")
