"""Segments are near-equal, and what comes later has no say in where they end."""

from __future__ import annotations

import random

import pytest

from grace_rl.data import scenes
from grace_rl.rollout.policy import load_policy
from grace_rl.rollout.segments import Segmenter, sentence_end_test

STOP = 9


def segmenter(segments=4, min_tokens=2, typical=40):
    made = Segmenter(segments, min_tokens, lambda token: token == STOP)
    made.follow(typical)
    return made


def random_tokens(length, seed):
    rng = random.Random(seed)
    return [rng.choice([1, 2, 3, 4, STOP]) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 5, 17, 39, 40, 100])
@pytest.mark.parametrize("segments", [1, 3, 4])
def test_cuts_rise_and_the_last_is_the_whole(length, segments):
    for seed in range(20):
        ends = segmenter(segments).ends(random_tokens(length, seed))
        assert len(ends) == segments + 1 and ends == sorted(ends)
        assert ends[0] == 0 and ends[-1] == length


def test_segments_of_a_typical_text_are_near_equal():
    for seed in range(50):
        ends = segmenter().ends(random_tokens(40, seed))
        assert all(6 <= b - a <= 14 for a, b in zip(ends, ends[1:], strict=False)), ends
    assert segmenter().ends([1] * 40) == [0, 10, 20, 30, 40]


def test_a_cut_moves_to_a_sentence_end_within_a_tenth():
    tokens = [1] * 40
    tokens[6] = STOP  # 7 tokens: within 4 before the cut at 10
    assert segmenter().ends(tokens)[1] == 7
    tokens[6], tokens[4] = 1, STOP  # 5 tokens: too far
    assert segmenter().ends(tokens)[1] == 10


def test_what_comes_later_does_not_move_a_cut():
    for seed in range(30):
        tokens = random_tokens(60, seed)
        whole = segmenter().ends(tokens)
        for length in range(1, 60):
            cut = segmenter().ends(tokens[:length])
            assert [e for e in cut if e < length] == [e for e in whole if e < length]


def test_no_segment_but_the_last_is_shorter_than_the_minimum():
    for seed in range(50):
        ends = segmenter(min_tokens=8, typical=20).ends(random_tokens(45, seed))
        assert all(b - a >= 8 for a, b in zip(ends, ends[1:-1], strict=False))
    assert segmenter(min_tokens=8, typical=20).ends([1] * 7) == [0, 7, 7, 7, 7]


def test_typical_length_follows_and_is_kept():
    made = segmenter(typical=40)
    made.follow(50)
    assert made.typical_length == pytest.approx(41)
    again = Segmenter(4, 2)
    again.load_state_dict(made.state_dict())
    assert again.typical_length == made.typical_length


def test_sentence_ends_of_a_tokenizer():
    _, tokenizer = load_policy(str(scenes.COLD_START))
    ends_sentence = sentence_end_test(tokenizer)
    ids = tokenizer("A bold cook. At dawn")["input_ids"]
    ended = [tokenizer.decode([i]) for i in ids if ends_sentence(i)]
    assert [text.strip() for text in ended] == ["."]
