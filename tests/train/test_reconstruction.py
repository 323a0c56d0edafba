"""The reconstruction stage: what padding, batches, processes and resuming may not change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader
from grace_rl.embed.reader_config import ReaderConfig
from grace_rl.embed.rebuild import rebuild_logps, right_padded
from grace_rl.errors import UserError
from grace_rl.rollout.policy import load_policy
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.train.reconstruction import ReconstructionTrainer, paired_with_writing
from grace_rl.train.reconstruction_config import ReconstructionConfig
from grace_rl.train.reconstruction_loss import (
    PairCollator,
    _writing_nll,
    read_vectors,
    reconstruct,
)
from grace_rl.train.run import save_policy

EOS = {"anchor": "eos", "reader": {"span": "context", "layers": [-1], "pool": "last"}}


def config(output: Path, **changes: Any) -> ReconstructionConfig:
    return ReconstructionConfig(
        **{
            "output_dir": str(output),
            "instruction": None,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "max_steps": 3,
            **changes,
        }
    )


def trainer_for(
    policy: str, output: Path, rows: int = 64, lora: Any = None, **changes: Any
) -> ReconstructionTrainer:
    args = config(output, **changes)
    model, tokenizer = load_policy(policy, dtype=torch.float32)
    examples = paired_with_writing(scenes.rows(form="triplet", count=rows), args)
    console = Console(file=StringIO(), width=200)
    return ReconstructionTrainer(
        model, args, examples, tokenizer, peft_config=lora, console=console
    )


def collator_for(policy: str, share: float = 0.0, **reader: Any) -> tuple[Any, PairCollator]:
    model, tokenizer = load_policy(policy, dtype=torch.float32)
    read = Reader(ReaderConfig(**reader), tokenizer, [tokenizer.eos_token_id], model)
    template = PromptTemplate(tokenizer, None)
    return model, PairCollator(template, read, share)


@pytest.mark.parametrize(
    "reader",
    [{}, {"span": "context"}, {"span": "context", "pool": "last"}, {"layers": [-1]}],
    ids=["bottleneck", "context", "last", "one layer"],
)
def test_vectors_in_training_are_those_of_the_reader(policy: str, reader: dict[str, Any]) -> None:
    model, collator = collator_for(policy, **reader)
    rows = scenes.rows(form="triplet", count=5)
    texts = [row["query"] for row in rows] + [row["positive"] for row in rows]
    batch = collator(rows)
    settings = collator.reader.config
    found = read_vectors(
        model.get_decoder(),
        batch["read_ids"],
        batch["read_attention"],
        batch["read_pooled"].bool(),
        settings.layers,
        settings.pool,
    )
    expected = collator.reader.read([collator.written(text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(policy: str, tmp_path: Path) -> None:
    """A row's losses beside a long row are those of the row alone."""
    model, collator = collator_for(policy, share=0.5)
    rows = [{**row, "writing": (None, row["query"])} for row in scenes.rows(count=2)]
    rows[1]["query"] = rows[1]["positive"] = " ".join([rows[1]["query"]] * 4)
    objective = config(tmp_path, writing_share=0.5)
    both = reconstruct(model, collator(rows), objective)
    alone = [reconstruct(model, collator([row]), objective) for row in rows]
    for name in ("loss_q2d", "loss_d2q"):
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(both["loss_writing"], alone[0]["loss_writing"], rtol=0, atol=1e-5)


def test_every_target_token_and_the_end_learn_from_the_vector(policy: str) -> None:
    model, collator = collator_for(policy)
    batch = collator(scenes.rows(form="triplet", count=3))
    ids, mask = batch["target_ids"], batch["target_mask"]
    assert (ids[torch.arange(6), mask.sum(1) - 1] == collator.end).all()
    vectors = torch.randn(6, 128).requires_grad_()
    logps = rebuild_logps(model, vectors, ids, mask)
    assert (logps[mask == 0] == 0).all()
    for row, column in mask.nonzero().tolist():
        (gradient,) = torch.autograd.grad(logps[row, column], vectors, retain_graph=True)
        assert gradient[row].abs().max() > 1e-7
        assert gradient.abs().sum() == gradient[row].abs().sum()  # and from its own row's alone


def test_the_likelihood_is_the_models_own(policy: str) -> None:
    """With a token's embedding for a vector, it is that of the sequence which begins with it."""
    model, _ = collator_for(policy)
    tokens = torch.randint(5, 100, (2, 7))
    ids, mask = right_padded([tokens[0, 1:].tolist(), tokens[1, 1:5].tolist()], 0)
    found = rebuild_logps(model, model.get_input_embeddings()(tokens[:, 0]), ids, mask)
    expected = model(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :4], expected[1, :4])


@pytest.mark.parametrize("changes", [{}, pytest.param(EOS, marks=pytest.mark.slow)])
def test_the_vector_comes_to_say_what_the_other_side_says(
    policy: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = {"max_steps": 40, "logging_steps": 10, "per_device_train_batch_size": 32}
    trainer = trainer_for(str(scenes.COLD_START), tmp_path, 512, **settings, **changes)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "information_gain" in log]
    assert logs[-1]["information_gain"] > 0.05
    assert logs[-1]["loss_d2q"] < logs[0]["loss_d2q"]
    assert logs[-1]["loss_writing"] < logs[0]["loss_writing"]
    assert {"loss_q2d", "gain_q2d", "gain_d2q"} <= set(logs[-1])
    assert trainer.reader.centre is not None
    scores = trainer.encoder().encode([row["query"] for row in scenes.rows(count=4)])
    assert scores.vectors.shape == (4, 128)


