"""The encoder by soft tokens: steps of a call, stopping, words."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.data import scenes
from grace_rl.embed.soft_token_encoder import (
    SoftTokenEncoder,
    SoftTokenSettings,
    stopping_steps,
    tokenize_texts,
)
from grace_rl.errors import UserError

TEXTS = [row["text"] for row in scenes.rows(form="sft", count=12)] + ["A dog ran."]


@pytest.fixture(scope="module")
def encoder() -> SoftTokenEncoder:
    model = AutoModelForCausalLM.from_pretrained(scenes.COLD_START)
    tokenizer = AutoTokenizer.from_pretrained(scenes.COLD_START)
    return SoftTokenEncoder(model, tokenizer, SoftTokenSettings(gircse_steps=3), batch_size=5)


def test_steps_of_a_call_are_those_of_one_long_run(encoder):
    every = encoder.every_step(TEXTS, 6)
    for steps in (1, 3, 6):
        found = encoder.encode(TEXTS, gircse_steps=steps)
        assert torch.allclose(found.vectors, every[:, steps - 1], atol=1e-5)
        assert found.lengths == [steps] * len(TEXTS)
    assert torch.allclose(encoder.encode(TEXTS).vectors, every[:, 2], atol=1e-5)
    none = encoder.encode(TEXTS, gircse_steps=0)
    assert none.lengths == [0] * len(TEXTS)
    assert (none.vectors.norm(dim=1) - 1).abs().max() < 1e-5


def test_it_stops_where_the_vector_stays(encoder):
    every = encoder.every_step(TEXTS, 12)
    near = cosine_similarity(every[:, 1:], every[:, :-1], dim=-1)
    threshold = float(near.median())
    found = encoder.encode(TEXTS, gircse_steps=12, stop_above=threshold)
    assert len(set(found.lengths)) > 1  # not all texts alike
    for row, steps in enumerate(found.lengths):
        calm = near[row] > threshold
        expected = [k for k in range(3, 13) if calm[k - 2] and calm[k - 3]]
        assert steps == (expected[0] if expected else 12)
        assert torch.allclose(found.vectors[row], every[row, steps - 1], atol=1e-5)
    assert encoder.encode(TEXTS, gircse_steps=12, stop_above=2.0).lengths == [12] * len(TEXTS)
    assert encoder.encode(TEXTS, gircse_steps=12, stop_above=-2.0).lengths == [3] * len(TEXTS)


def test_a_calm_batch_is_not_run_to_its_end(encoder):
    forwards = 0

    def count(*_) -> None:
        nonlocal forwards
        forwards += 1

    hook = encoder.model.model.register_forward_hook(count)
    encoder.encode(TEXTS[:4], gircse_steps=30, stop_above=-2.0)
    hook.remove()
    assert forwards == 4  # the text and three steps


def test_words_are_the_likeliest_items_of_each_step(encoder):
    found = encoder.step_words(TEXTS[:3], steps=2, count=4)
    assert [item.text for item in found] == TEXTS[:3]
    ids = tokenize_texts(encoder.tokenizer, TEXTS[:1], 512)["input_ids"]
    with torch.no_grad():
        top = encoder.model(input_ids=ids).logits[0, -1].softmax(-1).topk(4)
    words = [encoder.tokenizer.decode([token]) for token in top.indices.tolist()]
    assert [word for word, _ in found[0].words[0]] == words
    assert [share for _, share in found[0].words[0]] == pytest.approx(top.values.tolist(), rel=1e-3)
    assert found[0].cosine[0] is None
    assert found[0].cosine[1] <= 1.0001
    assert len(found[0].entropy) == 2


def test_an_instruction_goes_before_the_text(encoder):
    told = encoder.encode(["a fox"], instruction="Say: ").vectors
    assert torch.allclose(told, encoder.encode(["Say: a fox"]).vectors, atol=1e-6)
    settings = SoftTokenSettings(gircse_steps=3, query_instruction="Say: ")
    asking = SoftTokenEncoder(encoder.model, encoder.tokenizer, settings)
    assert torch.allclose(asking.encode(["a fox"], role="query").vectors, told, atol=1e-6)
    assert torch.equal(asking.encode(["a fox"]).vectors, encoder.encode(["a fox"]).vectors)


def test_long_texts_are_cut_and_empty_ones_are_nothing(encoder):
    found = tokenize_texts(encoder.tokenizer, ["a fox " * 50, "a fox", ""], 4)
    assert found["input_ids"].shape == (3, 4)
    assert found["attention_mask"].sum(1).tolist()[0] == 4
    assert found["attention_mask"].sum(1).tolist()[2] == 1
    assert not encoder.encode(["a fox", "  "]).vectors[1].any()


def test_calm_texts_need_two_calm_steps():
    angles = torch.tensor([[0.0, 0.01, 1.0, 1.01, 1.02], [0.0, 1.0, 2.0, 3.0, 4.0]])
    vectors = torch.stack([angles.cos(), angles.sin()], -1)
    steps, stopped = stopping_steps(vectors, 0.99)
    assert steps.tolist() == [5, 5]
    assert stopped.tolist() == [True, False]
    assert stopping_steps(vectors[:, :2], 0.99)[1].tolist() == [False, False]


def test_a_folder_that_is_no_such_model_says_so(tmp_path):
    with pytest.raises(UserError, match=r"gircse\.json"):
        SoftTokenEncoder.from_pretrained(tmp_path)


def test_wrong_calls_are_named(encoder):
    with pytest.raises(UserError, match="gircse_steps: must be at least 0"):
        encoder.encode(TEXTS, gircse_steps=-1)
    for call in (encoder.encode, encoder.step_words):
        with pytest.raises(UserError, match="give a list of texts"):
            call("A dog ran.")
