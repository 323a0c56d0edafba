"""The scenes world: what its rows promise."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter

import pytest

from grace_rl.data import scenes
from grace_rl.data.scenes.texts import NEAR, TEMPLATES, paraphrase, render, with_facts
from grace_rl.data.scenes.world import FACT_OF_WORD, change_facts, random_scene
from grace_rl.errors import UserError

SPLITS = ("train", "validation", "test", "transfer")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def texts(row: dict) -> list[str]:
    return [row["query"], row["positive"], *row["negative"], row["negative_positive"]]


def facts(scene: dict) -> tuple[str, ...]:
    return tuple(scene[attribute] for attribute in scenes.VALUES)


def test_every_word_states_one_fact_and_the_sentences_around_state_none():
    all_words = [
        word for values in scenes.VALUES.values() for names in values.values() for word in names
    ]
    assert len(all_words) == len(set(all_words)) == len(FACT_OF_WORD)
    assert len(scenes.VALUES) == 8 and 200 <= len(all_words) <= 260
    around = " ".join(re.sub(r"\{\w+\}", " ", template) for template in (*TEMPLATES, *NEAR))
    assert scenes.read_facts(around).facts == ()


def test_every_reserved_word_leaves_its_value_another_word():
    assert len(scenes.TRANSFER_WORDS) == 29
    for values in scenes.VALUES.values():
        for canonical, names in values.items():
            assert canonical not in scenes.TRANSFER_WORDS
            assert len(set(names) - scenes.TRANSFER_WORDS) >= 2


@pytest.mark.parametrize("form", ["triplet", "quad", "pair", "unsupervised", "sft"])
@pytest.mark.parametrize("split", SPLITS)
def test_rows_depend_on_their_arguments_alone(split, form):
    random.seed(1)
    first = scenes.rows(split, form, count=20, seed=3)
    state = random.getstate()
    assert scenes.rows(split, form, count=50, seed=3)[:20] == first
    assert random.getstate() == state
    assert scenes.rows(split, form, count=20, seed=4) != first


def test_rows_are_the_same_on_every_machine():
    listing = json.dumps([scenes.rows(split, "quad", count=50) for split in SPLITS])
    assert hashlib.sha256(listing.encode()).hexdigest() == (
        "c16de5546c582d1763a4804bbdbe431d85c21d04652c491f08cf3c4386c21cd6"
    )


def test_quads_are_triplets_with_one_text_more():
    for triplet, quad in zip(
        scenes.rows("test", "triplet", 50), scenes.rows("test", "quad", 50), strict=True
    ):
        assert quad.pop("negative_positive")
        assert quad == triplet


def test_splits_share_no_scene():
    seen = {}
    for split in SPLITS:
        rows = scenes.rows(split, "triplet", count=400)
        seen[split] = {facts(row[key]) for row in rows for key in ("scene", "negative_scene")}
        assert {
            scenes.split_of(row[key]) for row in rows for key in ("scene", "negative_scene")
        } == {split}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


@pytest.mark.parametrize("split", SPLITS)
def test_reserved_words_are_on_one_side_of_transfer_rows_and_nowhere_else(split):
    sides = Counter()
    for row in scenes.rows(split, "quad", count=300):
        marked = [bool(scenes.TRANSFER_WORDS & set(words(text))) for text in texts(row)]
        sides[tuple(marked[:2])] += 1
        assert not marked[3]
    if split == "transfer":
        assert set(sides) == {(True, False), (False, True)} and min(sides.values()) > 100
    else:
        assert set(sides) == {(False, False)}
        singles = scenes.rows(split, "unsupervised", count=300)
        assert not any(scenes.TRANSFER_WORDS & set(words(row["text"])) for row in singles)


def test_the_cold_start_learns_from_every_word():
    seen = {word for row in scenes.rows(form="sft", count=3000) for word in words(row["text"])}
    assert set(FACT_OF_WORD) <= seen


@pytest.mark.parametrize("split", SPLITS)
def test_texts_state_exactly_their_scene(split):
    for row in scenes.rows(split, "quad", count=200):
        truths = [row["scene"], row["scene"], row["negative_scene"], row["negative_scene"]]
        for text, truth in zip(texts(row), truths, strict=True):
            assert 15 <= len(words(text)) <= 30
            reading = scenes.read_facts(text)
            assert dict(reading.facts) == truth and len(reading.facts) == 8


@pytest.mark.parametrize("split", SPLITS)
def test_hard_negatives_share_nearly_all_words_and_paraphrases_do_not(split):
    def shared(a: str, b: str) -> float:
        return sum((Counter(words(a)) & Counter(words(b))).values()) / len(words(b))

    rows = scenes.rows(split, "quad", count=300)
    near = [
        max(shared(row[side], row["negative"][0]) for side in ("query", "positive")) for row in rows
    ]
    far = [shared(row["query"], row["positive"]) for row in rows]
    assert min(near) >= 0.8
    assert sum(far) / len(far) < 0.6
    for row in rows:
        assert scenes.gold_similarity(row["scene"], row["negative_scene"]) in (0.75, 0.875)


def test_changing_facts_keeps_the_sentence():
    rng = random.Random(5)
    scene = random_scene("train", rng)
    rendering = render(scene, rng)
    changed = change_facts(scene, 1, rng)
    other = with_facts(rendering, changed, rng)
    assert (other.template, other.near) == (rendering.template, rendering.near)
    assert sum(other.words[name] != rendering.words[name] for name in scene) == 1
    again = paraphrase(rendering, rng)
    assert again.template != rendering.template
    assert all(again.words[name] != rendering.words[name] for name in scene)


def test_gold_similarity_is_a_similarity():
    rows = scenes.rows("test", count=60)
    for row, other in zip(rows, rows[1:], strict=False):
        a, b = row["scene"], other["scene"]
        assert scenes.gold_similarity(a, a) == 1.0
        assert scenes.gold_similarity(a, b) == scenes.gold_similarity(b, a)
        assert 0.0 <= scenes.gold_similarity(a, b) < 1.0
        # One minus it is a distance.
        c = row["negative_scene"]
        there, on = scenes.gold_similarity(a, b), scenes.gold_similarity(b, c)
        assert scenes.gold_similarity(a, c) >= there + on - 1


@pytest.mark.parametrize("split", SPLITS)
def test_graded_pairs_range_from_the_same_to_nothing_in_common(split):
    rows = scenes.rows(split, "pair", count=300)
    scores = Counter(row["score"] for row in rows)
    assert set(scores) == {shared / 8 for shared in range(9)} and min(scores.values()) > 10
    for row in rows:
        first, second = (
            dict(scenes.read_facts(row[key]).facts) for key in ("sentence1", "sentence2")
        )
        assert row["scene"] == first and row["score"] == scenes.gold_similarity(first, second)
        assert scenes.split_of(first) == scenes.split_of(second) == split
        marked = [scenes.TRANSFER_WORDS & set(words(row[k])) for k in ("sentence1", "sentence2")]
        assert not all(marked) and (split == "transfer" or not any(marked))


@pytest.mark.parametrize("form", ["canonical", "random_order", "half", "filler", "noisy"])
def test_references_read_back_as_true_facts(form):
    rng = random.Random(0)
    counts = Counter()
    for row in scenes.rows("transfer", count=100):
        text = row["query"]
        reading = scenes.read_facts(
            scenes.reference_rationale(row["scene"], form=form, rng=rng, text=text)
        )
        counts[len(reading.facts)] += 1
        assert reading.precision(row["scene"]) == (0.0 if form == "filler" else 1.0)
        assert reading.coverage(row["scene"]) == len(reading.facts) / 8
    expected = {
        "canonical": {8},
        "random_order": {8},
        "half": {4},
        "filler": {0},
        "noisy": {3, 4, 5, 6},
    }
    assert set(counts) == expected[form]


def test_the_checker_reads_any_word_order_and_case_and_counts_what_is_false():
    scene = scenes.rows("test", count=1)[0]["scene"]
    for attribute, values in scenes.VALUES.items():
        for value, names in values.items():
            for name in names:
                assert scenes.read_facts(f"It is {name.upper()}!").facts == ((attribute, value),)
    place = scene["place"]
    wrong = next(value for value in scenes.VALUES["place"] if value != place)
    reading = scenes.read_facts(f"{wrong}; {place}, {place}. Someone somewhere, forestry")
    assert reading.coverage(scene) == 1 / 8
    assert reading.precision(scene) == pytest.approx(2 / 3)


def test_a_reference_that_needs_chance_asks_for_it():
    scene = scenes.rows("test", count=1)[0]["scene"]
    with pytest.raises(ValueError, match="needs an rng"):
        scenes.reference_rationale(scene, form="noisy")
    with pytest.raises(ValueError, match="needs the text"):
        scenes.reference_rationale(scene, form="noisy", rng=random.Random(0))
    with pytest.raises(ValueError, match="unknown rationale form"):
        scenes.reference_rationale(scene, form="nosy", rng=random.Random(0))


def test_sft_rows_begin_clean_and_go_on_noisy():
    rows = scenes.rows(form="sft", count=60, clean_rows=30)
    readings = [
        (scenes.read_facts(row["text"]).facts, scenes.read_facts(row["rationale"]).facts)
        for row in rows
    ]
    assert all(dict(said) == dict(truth) for truth, said in readings[:30])
    assert all(3 <= len(said) <= 6 for _, said in readings[30:])
    assert all(set(said) <= set(truth) for truth, said in readings)


def test_mistakes_in_the_options_come_together():
    with pytest.raises(UserError) as caught:
        scenes.rows("tset", form="couple", count=0, filler=2.0, facts=(0, 9))
    problems = caught.value.problems
    assert len(problems) == 5
    assert "tset" in problems[0] and "transfer" in problems[0]