def test_a_vector_that_says_nothing_is_named(policy: str, tmp_path: Path) -> None:
    trainer = trainer_for(policy, tmp_path, max_steps=5, learning_rate=1e-30)
    with torch.no_grad():  # no text reaches the vector: every row has the same
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer.train()
    assert "The information gain is 0.0000" in trainer.console.file.getvalue()  # type: ignore[attr-defined]


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(
    policy: str, tmp_path: Path
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_for(policy, tmp_path / "whole", **saved)
    whole.train()
    first = trainer_for(policy, tmp_path / "parts", **saved)
    first.train()
    (last,) = (tmp_path / "parts").glob("checkpoint-4")
    for file in [*last.rglob("*")][::-1]:
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    second = trainer_for(policy, tmp_path / "parts", **saved)
    second.train(resume_from_checkpoint=True)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(second.reader.centre, whole.reader.centre)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])])
def test_the_head_is_saved(policy: str, tmp_path: Path, lora: Any) -> None:
    """Also one that is not tied to the input embeddings, and with an adapter."""
    untied = AutoModelForCausalLM.from_pretrained(policy)
    settings = untied.config
    settings.tie_word_embeddings = False
    model = type(untied)(settings)
    model.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(policy).save_pretrained(tmp_path / "start")
    trainer = trainer_for(str(tmp_path / "start"), tmp_path / "run", lora=lora, max_steps=2)
    trainer.train()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
    (tmp_path / "model").mkdir()
    save_policy(trainer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert (tmp_path / "model" / "grace.json").exists()


def test_settings_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    bad = {
        "alpha": 1.5,
        "writing_share": 1.0,
        "per_device_train_batch_size": 1,
        "writing_dataset_name": "nowhere.jsonl",
        "anchor": "eos",
    }
    with pytest.raises(UserError) as error:
        config(tmp_path, **bad)
    assert {problem.partition(":")[0] for problem in error.value.problems} == set(bad)
    with pytest.raises(UserError, match="^anchor: "):
        config(tmp_path, anchor="eos", reader={"pool": "last"})


def test_rows_must_be_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs pairs"):
        paired_with_writing([{"text": "a"}] * 4, config(tmp_path))


def test_what_is_written_beside_the_pairs(tmp_path: Path) -> None:
    pair = {"query": "q", "positive": "p"}
    plain = paired_with_writing([pair] * 2, config(tmp_path))
    assert [row["writing"] for row in plain] == [(None, "q"), (None, "p")]
    explained = paired_with_writing([pair, pair | {"rationale": "r"}], config(tmp_path))
    assert [row["writing"] for row in explained] == [("q", "r")] * 2
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(3)))
    own = config(tmp_path, writing_dataset_name=str(file), writing_dataset_rows=2)
    found = paired_with_writing([pair] * 3, own)
    assert [row["writing"][1] for row in found] == ["t0", "t1", "t0"]


@pytest.mark.slow
def test_a_share_of_writing_keeps_the_model_able_to_write(tmp_path: Path) -> None:
    """Held-out rationales stay about as likely as before, and what is written still ends and reads
    as facts; without the share both are lost."""
    file = tmp_path / "rationales.jsonl"
    rows = scenes.rows(form="sft", count=800)
    file.write_text(
        "".join(json.dumps({k: r[k] for k in ("text", "rationale")}) + "\n" for r in rows)
    )
    held_out = scenes.rows("test", form="sft", count=64, seed=1)
    start = str(scenes.COLD_START)
    found = {}
    for name, steps, share in (("before", 0, 0.5), ("share", 40, 0.5), ("none", 40, 0.0)):
        trainer = trainer_for(
            start, tmp_path / name, 400, max_steps=max(steps, 1), logging_steps=10,
            learning_rate=2e-3 if steps else 1e-30, writing_share=share,
            writing_dataset_name=str(file),
        )  # fmt: skip
        trainer.train()
        collator = PairCollator(trainer.template, trainer.reader, 1.0)
        examples = [{"query": "a", "positive": "b", "writing": (r["text"], r["rationale"])}
                    for r in held_out]  # fmt: skip
        with torch.no_grad():
            nll = _writing_nll(trainer.model.eval(), collator(examples)).mean()
        encoder = RationaleEncoder(
            trainer.model, trainer.processing_class, trainer.template, trainer.reader,
            [collator.end], 48,
        )  # fmt: skip
        written = encoder.write([r["text"] for r in held_out], "greedy")
        ended = sum(item.token_ids[-1] == collator.end for item in written) / 64
        facts = sum(len(scenes.read_facts(item.rationale).facts) for item in written) / 64
        found[name] = (float(nll), ended, facts)
    assert found["share"][0] < found["before"][0] + 0.3
    assert found["none"][0] > found["share"][0] + 0.3
    assert found["share"][1] > 0.95
    assert found["share"][2] > 0.7 * found["before"][2]


@pytest.mark.slow
def test_two_processes_end_where_one_does(policy: str, tmp_path: Path, root: Path) -> None:
    program = [str(Path(__file__).with_name("reconstruction_steps.py")), policy]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_port", "29871"]
    for command in (
        [sys.executable, *program, str(one), "8"],
        [*launch, *program, str(two), "4"],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / "end.pt", weights_only=True) for folder in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)
