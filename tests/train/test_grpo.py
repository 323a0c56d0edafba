"""The trainer, with TRL's real training loop on a tiny random policy."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from grace_rl.data import scenes
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Written
from grace_rl.errors import UserError
from grace_rl.reward import RewardBatch
from grace_rl.rollout.store import read_rollouts
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

ROWS = scenes.rows("train", "quad", 12)
ROLES = {
    "query": {},
    "positive": {},
    "negative": {"train": False},
    "negative_positive": {"train": False},
}


@pytest.fixture
def build(tiny_trainer: Any) -> Any:
    return functools.partial(tiny_trainer, GraceGRPOTrainer, GraceGRPOConfig, roles=ROLES)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_training_moves_the_policy_and_logs(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    before = weights(trainer)
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in weights(trainer).items())
    logged = trainer.state.log_history[0]
    for name in (
        "reward", "rewards/contrastive/mean", "rewards/contrastive/std",
        "rewards/contrastive/within_group_std", "embedding/mean_cosine", "embedding/effective_rank",
        "completions/mean_length", "completions/clipped_ratio", "completions/distinct_2",
        "rollout/tokens_per_second", "time/rollout", "time/embed", "time/reward", "time/train",
        "time/sync",
    ):  # fmt: skip
        assert name in logged, name


@pytest.mark.parametrize("span", ["context", "rationale"])
def test_embeddings_come_from_the_forward_that_trl_makes(
    build: Any, tmp_path: Path, span: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing could be seen while it was written, as with vLLM; only anchors need more."""
    trainer = build(
        tmp_path, reader={"span": span}, num_iterations=2, gradient_accumulation_steps=1
    )
    reads: list[int] = []
    compared: list[float] = []
    own_read = trainer.reader.read
    score = trainer._calculate_rewards

    def counted(written: list[Written], ends: torch.Tensor | None) -> torch.Tensor:
        reads.append(len(written))
        return own_read(written, ends)

    def compare(inputs: Any, prompts: Any, completions: Any, ids: Any) -> torch.Tensor:
        reader = trainer.rollout_reader
        written = reader.written(trainer._rollouts.trained_rows)
        compared.append(float((reader._overheard - own_read(written)).abs().max()))
        return score(inputs, prompts, completions, ids)

    monkeypatch.setattr(trainer.rollout_reader, "while_writing", nullcontext)
    trainer.reader.read = counted
    trainer._calculate_rewards = compare
    trainer.train()
    assert compared and max(compared) < 1e-4
    rows_per_batch, anchors_per_row = 2, 2
    assert set(reads) == {rows_per_batch * anchors_per_row}, (
        "only anchors need a forward of their own"
    )


def test_pool_holds_every_counterpart_and_each_anchor_once(build: Any, tmp_path: Path) -> None:
    seen: list[RewardBatch] = []

    def spy(batch: RewardBatch) -> list[float]:
        seen.append(batch)
        return [float(len(ids)) for ids in batch.token_ids]

    build(tmp_path, [spy]).train()
    for batch in seen:
        pool = batch.pool
        assert len(batch) == 8 and len(pool) == 8 + 2 * 2
        for example in set(batch.example.tolist()):
            roles = sorted(
                role
                for role, e in zip(pool.roles, pool.example.tolist(), strict=True)
                if e == example
            )
            assert roles == [
                "negative",
                "negative_positive",
                "positive",
                "positive",
                "query",
                "query",
            ]
        row = ROWS[int(batch.example[0])]
        assert (
            batch.columns["query"][0] == row["query"] and batch.columns["scene"][0] == row["scene"]
        )
        norms = pool.embeddings.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=1e-4)


def test_anchor_temperature_reaches_only_anchors(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, anchor_temperature=0.5)
    used: list[tuple[int, float]] = []
    generate = trainer.model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        used.append((len(kwargs["input_ids"]), kwargs["generation_config"].temperature))
        return generate(*args, **kwargs)

    trainer.model.generate = spy
    trainer.train()
    assert set(used) == {(8, 1.0), (4, 0.5)}
    assert trainer.generation_config.temperature == 1.0


