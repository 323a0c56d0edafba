"""The reconstruction reward: what it pays for, and that its decoder stays as it is."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_rl_rewards.reconstruction import Reconstruction
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from grace_rl.data import scenes
from grace_rl.embed.reader import CENTRE_FILE
from grace_rl.embed.rebuild import rebuild_logps
from grace_rl.embed.settings import EncoderSettings
from grace_rl.errors import UserError
from grace_rl.reward import RewardRuntime, RewardSpec, load_rewards
from grace_rl.reward.example import batch_of_pool, example_batch
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

WORDS = ["the cook walks a dog", "an old ship", "the nurse sings at dawn", "a red car near the sea"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy of scenes with a reader's settings and a centre, as a stage would leave it."""
    folder = tmp_path_factory.mktemp("decoder") / "model"
    shutil.copytree(scenes.COLD_START, folder)
    EncoderSettings(instruction=None).save(folder)
    (folder / "reader").mkdir()
    centre = torch.randn(128, generator=torch.Generator().manual_seed(0))
    save_file({"centre": centre}, folder / CENTRE_FILE)
    return str(folder)


def batch_of(rows: int = 2, trained: tuple[str, ...] = ("query", "positive")) -> Any:
    """Real texts of scenes, two different rationales for each."""
    found = scenes.rows(form="triplet", count=rows)
    texts = {(i, role): row[role] for i, row in enumerate(found) for role in ("query", "positive")}
    texts |= {(i, "negative"): row["negative"][0] for i, row in enumerate(found)}
    shape: Any = [{role: [[1, 0], [0, 1]] for role in ("query", "positive")} for _ in found]
    for row in shape:
        row["negative"] = [[1, 1]]
    written = [WORDS[i % 4] for i in range(2 * len(trained) * rows)]
    return example_batch(shape, trained, rationales=written, texts=texts)


def test_it_is_the_clipped_mean_gain_of_the_other_sides_tokens(decoder: str) -> None:
    batch = batch_of()
    reward = Reconstruction(decoder, clip=0.5)
    values = reward(batch).values
    encoder = reward.decoder
    assert encoder is not None
    model: Any = encoder.model
    for i in (0, 3):
        other = {"query": "positive", "positive": "query"}[batch.roles[i]]
        (target,) = {
            text
            for text, role, row in zip(
                batch.pool.texts, batch.pool.roles, batch.pool.example.tolist(), strict=True
            )
            if role == other and row == batch.example[i]
        }
        ids = encoder.tokenizer(target)["input_ids"] + [encoder.tokenizer.eos_token_id]
        (words,) = encoder.tokenizer([batch.rationales[i]])["input_ids"]
        vector = read_alone(model, words, encoder.reader.config.layers)
        null = encoder.reader.centre if encoder.reader.centre is not None else vector * 0
        block = torch.tensor([ids])
        with torch.no_grad():
            given = rebuild_logps(model, vector[None], block, torch.ones_like(block))
            without = rebuild_logps(model, null[None], block, torch.ones_like(block))
        expected = (given - without).clamp(-0.5, 0.5).mean()
        torch.testing.assert_close(values[i], expected, rtol=1e-4, atol=1e-5)


def read_alone(model: Any, ids: list[int], layers: Any) -> torch.Tensor:
    with torch.no_grad():
        states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    mixed = sum(torch.nn.functional.layer_norm(states[i], states[i].shape[-1:]) for i in layers)
    return mixed[0].mean(0)


