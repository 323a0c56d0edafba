"""The tiny policy of the scenes world, and the cold start that ships."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.data import scenes
from grace_rl.data.scenes.policy import build_tokenizer
from grace_rl.data.scenes.rationales import FILLER, OPENER
from grace_rl.data.scenes.world import FACT_OF_WORD

FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.save_untrained(tmp_path_factory.mktemp("untrained"))


def test_the_same_seed_gives_the_same_files(untrained: Path, tmp_path: Path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = scenes.save_untrained(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert {file.name for file in again.iterdir()} == FILES
    for file in FILES:
        assert (again / file).read_bytes() == (untrained / file).read_bytes()
    other = scenes.save_untrained(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert (other / weights).read_bytes() != (untrained / weights).read_bytes()


def test_the_policy_is_tiny(untrained: Path):
    model = AutoModelForCausalLM.from_pretrained(untrained)
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert len(tokenizer) == model.config.vocab_size <= 800
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_every_word_is_one_token_after_a_space(untrained: Path):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    for word in (*FACT_OF_WORD, *FILLER):
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
        for around in (f"{OPENER} {word}", f"the {word}, {word}. {word}; {word}?"):
            tokens = tokenizer(around)["input_ids"]
            assert tokens.count(tokenizer(f" {word}")["input_ids"][0]) == around.count(f" {word}")


def test_a_rationale_has_one_token_for_each_fact(untrained: Path):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    rng = random.Random(0)
    for row in scenes.rows("train", count=50):
        for form in ("canonical", "random_order", "half", "noisy"):
            rationale = scenes.reference_rationale(
                row["scene"], form=form, rng=rng, text=row["query"], filler=0.0
            )
            stated = len(scenes.read_facts(rationale).facts)
            # The opener, then the facts.
            assert len(tokenizer(rationale)["input_ids"]) == 1 + stated


@pytest.mark.parametrize("split", ["train", "test", "transfer"])
def test_texts_have_few_tokens(untrained: Path, split: str):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    for row in scenes.rows(split, count=200):
        for text in (row["query"], row["positive"], row["negative"][0]):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) <= 40
            assert tokenizer.decode(ids) == text


def test_any_text_can_be_encoded_and_comes_back():
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    samples = [
        "",
        " ",
        "  two  spaces ",
        "tab\t\r\nline",
        "Żółw 你好 👩‍👩‍👧 é",
        "womanhood's 12.5%",
        "\u0000\u200b",
        "FACTS: Facts:x",
    ]
    for _ in range(300):
        points = [
            rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)])
            for _ in range(20)
        ]
        samples.append("".join(map(chr, points)))
    for text in samples:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_marks_turns_with_single_tokens(untrained: Path):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    turn = [{"role": "user", "content": "A man walks."}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>A man walks.<|end|><|assistant|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])
    assert [tokens[0], *tokens[-2:]] == ["<|user|>", "<|end|>", "<|assistant|>"]
    whole = tokenizer.apply_chat_template(
        [*turn, {"role": "assistant", "content": "Facts: man"}], tokenize=False
    )
    assert whole == f"{prompt}Facts: man{tokenizer.eos_token}"
