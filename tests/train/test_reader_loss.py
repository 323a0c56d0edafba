"""The loss beside the rewards, in real training steps of a tiny random policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.recipe import load_recipe
from grace_rl.rollout.engines import GRPOTrainer
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.ppo import GracePPOTrainer
from grace_rl.train.ppo_config import GracePPOConfig
from grace_rl.train.reader_loss import ReaderLoss

ROWS = scenes.rows("train", "quad", 12)


@pytest.fixture
def build(tiny_trainer: Any) -> Any:
    def build(folder: Path, method: str = "grpo", **settings: Any) -> Any:
        classes = {
            "grpo": (GraceGRPOTrainer, GraceGRPOConfig),
            "ppo": (GracePPOTrainer, GracePPOConfig),
        }[method]
        usual = {"max_steps": 1, "learning_rate": 1e-2, "reader_loss": {"weight": 1.0}}
        return tiny_trainer(*classes, folder, **usual | settings)

    return build


def constant(completions: list[str], **_: Any) -> list[float]:
    """No rollout is better than another: the policy's own loss has no gradient."""
    return [1.0] * len(completions)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the loss was called with, and what it returned."""
    seen: list[dict[str, Any]] = []
    call = ReaderLoss.__call__

    def watched(self: Any, rows: Any, raw: Any, usable: Any) -> Any:
        loss, accuracy = call(self, rows, raw, usable)
        seen.append({"self": self, "rows": rows, "raw": raw, "usable": usable, "loss": loss})
        return loss, accuracy

    monkeypatch.setattr(ReaderLoss, "__call__", watched)
    return seen


@pytest.mark.parametrize("span", ["bottleneck", "context", "rationale", "joint"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_reward_with_a_gradient(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: str, checkpointing: bool
) -> None:
    """Nobody has moved the policy yet, so loss and reward see the same vectors."""
    seen = watch(monkeypatch)
    trainer = build(tmp_path, reader={"span": span}, gradient_checkpointing=checkpointing)
    trainer.train()
    (call,) = seen
    known = call["self"]._batch.embeddings
    read = trainer.reader.finish(call["raw"])
    torch.testing.assert_close(read, known[call["rows"]], atol=1e-4, rtol=0)
    assert sorted(call["rows"].tolist()) == list(range(8))
    logged = trainer.state.log_history[0]
    assert logged["reader_loss/loss"] == pytest.approx(-logged["reward"], abs=1e-3)
    assert 0 <= logged["reader_loss/accuracy"] <= 1


@pytest.mark.parametrize("span", ["bottleneck", "context"])
def test_alone_it_teaches_to_read(build: Any, tmp_path: Path, span: str) -> None:
    """With a reward that has nothing to say, the same rollouts end nearer to their counterparts."""
    trainer = build(
        tmp_path,
        rewards=[constant],
        reader={"span": span},
        num_iterations=8,
        max_steps=8,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [log["reader_loss/loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.05, losses


def test_without_it_nothing_is_read_again(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    trainer = build(tmp_path, reader_loss=None, rewards=[constant])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert not seen
    pairs = zip(before, trainer.model.parameters(), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("span", ["bottleneck", "context"])
def test_mini_batches_sum_to_the_whole(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: str
) -> None:
    """Two halves, accumulated, move the weights as one whole does."""
    ends = []
    for parts in (1, 2):
        torch.manual_seed(0)
        trainer = build(
            tmp_path / str(parts),
            rewards=[constant],
            reader={"span": span},
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.1,
        )
        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", as_if_written)
        trainer.train()
        ends.append([p.detach() for p in trainer.model.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def as_if_written(trainer: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
    """Rationales that depend on their place in the batch alone."""
    own = int(trainer._rollouts.trained.sum())
    anchors = [[20 + i, 21] for i in range(len(prompt_ids) - own)]
    return [[5 + i % 7, 9, 11 + i] for i in range(own)] + anchors, None


def test_rollouts_that_are_cut_off_and_masked_do_not_count(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(monkeypatch)
    trainer = build(
        tmp_path, reader={"span": "context"}, mask_truncated_completions=True,
        max_completion_length=2,
    )  # fmt: skip
    trainer.train()
    (call,) = seen
    cut = call["self"]._batch.truncated[call["rows"]]
    assert cut.any() and torch.equal(call["usable"], ~cut)


def test_ppo_and_an_adapter(build: Any, tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        "ppo",
        rewards=[constant],
        reader={"span": "bottleneck"},
        num_iterations=2,
        max_steps=4,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    adapters = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert any(p.any() for p in adapters)
    logs = [log for log in trainer.state.log_history if "reader_loss/loss" in log]
    assert len(logs) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reader_loss": {"wieght": 1.0}}, "reader_loss.wieght: unknown key"),
        ({"reader_loss": {"weight": 0}}, "reader_loss.weight: must be above 0"),
        ({"reader_loss": {"temperature": "warm"}}, "reader_loss.temperature: must be"),
        ({"reader": {"weights": "frozen"}}, "nothing could learn to read"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_what_cannot_be_is_said(
    build: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        build(tmp_path, **settings)


def test_a_recipe_says_where(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    file = tmp_path / "recipe.yaml"
    loss = "reader_loss: {weight: -1, warmth: 2}\n"
    file.write_text(quickstart.read_text(encoding="utf-8") + loss, encoding="utf-8")
    line = len(file.read_text(encoding="utf-8").splitlines())
    with pytest.raises(UserError) as error:
        load_recipe(file)
    places = {p.partition(": must")[0].partition(": unknown")[0] for p in error.value.problems}
    assert places == {f"{file}:{line}: reader_loss.{key}" for key in ("warmth", "weight")}
