"""Faithfulness: the bottleneck's vector is its rationale, and nothing else."""

from __future__ import annotations

import pytest

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.settings import EncoderSettings
from grace_rl.evaluate.faithfulness import faithfulness


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    settings = EncoderSettings(instruction=None, max_rationale_tokens=16)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    return faithfulness(encoder, [row["query"] for row in scenes.rows("test", "triplet", 32)])


def test_the_bottleneck_becomes_the_other_text(measured: dict[str, dict[str, float]]) -> None:
    assert measured["bottleneck"]["swap"] == pytest.approx(1.0, abs=0.1)
    assert measured["bottleneck"]["follows"] == 1.0


def test_with_the_text_in_view_the_vector_stays(measured: dict[str, dict[str, float]]) -> None:
    for edit in ("swap", "shuffle", "blank"):
        assert 0 < measured["context"][edit] < measured["bottleneck"][edit] / 2


def test_the_sum_moves_by_what_the_words_have_in_it(measured: dict[str, dict[str, float]]) -> None:
    """At weight 1 the words are half of it."""
    assert measured["context"]["swap"] < measured["joint"]["swap"] < measured["bottleneck"]["swap"]
    assert 0 < measured["joint"]["blank"] < 1


def test_two_texts_say_nothing() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        faithfulness(None, ["a", "b"])  # type: ignore[arg-type]
