"""PPO, with TRL's real training loop on a tiny random policy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback

from grace_rl.credit.value_model import is_value_parameter
from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.rollout.store import read_rollouts
from grace_rl.train.ppo import VALUE_MODEL_FILE, GracePPOTrainer
from grace_rl.train.ppo_config import GracePPOConfig
from grace_rl.train.run import save_policy

ROWS = scenes.rows("train", "quad", 12)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
EPOCHS = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}


@pytest.fixture
def build(tiny_trainer: Any) -> Any:
    roles = {"query": {}, "positive": {}, "negative": {"train": False}}
    settings = {"roles": roles, "value_learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return functools.partial(tiny_trainer, GracePPOTrainer, GracePPOConfig, **settings)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def one_batch(trainer: Any) -> dict[str, Any]:
    """The first slice of the first batch of rollouts, as the loss sees it."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    batch: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch


def test_training_moves_policy_and_critic_and_logs(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, beta=0.05, kl_target=3.0, run_folder=tmp_path)
    before = weights(trainer)
    trainer.train()
    moved = [name for name, p in weights(trainer).items() if not torch.equal(before[name], p)]
    assert "value_model.head.weight" in moved and any(not is_value_parameter(n) for n in moved)
    logged = trainer.state.log_history[0]
    for name in (
        "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg",
        "loss/value_avg", "val/clipfrac_avg", "val/explained_variance", "val/mean",
        "objective/kl", "objective/kl_coefficient", "objective/rlhf_reward", "objective/scores",
        "reward", "entropy", "clip_ratio/region_mean", "rewards/contrastive/within_group_std",
    ):  # fmt: skip
        assert name in logged, name
    assert logged["objective/scores"] == pytest.approx(logged["reward"], abs=1e-5)
    kept = [row["advantage"] for row in read_rollouts(tmp_path).to_pylist()]
    assert any(advantage for advantage in kept)


