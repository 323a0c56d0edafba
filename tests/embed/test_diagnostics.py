"""What encoders are like, in numbers that are known for simple ones."""

from __future__ import annotations

import math

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.embed.diagnostics import (
    alignment,
    describe_encoder,
    describe_rationales,
    prefix_scores,
    uniformity,
)
from grace_rl.embed.encoder_module import Encoded
from grace_rl.embed.loading import load_encoder
from grace_rl.embed.similarity import rank_correlation


def test_uniformity_and_alignment_of_known_vectors():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-8)  # exp(-2 * 2^2)
    assert alignment(opposite, opposite) == 0
    assert alignment(opposite, -opposite) == pytest.approx(4)


def test_rationales_that_copy_and_repeat_are_seen():
    found = describe_rationales(["a b", "c d", "e"], ["x y", "c c", ""], [3, 3, 1])
    assert found["copied"] == pytest.approx((0 + 1) / 2)
    assert found["repeated"] == pytest.approx((0 + 0.5) / 2)
    assert found["empty"] == pytest.approx(1 / 3)
    assert found["tokens"] == pytest.approx(7 / 3)


def test_a_collapsed_encoder_is_seen():
    class Collapsed:
        writes_rationales = False

        def encode(self, texts, rationale):
            return Encoded([], torch.ones(len(texts), 4) / 2)

    found = describe_encoder(Collapsed(), "none", ["a", "b", "c"], [("a", "b", 1.0)] * 3)
    assert found["anisotropy"] == pytest.approx(1)
    assert found["shared_vectors"] == 1
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert found["uniformity"] == pytest.approx(0, abs=1e-6)
    assert "prefix_scores" not in found


def test_prefixes_begin_with_nothing_and_end_with_the_whole_rationale():
    encoder = load_encoder(scenes.COLD_START)
    rows = scenes.rows("test", "pair", 40)
    pairs = [(row["sentence1"], row["sentence2"], row["score"]) for row in rows]
    scores = prefix_scores(encoder, "greedy", pairs, steps=3)
    assert scores is not None and len(scores) == 4
    assert scores[0] == 0  # the bottleneck has read nothing
    vectors = [encoder.encode([pair[i] for pair in pairs], "greedy").vectors for i in (0, 1)]
    whole = rank_correlation((vectors[0] * vectors[1]).sum(-1).tolist(), [p[2] for p in pairs])
    assert scores[3] == pytest.approx(whole, abs=1e-6)
    found = describe_encoder(encoder, "greedy", [pair[0] for pair in pairs], pairs, steps=3)
    assert found["prefix_scores"] == pytest.approx(scores)
    assert found["rationales"]["tokens"] > 2 and not math.isnan(found["alignment"])
