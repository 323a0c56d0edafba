"""Step-wise credit in TRL's real training loop, on a tiny random policy."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grace_rl_rewards.contrastive import Contrastive
from grace_rl_rewards.length import Length
from grace_rl_rewards.stepwise import Stepwise
from peft import LoraConfig
from rich.console import Console
from transformers import TrainerCallback

from grace_rl.credit.by_segment import ADVICE_BATCHES
from grace_rl.data import scenes
from grace_rl.embed.hidden_states import decoder_stack
from grace_rl.errors import UserError
from grace_rl.reward import RewardBatch, RewardOutput
from grace_rl.rollout.store import read_rollouts
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig

ROWS = scenes.rows("train", "quad", 12)
K = 3


@pytest.fixture
def build(tiny_trainer: Any) -> Any:
    def build(folder: Path, rewards: list[Any] | None = None, **settings: Any) -> Any:
        usual = {
            "roles": {"query": {}, "positive": {}, "negative": {"train": False}},
            "segments": K,
            "segment_min_tokens": 2,
            "run_folder": folder,
        }
        rewards = rewards or [Stepwise(), Length()]
        return tiny_trainer(GraceGRPOTrainer, GraceGRPOConfig, folder, rewards, **usual | settings)

    return build


def given_advantages(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """What the trainer puts into TRL's loss, filled while it trains."""
    seen = []
    compute = trainer._compute_loss

    def spy(model: Any, inputs: dict[str, Any]) -> Any:
        seen.append({name: inputs[name] for name in ("advantages", "completion_mask")})
        return compute(model, inputs)

    trainer._compute_loss = spy
    return seen


@pytest.mark.parametrize("span", ["context", "rationale", "bottleneck", "joint"])
def test_prefixes_need_no_forward_of_their_own(build: Any, tmp_path: Path, span: str) -> None:
    counts = []
    for reward in (Contrastive(), Stepwise()):
        trainer = build(
            tmp_path / type(reward).__name__,
            [reward],
            reader={"span": span},
            num_iterations=2,
        )
        forwards: list[int] = []
        decoder_stack(trainer.model).register_forward_hook(
            lambda *_, forwards=forwards: forwards.append(1)  # type: ignore[misc]
        )
        shapes: list[torch.Size] = []
        score = trainer.runtime.score

        def spy(batch: Any, arguments: Any, shapes: Any = shapes, score: Any = score) -> Any:
            if batch.prefix_embeddings is not None:
                shapes.append(batch.prefix_embeddings.shape)
            return score(batch, arguments)

        trainer.runtime.score = spy
        trainer.train()
        counts.append(len(forwards))
        assert [tuple(shape[:2]) for shape in shapes] == [(8, K + 1)] * len(shapes)
        assert bool(shapes) == isinstance(reward, Stepwise)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("span", ["context", "bottleneck"])
def test_one_segment_trains_as_the_potential_does(build: Any, tmp_path: Path, span: str) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.1, "reader": {"span": span}, "num_iterations": 2}
    plain = build(tmp_path / "plain", [Contrastive(), Length()], **settings)
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    plain.train()
    shaped = build(tmp_path / "shaped", segments=1, **settings)
    shaped.train()
    after = dict(shaped.model.named_parameters())
    assert any(not torch.equal(before[name], p) for name, p in after.items())
    for name, p in plain.model.named_parameters():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=1e-5)


def test_every_segment_has_one_advantage_and_it_is_stored(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, num_generations=4, per_device_train_batch_size=16)
    seen = given_advantages(trainer)
    trainer.train()
    differ = 0
    for inputs in seen:
        advantages, written = inputs["advantages"], inputs["completion_mask"].bool()
        assert advantages.shape == written.shape and (advantages[~written] == 0).all()
        for row, mask in zip(advantages, written, strict=True):
            runs = torch.unique_consecutive(row[mask])
            assert len(runs) <= K
            differ += len(runs) > 1
    assert differ > 8

    stored = [row for row in read_rollouts(tmp_path).to_pylist() if row["advantage"] is not None]
    first = [row for row in stored if row["step"] == 1]
    for row in stored:
        assert len(row["step_scores"]) == K + 1
        assert row["step_scores"][-1] == pytest.approx(row["reward/Stepwise"], abs=1e-5)
        assert len({round(r["step_scores"][0], 4) for r in stored if r["group"] == row["group"]
                    and r["step"] == row["step"]}) == 1  # fmt: skip
    inputs = seen[0]
    means = (inputs["advantages"].sum(1) / inputs["completion_mask"].sum(1)).tolist()
    # TRL shuffles a generation batch before it trains on it.
    assert sorted(row["advantage"] for row in first) == pytest.approx(sorted(means), abs=1e-5)

    logged = trainer.state.log_history[0]
    for name in ("share_not_worse", "gain", "one_segment", "beta_2", "beta_3"):
        assert f"shaping/{name}" in logged, name