@pytest.mark.parametrize(
    "settings",
    [
        EPOCHS,
        {"critic": "detached", "beta": 0.05, "kl_in": "loss"},
        {"critic": "separate", "beta": 0.05, "value_learning_rate": None},
        {"critic": "shared", "peft_config": LORA, "beta": 0.05},
        {"critic": "separate", "peft_config": LORA, **EPOCHS},
        {"reader": {"span": "context"}, "whiten_advantages": False, "value_clip": None},
        {"mask_truncated_completions": True},
    ],
)
def test_settings_train(build: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = build(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_loss_is_that_of_the_definition(build: Any, tmp_path: Path) -> None:
    """Policy and value loss against a loop over tokens, from logits of a plain forward."""
    trainer = build(tmp_path, **EPOCHS, value_clip=0.1, vf_coef=0.3, entropy_coef=0.0)
    generator = torch.Generator().manual_seed(0)
    batch = one_batch(trainer)
    with torch.no_grad():
        trainer.value_model.head.weight.normal_(0, 0.05, generator=generator)
    for name in ("old_per_token_logps", "old_values", "returns", "advantages"):
        batch[name] = batch[name] + 0.3 * torch.randn(batch[name].shape, generator=generator)
    loss = float(trainer._compute_loss(trainer.model, batch))

    prompts, ids = batch["prompt_ids"], batch["completion_ids"]
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        output = trainer.model(
            input_ids=torch.cat([prompts, ids], 1),
            attention_mask=attention,
            output_hidden_states=True,
        )
    head = trainer.value_model.head
    policy_sum = value_sum = 0.0
    for row in range(len(ids)):
        for t in range(int(batch["completion_mask"][row].sum())):
            place = prompts.size(1) + t - 1
            logp = output.logits[row, place].double().log_softmax(-1)[ids[row, t]]
            value = float(output.hidden_states[-1][row, place] @ head.weight[0] + head.bias[0])
            ratio = float((logp - batch["old_per_token_logps"][row, t]).exp())
            advantage, old, target = (
                float(batch[name][row, t]) for name in ("advantages", "old_values", "returns")
            )
            policy_sum -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            near = old + min(max(value - old, -0.1), 0.1)
            value_sum += 0.5 * max((value - target) ** 2, (near - target) ** 2)
    tokens = float(batch["num_items_in_batch"]) / trainer.args.steps_per_generation
    assert loss == pytest.approx((policy_sum + 0.3 * value_sum) / tokens, abs=2e-6)


def test_values_are_those_of_the_state_before_each_token(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with torch.no_grad():
        trainer.value_model.head.weight.normal_()
    batch = one_batch(trainer)
    prompts, ids = batch["prompt_ids"], batch["completion_ids"]
    with torch.no_grad():
        for t in range(ids.size(1)):  # cut off everything from token t on
            output = trainer.model.model(
                input_ids=torch.cat([prompts, ids[:, :t]], 1),
                attention_mask=torch.cat(
                    [batch["prompt_mask"], batch["completion_mask"][:, :t]], 1
                ),
            )
            value = trainer.value_model(output.last_hidden_state)[:, -1]
            seen = batch["completion_mask"][:, t].bool()
            torch.testing.assert_close(
                batch["old_values"][seen, t], value[seen], atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    ("critic", "reaches"), [("shared", True), ("detached", False), ("separate", False)]
)
def test_the_value_loss_reaches_the_policy_only_if_shared(
    build: Any, tmp_path: Path, critic: str, reaches: bool
) -> None:
    trainer = build(tmp_path, critic=critic)
    batch = one_batch(trainer)
    with torch.no_grad():
        trainer.value_model.head.weight.fill_(0.1)
    batch["advantages"] = torch.zeros_like(batch["advantages"])  # the policy loss is silent
    trainer._compute_loss(trainer.model, batch).backward()
    gradients = {
        name: p.grad.abs().sum()
        for name, p in trainer.model.named_parameters()
        if p.grad is not None
    }
    assert gradients["value_model.head.weight"] > 0
    assert any(g > 0 for n, g in gradients.items() if not is_value_parameter(n)) is reaches
    if critic == "separate":
        assert gradients["value_model.backbone.layers.0.mlp.up_proj.weight"] > 0


def test_critic_has_a_learning_rate_of_its_own(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, learning_rate=1e-30)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, p in weights(trainer).items() if (before[name] - p).abs().max() > 1e-12}
    assert moved == {"value_model.head.weight", "value_model.head.bias"}
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained}) == len(before)


def test_one_large_batch_equals_accumulated_small_ones(build: Any, tmp_path: Path) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.1}
    large = build(tmp_path, **settings)
    large.train()
    small = build(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings
    )
    small.train()
    after = weights(small)
    for name, p in weights(large).items():
        torch.testing.assert_close(after[name], p, atol=1e-6, rtol=1e-5)


def test_the_kl_is_paid_by_token_or_in_the_loss(build: Any, tmp_path: Path) -> None:
    """A reference that finds every token one nat less likely costs beta a token, once."""
    returns = {}
    for place in ("reward", "loss"):
        trainer = build(
            tmp_path, [lambda completions, **_: [0.0] * len(completions)],
            beta=0.5, kl_in=place, lam=1.0, whiten_advantages=False,
        )  # fmt: skip
        values = trainer._values_of_rollouts

        def shifted(output: Any, values: Any = values) -> Any:
            own = values(output)
            output["ref_per_token_logps"] = output["old_per_token_logps"] - 1.0
            return own

        trainer._values_of_rollouts = shifted
        batch = one_batch(trainer)
        left = batch["completion_mask"].flip(1).cumsum(1).flip(1) * batch["completion_mask"]
        returns[place] = (batch["returns"], left)
        kl = trainer._metrics["train"]["objective/kl"][0]
        assert kl == pytest.approx(float(batch["completion_mask"].sum(1).float().mean()), abs=1e-4)
    paid, left = returns["reward"]
    torch.testing.assert_close(paid, -0.5 * left.float(), atol=1e-4, rtol=0)
    assert not returns["loss"][0].any()