@pytest.mark.parametrize("score", ["gain", "contrastive"])
def test_what_stands_beside_a_rollout_changes_nothing(decoder: str, score: Any) -> None:
    batch = batch_of(4)
    together = Reconstruction(decoder, score)(batch).values
    one_by_one = Reconstruction(decoder, score, batch_size=1)(batch).values
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-5)
    again = batch_of_pool(batch.pool, torch.arange(3))
    torch.testing.assert_close(
        Reconstruction(decoder, score)(again).values, together[:3], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("score", ["gain", "contrastive"])
def test_it_varies_within_groups(decoder: str, score: Any) -> None:
    runtime = RewardRuntime(load_rewards([Reconstruction(decoder, score)], "."))
    metrics = runtime.score(batch_of(3)).metrics
    assert metrics["rewards/Reconstruction/within_group_std"] > 1e-3
    assert metrics["rewards/Reconstruction/unscored"] == 0


def test_a_hard_negative_that_is_as_likely_costs_the_contrastive_form(decoder: str) -> None:
    batch = batch_of()
    near = Reconstruction(decoder, "contrastive")(batch).values
    gain = Reconstruction(decoder)(batch).values
    assert (near < 0).all() and (near > -10).all()
    colder = Reconstruction(decoder, "contrastive", temperature=0.1)(batch).values
    assert not torch.allclose(near, colder)
    alone = dataclasses.replace(
        batch.pool,
        example=torch.where(
            torch.tensor([role == "negative" for role in batch.pool.roles]),
            batch.pool.example + 100,
            batch.pool.example,
        ),
    )
    without = batch_of_pool(alone, torch.arange(len(batch)))
    assert Reconstruction(decoder, "contrastive")(without).values.isnan().all()
    torch.testing.assert_close(Reconstruction(decoder)(without).values, gain, rtol=0, atol=1e-5)


def test_arguments_are_checked_before_anything_loads(tmp_path: Path) -> None:
    specs = [
        RewardSpec(
            "grace_rl_rewards.reconstruction:Reconstruction", keywords=keywords, label=f"r{i}"
        )
        for i, keywords in enumerate(
            [{"clip": 0}, {"model": str(tmp_path)}, {"max_target_tokens": 0}]
        )
    ]
    with pytest.raises(UserError) as error:
        load_rewards(specs, ".")
    said = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3
    assert "rewards[0].clip: must be above 0" in said and "no grace.json" in said


def test_training_leaves_the_decoder_alone(decoder: str, tmp_path: Path) -> None:
    """GRPO with normalize_then_sum: the policy moves, the decoder gets no gradient."""
    reward = Reconstruction()
    trainer = GraceGRPOTrainer(
        model=decoder,
        args=GraceGRPOConfig(
            output_dir=str(tmp_path),
            instruction=None,
            num_generations=4,
            per_device_train_batch_size=16,
            max_completion_length=12,
            max_steps=2,
            learning_rate=1e-2,
            multi_objective_aggregation="normalize_then_sum",
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=scenes.rows("train", "triplet", 16),
        rewards=["contrastive", reward],
    )
    trainer.train()
    assert reward.decoder is not None
    model: Any = reward.decoder.model
    start = AutoModelForCausalLM.from_pretrained(decoder).state_dict()
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, start[name])
        assert id(parameter) not in optimised
    policy = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    assert not all(torch.equal(policy[name], start[name]) for name in start)
    logs = [log for log in trainer.state.log_history if "rewards/Reconstruction/gain" in log]
    assert logs and all(log["rewards/Reconstruction/within_group_std"] > 0 for log in logs)


@pytest.mark.slow
def test_a_trained_decoder_prefers_rationales_that_say_more(tmp_path: Path) -> None:
    from grace_rl.rollout.policy import load_policy
    from grace_rl.train.reconstruction import ReconstructionTrainer, paired_with_writing
    from grace_rl.train.reconstruction_config import ReconstructionConfig

    args = ReconstructionConfig(
        output_dir=str(tmp_path), instruction=None, use_cpu=True, report_to="none",
        save_strategy="no", per_device_train_batch_size=32, max_steps=100, learning_rate=3e-3,
        disable_tqdm=True, writing_share=0.0,
    )  # fmt: skip
    model, tokenizer = load_policy(str(scenes.COLD_START), dtype=torch.float32)
    rows = paired_with_writing(scenes.rows(form="triplet", count=2000), args)
    trainer = ReconstructionTrainer(model, args, rows, tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    reward = Reconstruction(str(tmp_path / "model"))
    batch = batch_of(16, trained=("query",))
    truth = [row["scene"] for row in scenes.rows(form="triplet", count=16)]
    rng = random.Random(0)
    forms: tuple[Any, ...] = ("canonical", "filler")
    means = {}
    for form in forms:
        written = [scenes.reference_rationale(s, form=form, rng=rng) for s in truth for _ in "12"]
        means[form] = reward(dataclasses.replace(batch, rationales=written)).values.mean()
    assert means["canonical"] > means["filler"] + 0.1


@pytest.mark.slow
def test_zero3_does_not_split_the_decoder(decoder: str) -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        reward = Reconstruction(decoder)
        RewardRuntime(load_rewards([reward], ".")).score(batch_of())
        assert reward.decoder is not None
        for parameter in reward.decoder.model.parameters():
            assert not hasattr(parameter, "ds_id") and parameter.numel() > 0
    finally:
        del held
