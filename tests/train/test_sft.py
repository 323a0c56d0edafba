"""The cold start's trainer: rows to examples, tokens, and a few real steps of TRL's trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train.sft import GraceSFTTrainer, sft_examples, tokenize_examples
from grace_rl.train.sft_config import GraceSFTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.save_untrained(tmp_path_factory.mktemp("untrained"))


def trainer_for(folder: Path, output: Path, rows: list[dict], **arguments) -> GraceSFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = GraceSFTConfig(
        **{
            "instruction": None,
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
            **arguments,
        }
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    return GraceSFTTrainer(model, args, rows, tokenizer)


def test_pairs_with_explanations_become_examples_and_rows_without_are_counted():
    rows = [
        {
            "query": "q1",
            "positive": "p1",
            "negative": ["n1"],
            "rationale_positive": ["one", " two "],
        },
        {"query": "q2", "positive": "p2", "rationale_positive": []},
        {"query": "q3", "positive": "p3", "rationale": "mine", "rationale_positive": ["", "why"]},
        {"text": "t", "rationale": "said"},
        {"text": "t", "rationale": "  "},
        {"text": "t"},
    ]
    examples, skipped = sft_examples(rows)
    assert examples == [
        ("q1", "one"),
        ("p1", "one"),
        ("q1", "two"),
        ("p1", "two"),
        ("q3", "mine"),
        ("q3", "why"),
        ("p3", "why"),
        ("t", "said"),
    ]
    assert skipped == 3


def test_the_prompt_is_the_rollouts_and_the_loss_covers_the_rationale_and_its_end(
    folder: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = PromptTemplate(tokenizer, "Be short.")
    rows = scenes.rows(form="sft", count=8)
    examples, _ = sft_examples(rows)
    for row, example in zip(rows, tokenize_examples(examples, template), strict=True):
        prompt = template.render(row["text"]).token_ids
        assert example["input_ids"][: len(prompt)] == prompt
        assert example["completion_mask"] == [0] * len(prompt) + [1] * (
            len(example["input_ids"]) - len(prompt)
        )
        written = example["input_ids"][len(prompt) :]
        assert tokenizer.decode(written) == row["rationale"] + tokenizer.eos_token

    trainer = trainer_for(folder, tmp_path, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels, attention, row in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], rows, strict=True
    ):
        assert tokenizer.decode(labels[labels != -100]) == row["rationale"] + tokenizer.eos_token
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        assert not (attention.bool() ^ (ids != tokenizer.pad_token_id)).any()


def test_the_trainer_learns(folder: Path, tmp_path: Path):
    rows = scenes.rows(form="sft", count=320, clean_rows=320)
    trainer = trainer_for(folder, tmp_path, rows, warmup_steps=5, num_train_epochs=1)
    assert (trainer.examples, trainer.skipped_rows) == (320, 0)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("rationale", [5, ["fine", 3], {"a": "b"}])
def test_a_rationale_that_is_no_text_is_a_mistake(rationale):
    with pytest.raises(UserError, match="rationale: must be a text or a list of texts, not"):
        sft_examples([{"text": "A cat.", "rationale": rationale}])


def test_rows_without_any_rationale_are_a_mistake(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="none of the 3 rows has a rationale"):
        trainer_for(folder, tmp_path, [{"text": "a"}] * 3)