def test_a_gate_counts_at_the_end(build: Any, tmp_path: Path) -> None:
    """With lambda 0 only the last segment pays for a gate."""

    def every_other(batch: RewardBatch) -> RewardOutput:
        count = len(batch)
        return RewardOutput([0.0] * count, gate=torch.arange(count) % 2 == 0)

    every_other.gates = True  # type: ignore[attr-defined]

    def gate_off(weight: float) -> list[dict[str, torch.Tensor]]:
        trainer = build(
            tmp_path / str(weight),
            [Stepwise(), every_other],
            shaping={"gae_lambda": 0.0},
            reward_weights=[1.0, weight],
            scale_rewards="none",
            max_steps=1,
            num_generations=8,
            per_device_train_batch_size=16,
        )
        seen = given_advantages(trainer)
        trainer.train()
        return seen

    (with_,), (without,) = gate_off(1.0), gate_off(0.0)
    changed = (with_["advantages"] - without["advantages"]).abs() > 1e-5
    assert changed.any()
    assert not changed[:, :5].any()  # cuts of 8 tokens: 3 and 5


@pytest.mark.parametrize(
    "settings",
    [
        {"shaping": {"gae_lambda": 1.0, "calibrate": False}},
        {"shaping": {"gae_lambda": 0.5, "penalty": 0.2}},
        {"shaping": {"penalty": 0.2, "margin": 0.1}, "scale_rewards": "batch"},
        {"reader": {"span": "context"}},
        {"reader": {"span": "rationale", "pool": "last"}, "num_iterations": 2},
        {"reader": {"span": "bottleneck", "weights": "frozen"}},
        {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
        {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
        {"mask_truncated_completions": True, "reader": {"span": "context"}},
    ],
)
def test_settings_train(build: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = build(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_with_weight_0_steps_are_only_logged(build: Any, tmp_path: Path) -> None:
    rewards = [Contrastive(), Stepwise()]
    trainer = build(tmp_path, rewards, reward_weights=[1.0, 0.0])
    seen = given_advantages(trainer)
    trainer.train()
    assert all(inputs["advantages"].dim() == 1 for inputs in seen)
    logged = trainer.state.log_history[0]
    assert "rewards/Stepwise/mean" in logged and "shaping/gain" in logged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"loss_type": "luspo"}, "loss_type"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"shaping": {"gae_lambda": 2.0}}, "shaping.gae_lambda"),
        ({"reader": {"weights": "some/encoder"}}, "reader.weights"),
    ],
)
def test_impossible_settings_are_refused_before_a_model_loads(
    build: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, model="no/such/model", **settings)


def test_advice_about_beta_comes_once(build: Any, tmp_path: Path) -> None:
    output = io.StringIO()
    trainer = build(tmp_path, console=Console(file=output, width=500))

    def step(slope: float) -> None:
        moments = [[value] * (K - 1) for value in (0.0, 0.0, slope, 1.0)]
        batches = trainer.credit.calibration.batches + 1
        trainer.credit.load_state_dict({"moments": moments, "batches": batches})
        trainer.say(trainer.credit.advice())

    for _ in range(ADVICE_BATCHES + 5):
        step(0.2)
    assert output.getvalue().count("below 0.5") == 1


PROGRAM = """
import sys
from pathlib import Path
from accelerate.utils import gather_object
from grace_rl.data import scenes
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl_rewards.length import Length
from grace_rl_rewards.stepwise import Stepwise

folder = Path(sys.argv[1])
args = GraceGRPOConfig(
    output_dir=str(folder), num_generations=8, per_device_train_batch_size=24, max_steps=2,
    max_completion_length=12, segment_min_tokens=2, shaping={"penalty": 0.2}, instruction=None,
    roles={"query": {}, "positive": {}, "negative": {"train": False}}, learning_rate=1e-3,
    use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
    report_to="none", print_rollouts_steps=0,
)
rows = scenes.rows("train", "quad", 12)
trainer = GraceGRPOTrainer(
    str(scenes.COLD_START), args, rows, [Stepwise(), Length()], run_folder=folder
)
trainer.train()
weights = sum(float(p.detach().double().sum()) for p in trainer.model.parameters())
found = gather_object([(weights, trainer.credit.state_dict(), trainer.segmenter.state_dict())])
assert len(found) == 2 and found[0] == found[1], found
"""


@pytest.mark.slow
def test_groups_that_two_processes_share(tmp_path: Path) -> None:
    """24 rollouts each: the middle one of the three bundles of 16 lies on both."""
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [*launcher, "2", str(tmp_path / "program.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in read_rollouts(tmp_path).to_pylist() if row["advantage"] is not None]
    assert len(rows) == 2 * 48
    for step in (1, 2):
        for group in {row["group"] for row in rows if row["step"] == step}:
            own = [row for row in rows if (row["step"], row["group"]) == (step, group)]
            assert len(own) == 8
            assert len({round(row["step_scores"][0], 3) for row in own}) == 1


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_resumed_equals_uninterrupted(build: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "shaping": {"gae_lambda": 0.5, "penalty": 0.3}}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    first = build(tmp_path / "cut", **settings)
    first.add_callback(StopAt(3))
    first.train()
    second = build(tmp_path / "cut", **settings)
    second.train(resume_from_checkpoint=True)
    weights = dict(whole.model.named_parameters())
    for name, p in second.model.named_parameters():
        assert torch.equal(p, weights[name]), name
    assert second.credit.state_dict() == whole.credit.state_dict()
    assert second.segmenter.typical_length == whole.segmenter.typical_length
    stored = [read_rollouts(tmp_path / run).to_pylist() for run in ("whole", "cut")]
    assert stored[0] == stored[1]
