"""The InfoNCE baseline trains sentence encoders that are still language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from grace_rl.data import scenes
from grace_rl.data.scenes.policy import build_tokenizer
from grace_rl.errors import UserError
from grace_rl.evaluate.scenes import score_policy
from grace_rl.rollout.policy import load_policy
from grace_rl.train.infonce import (
    InfoNCETrainer,
    RowScores,
    contrastive_examples,
    plan,
    reader_loss,
)
from grace_rl.train.infonce_config import InfoNCEConfig
from grace_rl.train.run import save_policy

ROWS = scenes.rows(form="quad", count=48)
TEXTS = [row["query"] for row in ROWS[:5]]


def config(output: Path, **arguments) -> InfoNCEConfig:
    return InfoNCEConfig(
        **{
            "output_dir": str(output),
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "max_steps": 3,
            "logging_steps": 1,
            "max_text_tokens": 64,
            **arguments,
        }
    )


def trainer_of(policy: str, output: Path, peft_config=None, **arguments):
    args = config(output, **arguments)
    return InfoNCETrainer(load_policy(policy), args, ROWS, peft_config=peft_config)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random encoder model, with the tokenizer of scenes."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_quads_give_both_pairs_and_uneven_negatives_are_cut():
    row = {"query": "q", "positive": "p", "negative": ["n", "m"], "negative_positive": "o"}
    assert contrastive_examples([row]) == [("q", "p", "n"), ("n", "o", "q")]
    pair = {"query": "q", "positive": "p", "negative": []}
    assert contrastive_examples([row, pair])[0] == ("q", "p")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_model_is_a_sentence_encoder_and_a_language_model(policy, tmp_path, lora, pooling):
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    trainer = trainer_of(policy, tmp_path / "run", peft_config, pooling=pooling)
    before = trainer.encoder().encode(TEXTS).vectors
    trainer.train()
    vectors = trainer.encoder().encode(TEXTS).vectors
    assert not torch.allclose(vectors, before, atol=1e-3)

    save_policy(trainer, tmp_path / "model")
    assert not list((tmp_path / "model").glob("adapter*"))
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    again = torch.tensor(loaded.encode(TEXTS, normalize_embeddings=True))
    torch.testing.assert_close(again, vectors, atol=1e-5, rtol=0)

    # The language model is the very same stack: pooled by hand, it gives the same vectors.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.model(ids).last_hidden_state[0]
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    torch.testing.assert_close(
        torch.nn.functional.normalize(pooled, dim=0), vectors[0], atol=1e-5, rtol=0
    )
    assert model(ids).logits.shape[-1] == len(tokenizer)
    assert tokenizer.chat_template


def test_an_untied_head_is_kept(policy, tmp_path):
    from transformers import AutoConfig

    untied = AutoConfig.from_pretrained(policy)
    untied.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(untied)
    model.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "start")
    trainer = trainer_of(str(tmp_path / "start"), tmp_path / "run")
    trainer.train()
    save_policy(trainer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight)
    SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(TEXTS)


def test_it_trains_an_encoder_model(bert, tmp_path):
    args = config(tmp_path / "run", pooling="cls", dropout=0.1)
    trainer = InfoNCETrainer(bert, args, ROWS)
    trainer.train()
    save_policy(trainer, tmp_path / "model")
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert again[1].pooling_mode == "cls"
    vectors = torch.tensor(again.encode(TEXTS, normalize_embeddings=True))
    expected = trainer.encoder().encode(TEXTS).vectors
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_it_learns_and_stops_early_with_the_best_model(policy, tmp_path):
    args = config(
        tmp_path / "run",
        max_steps=40,
        learning_rate=3e-3,
        validation={"rows": 16},
        eval_steps=4,
        early_stopping_patience=1,
    )
    validation = scenes.rows(split="validation", form="triplet", count=16)
    trainer = InfoNCETrainer(load_policy(policy), args, ROWS, validation)
    trainer.train()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    recalls = [entry["eval_recall_at_1"] for entry in history if "eval_recall_at_1" in entry]
    assert trainer.state.global_step == 4 * len(recalls)
    if trainer.state.global_step < 40:  # it stopped where the last scoring was no better
        assert recalls[-1] <= max(recalls[:-1])
    found = RowScores(validation)(trainer.accelerator.unwrap_model(trainer.model))
    assert found["recall_at_1"] == pytest.approx(max(recalls))


def test_small_forwards_give_the_same_loss(policy, tmp_path):
    trainer = trainer_of(policy, tmp_path / "run")
    model = trainer.accelerator.unwrap_model(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    features, labels = trainer.collect_features(batch)
    model.eval()
    losses = []
    for size in (None, 4):
        loss = reader_loss(model, config(tmp_path, mini_batch_size=size))
        model.zero_grad()
        value = loss(features, labels)
        value.backward()
        grads = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
        losses.append((value.item(), torch.cat([g.flatten() for g in grads])))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], atol=1e-5, rtol=1e-3)


def test_it_goes_on_from_a_checkpoint_where_it_was(policy, tmp_path):
    from peft import LoraConfig

    for adapter in (None, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])):
        name = "lora" if adapter else "full"
        arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "dropout": 0.1}
        whole = trainer_of(policy, tmp_path / name, adapter, **arguments)
        whole.train()
        again = trainer_of(policy, tmp_path / name, adapter, **arguments)
        again.train(resume_from_checkpoint=tmp_path / name / "checkpoint-2")
        torch.testing.assert_close(
            again.encoder().encode(TEXTS).vectors,
            whole.encoder().encode(TEXTS).vectors,
            atol=1e-5,
            rtol=0,
        )


def test_it_is_scored_like_a_policy(policy, tmp_path):
    encoder = trainer_of(policy, tmp_path / "run").encoder()
    assert not encoder.writes_rationales
    scores = score_policy(encoder, ["test"], 8)
    assert set(scores) == {
        f"scenes/{name}" for name in ("recall_at_1", "triplet_accuracy", "spearman")
    }


def test_rows_without_pairs_are_a_mistake(tmp_path):
    from grace_rl.recipe.rows import DataConfig

    class OnlyData:
        data = DataConfig(dataset_name="scenes", options={"form": "unsupervised"})

    args = config(tmp_path, validation={"split": "validation", "rows": 2})
    with pytest.raises(UserError) as caught:
        plan(OnlyData(), args, [{"text": "a"}])  # type: ignore[arg-type]
    assert len(caught.value.problems) == 2