def test_segments_are_paid_where_they_end(build: Any, tmp_path: Path) -> None:
    """With `stepwise` each segment earns its step; what other rewards say comes at the end."""
    settings = {"segments": 2, "segment_min_tokens": 2, "lam": 1.0, "whiten_advantages": False}
    trainer = build(tmp_path, ["stepwise", "length"], **settings)
    seen: list[Any] = []
    give = trainer.give_credit

    def spy(world: Any, output: Any) -> Any:
        rollouts = world.trained_rows
        seen.append((rollouts.step_scores, rollouts.prefix_ends, rollouts.totals, output))
        return give(world, output)

    trainer.give_credit = spy
    trainer.train()
    for scores, ends, totals, output in seen:
        first = scores[:, 0].reshape(-1, 2).mean(1).repeat_interleave(2)  # the same in a group
        assert (ends[:, 1] == 4).all() and (ends[:, 2] == 8).all()
        returns = output["returns"]
        expected = torch.stack([totals - first] * 4 + [totals - scores[:, 1]] * 4, dim=1)
        torch.testing.assert_close(returns, expected, atol=1e-5, rtol=1e-5)


def test_rollouts_that_nobody_scored_move_nothing(build: Any, tmp_path: Path) -> None:
    def abstains(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    trainer = build(tmp_path, [abstains], optim="sgd")
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())


def test_evaluation_leaves_no_trace_in_training(build: Any, tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        eval_dataset=ROWS[:4],
        per_device_eval_batch_size=8,
        beta=0.05,
        kl_target=1.0,
    )
    metrics = trainer.evaluate()
    assert "eval_val/explained_variance" in metrics and trainer.beta == 0.05


# -- saving and resuming ---------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic": "separate"},
        {"peft_config": LORA},
        {"critic": "separate", "peft_config": LORA},
    ],
)
def test_model_loads_without_the_critic(build: Any, tmp_path: Path, settings: Any) -> None:
    trainer = build(tmp_path, **settings)
    trainer.train()
    folder = tmp_path / "model"
    save_policy(trainer, folder)
    assert not list(folder.glob(f"**/{VALUE_MODEL_FILE}"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "value_model" in name or "lora" in name]  # noqa: SIM118
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.05, "kl_target": 1.0, "kl_horizon": 16},
        {"critic": "separate", **EPOCHS},
        {"critic": "separate", "peft_config": LORA},
    ],
)
def test_resumed_equals_uninterrupted(build: Any, tmp_path: Path, settings: Any) -> None:
    settings = {"max_steps": 8} | settings
    whole = build(tmp_path / "whole", run_folder=tmp_path / "whole", **settings)
    whole.train()

    cut = tmp_path / "cut"
    first = build(cut, run_folder=cut, **settings)
    first.add_callback(StopAt(4))
    first.train()
    second = build(cut, run_folder=cut, **settings)
    second.train(resume_from_checkpoint=True)
    expected = weights(whole)
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert second.beta == whole.beta
    assert read_rollouts(cut).to_pylist() == read_rollouts(tmp_path / "whole").to_pylist()
    if "kl_target" in settings:
        assert second.beta != 0.05


# -- mistakes ---------------------------------


def test_mistakes_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        GracePPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, critic="sharde", kl_in="rewards",
            per_device_train_batch_size=16,
            gamma=1.5, vf_coef=0.0, kl_target=1.0, importance_sampling_level="sequence",
            loss_type="luspo", scale_rewards="batch", shaping={"gae_lambda": 0.5},
        )  # fmt: skip
    keys = {problem.partition(":")[0] for problem in caught.value.problems}
    assert keys == {
        "critic", "kl_in", "gamma", "vf_coef", "kl_target", "scale_rewards", "shaping.gae_lambda",
        "importance_sampling_level", "loss_type",
    }  # fmt: skip
