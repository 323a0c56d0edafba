"""PPO on rationales: the rollouts, embeddings and rewards of `GraceGRPOTrainer`, with a critic.

What differs from TRL's GRPO:

- A value model (train/value_model.py) predicts the reward from the text so far. Advantages are
  those of GAE over tokens, (B, T), whitened over the whole batch of rollouts.
- Rewards are paid per token: the weighted total on the last token, or, where a reward scores steps
  (`stepwise`), what each segment adds on its last token; and the KL to the reference on every
  token (`kl_in: reward`), or in the loss as in TRL. Its coefficient can adapt.
- The clipped policy loss is TRL's, with its averaging, entropy bonus and vLLM correction; the
  clipped value loss is added to it.

What differs from textbook PPO: values of the state before each token come with the old
log-probabilities in one forward; one optimizer and one gradient norm for policy and critic, each
with its own learning rate; mini-batches are cut once for a batch of rollouts and reused in every
epoch (TRL's buffer); a rollout that no reward scored moves neither policy nor critic.

The terms themselves are in train/ppo_terms.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from grace_rl.credit.by_critic import CriticCredit, Estimate
from grace_rl.credit.credit import Credit
from grace_rl.credit.critic import (
    adapted_kl_coefficient,
    clipped_value_losses,
    explained_variance,
    moments,
)
from grace_rl.credit.segments import step_labels
from grace_rl.credit.value_model import (
    attach_value_model,
    is_value_parameter,
    split_state,
    without_value_model,
)
from grace_rl.errors import UserError
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.train.grpo import GraceGRPOTrainer
from grace_rl.train.hooks import like_completions
from grace_rl.train.ppo_config import GracePPOConfig

VALUE_MODEL_FILE = "value_model.safetensors"


class GracePPOTrainer(GraceGRPOTrainer):
    """PPO for policies whose rationales are read as embeddings.

    Args:
        model: As in `GraceGRPOTrainer`.
        args: The configuration.
        *others, **keywords: As in `GraceGRPOTrainer`.

    Raises:
        UserError: As in `GraceGRPOTrainer`; or DeepSpeed's own optimizer would leave the critic
            without its own learning rate.
    """

    args: GracePPOConfig
    credit: CriticCredit

    def __init__(self, model: Any, args: GracePPOConfig, *others: Any, **keywords: Any) -> None:
        _check_deepspeed(args)
        self._received: list[Tensor] = []  # (b, T) values of the forward under way, by chunk
        self._forward: tuple[Tensor, Tensor | None, Tensor] | None = None
        self._rollout_values: Tensor | None = None
        super().__init__(model, args, *others, **keywords)
        policy = self.accelerator.unwrap_model(self.model)
        self.value_model = attach_value_model(policy, args.critic, self._received.append)
        self._critic_state: dict[str, Tensor] = {}
        if self.use_vllm:
            generation: Any = self.vllm_generation  # mypy lets nothing replace a method
            parameters = generation._iter_named_params
            generation._iter_named_params = lambda: (
                item for item in parameters() if not is_value_parameter(item[0])
            )

    # -- values ---------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._received.clear()
        output = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._received:  # the policy's forward, not a reference model's
            # The value before token t comes, as its logits do, from position t - 1.
            values = torch.cat(self._received)[:, -logits_to_keep - 1 : -1]
            self._forward = (output[0], output[1], values)
            if self._rollouts is not None and self._rollout_values is None:
                self._rollout_values = values
        return output

    def _values_of_rollouts(self, output: dict[str, Any]) -> Tensor:
        """(B, T) values by the policy that wrote the rollouts.

        They come from TRL's forward for the old log-probabilities. Where TRL skips that (one
        epoch, one mini-batch), it is made here.
        """
        if "old_per_token_logps" not in output:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            self._rollout_values = None  # a reference model that is the policy without its adapter
            with (
                torch.no_grad(),
                # TRL passes it the same two: a wrapped model, and kwargs that are a dict by now.
                disable_gradient_checkpointing(
                    self.model,  # type: ignore[arg-type]
                    self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
                ),
            ):
                output["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    ids,
                    attention,
                    output["completion_ids"].size(1),
                    batch_size=self.args.per_device_train_batch_size,
                )
        values, self._rollout_values = self._rollout_values, None
        if values is None:
            raise RuntimeError("no forward of the policy has given the critic's values")
        return values

    # -- credit ---------------------------------

    def _make_credit(self) -> Credit:
        args = self.args
        return CriticCredit(
            args.gamma,
            args.lam,
            args.whiten_advantages,
            steps=bool(step_labels(self.rewards)),
            penalty=self.args.shaping.penalty,
            margin=self.args.shaping.margin,
        )

    def give_credit(self, world: Rollouts, output: dict[str, Any]) -> Rollouts:
        """Values and KL per token for all processes; then advantages and returns, (B, T) each."""
        written = output["completion_mask"].bool()
        values = self._values_of_rollouts(output).where(written, torch.nan)
        kl = None
        if "ref_per_token_logps" in output:
            kl = (output["old_per_token_logps"] - output["ref_per_token_logps"]) * written
        world = dataclasses.replace(
            world,
            token_values=self._of_all(values, world, torch.nan),
            token_kl=None if kl is None else self._of_all(kl, world, 0.0),
        )
        self.credit.kl_coefficient = self.beta if self.args.kl_in == "reward" else 0.0
        estimate = self.credit.estimate(world.trained_rows, self.progress)
        own = self.own_rows(world)
        output["returns"] = like_completions(estimate.returns[own], output)
        output["old_values"] = like_completions(estimate.values[own], output)
        output["value_mask"] = like_completions(estimate.mask[own], output)
        world = super().give_credit(world, output)
        self._log_rollouts(estimate, world.trained_rows)
        return world

    def _of_all(self, own: Tensor, world: Rollouts, empty: float) -> Tensor:
        """(B, T) of this process -> (N, T) of all, `empty` for anchors and after the end."""
        longest = max(len(ids) for ids in world.token_ids)
        padded = self.accelerator.pad_across_processes(own, dim=1, pad_index=empty)
        values = gather(padded)[:, :longest].float()
        missing = (0, longest - values.size(1), 0, len(world) - len(values))
        return torch.nn.functional.pad(values, missing, value=empty)

    def _log_rollouts(self, estimate: Estimate, rollouts: Rollouts) -> None:
        """Metrics of a batch of rollouts; in training, adapt the KL coefficient to it."""
        scored, count = estimate.scored, len(rollouts)
        rated = max(int(scored.sum()), 1)
        mean, _ = moments(estimate.values, estimate.mask)
        metrics = {
            "objective/scores": float((estimate.scores * scored).double().sum()) / rated,
            "objective/rlhf_reward": float((estimate.paid * scored).double().sum()) / rated,
            "val/mean": float(mean),
            "val/explained_variance": explained_variance(
                estimate.values, estimate.returns, estimate.mask
            ),
        }
        if self.beta != 0.0 and rollouts.token_kl is not None:
            kl = float(rollouts.token_kl.sum(1).double().sum()) / count
            metrics |= {"objective/kl": kl, "objective/kl_coefficient": self.beta}
            if self.mode == "train" and self.args.kl_target is not None:
                self.beta = adapted_kl_coefficient(
                    self.beta, kl, self.args.kl_target, count, self.args.kl_horizon
                )
        self.log_all(metrics)

    # -- loss ---------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's clipped policy loss with token advantages, and the clipped value loss."""
        coefficient = self.beta
        if self.args.kl_in == "reward":
            self.beta = 0.0  # it has been paid
        try:
            policy_loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self.beta = coefficient
        if self._forward is None:
            raise RuntimeError("TRL's loss has made no forward")
        (logps, entropies, values), self._forward = self._forward, None
        mask = inputs["value_mask"]
        value_losses, value_clipped = clipped_value_losses(
            values, inputs["old_values"], inputs["returns"], self.args.value_clip
        )
        # A mean over the tokens of one optimizer step on all processes; `num_items_in_batch` counts
        # those of the whole batch of rollouts.
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        batches = self.args.steps_per_generation or 1
        share = accumulated / batches if self.model.training else 1.0
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) * share
        value_loss = (value_losses * mask).sum() / (tokens / self.accelerator.num_processes)
        loss = policy_loss + self.args.vf_coef * value_loss
        with torch.no_grad():
            self._log_losses(
                inputs, logps, entropies, value_losses, value_clipped, policy_loss * accumulated
            )
        return loss

    def _log_losses(
        self,
        inputs: dict[str, Any],
        logps: Tensor,
        entropies: Tensor | None,
        value_losses: Tensor,
        value_clipped: Tensor,
        policy_loss: Tensor,
    ) -> None:
        mode = "train" if self.model.training else "eval"
        log_ratio, advantages = logps - inputs["old_per_token_logps"], inputs["advantages"]
        ratio = log_ratio.exp()
        clipped = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        clipped |= (ratio < 1 - self.epsilon_low) & (advantages < 0)
        if entropies is None:
            raise RuntimeError("entropies must be there")
        columns = {
            "policy/approxkl_avg": 0.5 * log_ratio**2,
            "policy/clipfrac_avg": clipped,
            "policy/entropy_avg": entropies,
            "loss/value_avg": value_losses,
            "val/clipfrac_avg": value_clipped,
        }
        mask = inputs["value_mask"]
        sums = [(column * mask).sum() for column in columns.values()] + [mask.sum(), policy_loss]
        sums = self.accelerator.reduce(torch.stack([s.double() for s in sums]), reduction="sum")
        *totals, count, loss = sums.tolist()
        for name, total in zip(columns, totals, strict=True):
            self._metrics[mode][name].append(total / max(count, 1))
        self._metrics[mode]["loss/policy_avg"].append(loss / self.accelerator.num_processes)

    # -- optimizer and checkpoints ---------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's, with the critic in a parameter group of its own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            own = [p for p in self.value_model.parameters() if p.requires_grad]
            critic = {id(p) for p in own}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in critic]
            rate = self.args.value_learning_rate or self.args.learning_rate
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        critic = self.value_model.state_dict()
        if state_dict is not None:  # gathered from all processes
            state_dict, critic = split_state(state_dict)
        trained = {name for name, p in self.value_model.named_parameters() if p.requires_grad}
        # ZeRO-3 without stage3_gather_16bit_weights_on_model_save gathers nothing: then the critic,
        # as the policy, is in DeepSpeed's own shards only.
        self._critic_state = {
            name: t.detach().cpu().clone() for name, t in critic.items() if name in trained
        }
        with without_value_model(policy):
            super()._save(output_dir, state_dict)

    def save_extra_state(self, folder: Path) -> None:
        super().save_extra_state(folder)
        save_file(self._critic_state, str(folder / VALUE_MODEL_FILE))
        state = {"kl_coefficient": self.beta}
        (folder / "ppo.json").write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        with without_value_model(policy):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        critic = load_file(str(Path(resume_from_checkpoint) / VALUE_MODEL_FILE))
        self.value_model.load_state_dict(critic, strict=False)

    def load_extra_state(self, folder: Path) -> None:
        super().load_extra_state(folder)
        state = json.loads((folder / "ppo.json").read_text(encoding="utf-8"))
        self.beta = state["kl_coefficient"]


def _check_deepspeed(args: GracePPOConfig) -> None:
    """Raises UserError where DeepSpeed could not give the critic what it needs."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise UserError(
            "deepspeed: its own optimizer knows one learning rate; remove the section optimizer, "
            "then value_learning_rate holds"
        )