def test_one_large_batch_equals_accumulated_small_ones(build: Any, tmp_path: Path) -> None:
    # Plain gradient descent: Adam would blow rounding errors of near-zero gradients up to whole
    # steps.
    settings = {"optim": "sgd", "learning_rate": 0.1}
    large = build(tmp_path, per_device_train_batch_size=8, **settings)
    before = weights(large)
    large.train()
    small = build(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    small.train()
    after = weights(small)
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    for name, p in weights(large).items():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("rewards", "settings"),
    [
        (
            ["grace_published"],
            {"roles": {"positive": {}, "query": {"train": False}, "negative": {"train": False}}},
        ),
        (["contrastive", "consistency", "hard_negative", "length", "format"], {}),
        (["contrastive"], {"roles": {r: {} for r in ROLES}, "per_device_train_batch_size": 16}),
        (["contrastive"], {"reader": {"span": "bottleneck", "weights": "frozen"}}),
        (["contrastive"], {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}),
        (["contrastive"], {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_settings_train(
    build: Any, tmp_path: Path, rewards: list[Any], settings: dict[str, Any]
) -> None:
    trainer = build(tmp_path, rewards, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("reward", ["contrastive", "grace_published"])
def test_unsupervised_rows_train(build: Any, tmp_path: Path, reward: str) -> None:
    rows = scenes.rows("train", "unsupervised", 12)
    roles = {"text": {}, "anchor": {"train": False}}
    trainer = build(tmp_path, [reward], rows, roles=roles, max_completion_length=32, max_steps=3)
    trainer.train()
    assert any(
        logged.get(f"rewards/{reward}/within_group_std", 0) > 0
        for logged in trainer.state.log_history
    )


def test_plain_trl_reward_works_unchanged(build: Any, tmp_path: Path) -> None:
    def shorter(completions: list[str], query: list[str], **_: Any) -> list[float | None]:
        return [
            None if not c else -len(c) / len(q) for c, q in zip(completions, query, strict=True)
        ]

    trainer = build(tmp_path, [shorter])
    trainer.train()
    assert trainer.state.log_history[0]["rewards/shorter/mean"] < 0


def test_rollouts_are_stored_with_rewards_and_advantages(build: Any, tmp_path: Path) -> None:
    build(tmp_path, run_folder=tmp_path).train()
    table = read_rollouts(tmp_path).to_pylist()
    assert {row["step"] for row in table} == {1, 2}
    trained = [row for row in table if row["advantage"] is not None]
    assert len(trained) == 16 and {row["role"] for row in trained} == {"query", "positive"}
    assert all(row["reward/contrastive"] is not None for row in trained)
    assert all(row["reward/contrastive"] is None for row in table if row["advantage"] is None)
    for row in table:
        assert len(row["embedding"]) == 96 or len(row["embedding"]) > 0
    for group in {row["group"] for row in trained}:
        for step in (1, 2):
            advantages = [
                r["advantage"] for r in trained if r["group"] == group and r["step"] == step
            ]
            assert abs(sum(advantages)) < 1e-3


def test_evaluation_loop_scores_whole_bundles(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, eval_dataset=ROWS[:4], per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert "eval_rewards/contrastive/mean" in metrics


def test_saved_model_encodes_as_the_trainer_does(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    encoder = RationaleEncoder.from_pretrained(tmp_path / "model")
    texts = [row["query"] for row in ROWS]
    encoded = encoder.encode(texts)
    raw = trainer.reader.read(encoder.write(texts))
    torch.testing.assert_close(encoded.vectors, trainer.reader.finish(raw), atol=1e-5, rtol=1e-5)
    alone = encoder.encode(texts[:1])
    assert alone.rationales == encoded.rationales[:1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 6}, "^per_device_train_batch_size: "),
        ({"per_device_train_batch_size": 400}, "^per_device_train_batch_size: .* there are 12"),
        ({"reader": {"span": "prefix"}}, "reader.span"),
        (
            {"num_iterations": 2, "save_strategy": "steps", "save_steps": 3},
            "^save_steps: ",
        ),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2"),
        ({"temperature": float("nan")}, "^temperature: "),
    ],
)
def test_impossible_settings_are_refused(
    build: Any, tmp_path: Path, settings: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, model="no/such/model", **settings)


def test_gates_need_totals(build: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="normalize_then_sum"):
        build(
            tmp_path,
            ["contrastive", "length"],
            multi_objective_aggregation="normalize_then_sum",
        )
