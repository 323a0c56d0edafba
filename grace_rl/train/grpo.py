"""GRPO on rationales: TRL's trainer, with rewards that see embeddings.

A batch goes through six calls: `generate`, `read`, `score`, `give_credit`, `compute_loss`, `keep`.
One table (`grace_rl.rollout.rollouts.Rollouts`) goes through them and gets fuller; train/hooks.py
says where TRL makes them.

What differs from TRL's `GRPOTrainer`:

- The data set holds rows (query, positive, negatives, or text). Their texts become prompts by role,
  a row's rollouts stay in one generation batch, and anchors (texts of untrained roles) are written
  along with them, or kept for `anchor_steps`.
- transformers' `generate` computes the prompt of a group once (train/writing.py).
- Rewards get a `RewardBatch`: this process's rollouts with their embeddings, and every process's as
  a pool. In-context readers see the hidden states while transformers writes; with vLLM they take
  them from the forward that TRL makes for the old log-probabilities. Where there is neither, or
  the reader reads the rationale alone, a pass over the decoder stack is added.
- Advantages come from a `Credit` (`grace_rl.credit`): by group, as TRL's, or where a reward scores
  every prefix of a rationale (`stepwise`) by segment, (B, T) instead of (B,).
- `reader_loss` adds a loss with a gradient through the reader (train/reader_loss.py).
- Rollouts, rewards and advantages are kept in the run directory.

What differs from GRACE (arXiv 2510.04506): any role can be rolled out, so that negatives move the
advantage (there they are constant within a group and cancel), and the loss, clipping and scaling
are TRL's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from grace_rl.credit.by_group import GroupCredit
from grace_rl.credit.by_segment import SegmentCredit, prefix_columns
from grace_rl.credit.calibration import shaping_metrics
from grace_rl.credit.credit import Credit
from grace_rl.credit.segments import step_labels
from grace_rl.data.bundles import Bundles, parse_roles
from grace_rl.data.false_negatives import load_false_negatives
from grace_rl.embed.diagnostics import collapse_metrics, distinct_n
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader
from grace_rl.embed.settings import encoder_roles
from grace_rl.errors import UserError
from grace_rl.recipe import RewardSpec
from grace_rl.recipe.roles import unwritten_roles
from grace_rl.reward import RewardRuntime
from grace_rl.reward.batch import reward_batch
from grace_rl.reward.loading import LoadedReward, build_rewards, load_rewards
from grace_rl.reward.scores import with_scores
from grace_rl.reward.stored import FALSE_NEGATIVES, mask_settings
from grace_rl.rollout.columns import row_columns
from grace_rl.rollout.engines import vllm_start
from grace_rl.rollout.prompts import Prompt
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.rollout.segments import Segmenter, sentence_end_test
from grace_rl.run.screen import Screen
from grace_rl.train.anchors import KeptAnchors
from grace_rl.train.grpo_config import GraceGRPOConfig, check_rollouts
from grace_rl.train.head import spare_head
from grace_rl.train.hooks import RolloutTrainer, Write, like_completions
from grace_rl.train.keep import check_first_batch, check_totals, keep_rollouts
from grace_rl.train.phases import PhaseClock
from grace_rl.train.reader_loss import ReaderLoss, learn_weight
from grace_rl.train.rollout_reader import RolloutReader


class GraceGRPOTrainer(RolloutTrainer):
    """TRL's GRPO trainer for policies whose rationales are read as embeddings.

    Args:
        model: A causal language model, its path, or its hub id.
        args: The configuration.
        train_dataset: Rows with `query`, `positive` and optionally `negative`, `negative_positive`;
            or with `text`.
        rewards: Reward objects, functions (plain TRL ones too), names (of shipped rewards,
            `package.module:Name` or `file.py:Name`), or `RewardSpec`s. `args.reward_weights`, where
            given, are their weights.
        eval_dataset: Rows for TRL's evaluation loop.
        processing_class: The policy's tokenizer; loaded with the model if not given.
        peft_config: Train an adapter instead of all weights.
        callbacks, optimizers: As in TRL.
        run_folder: Where rollouts are kept; `None` keeps none.
        console: Where a group of rationales is printed every `args.print_rollouts_steps` steps.

    Raises:
        UserError: Roles, batch sizes, reader or rewards do not fit together. Raised before a model
            is loaded.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: GraceGRPOConfig,
        train_dataset: Sequence[dict[str, Any]],
        rewards: Sequence[RewardSpec | str | LoadedReward | Callable[..., Any]],
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        run_folder: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.rewards = _weighted(load_rewards(rewards, Path.cwd()), args.reward_weights)
        self.bundles = {"train": check_rollouts(args, list(train_dataset), self.rewards)}
        args.reward_weights = [reward.weight for reward in self.rewards]
        if eval_dataset is not None:
            roles = parse_roles(args.roles, args.num_generations or 0)
            self.bundles["eval"] = Bundles(list(eval_dataset), roles)
        build_rewards(self.rewards)
        self._reader_loss: ReaderLoss | None = None  # of the batch of rollouts
        self._raw = torch.empty(0)  # the batch's vectors, as they were read
        self.false_negatives = load_false_negatives(
            args.false_negatives,
            [row for part in self.bundles.values() for row in part.rows],
            run_folder,
        )
        self.console = console or Screen()
        self.clock = PhaseClock()

        with vllm_start(args.use_vllm):
            super().__init__(
                model=model,
                reward_funcs=[_named(reward.label) for reward in self.rewards],
                args=args,
                train_dataset=self.bundles["train"].dataset(),
                eval_dataset=self.bundles["eval"].dataset() if eval_dataset is not None else None,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        for policy in filter(None, (self.model, self.ref_model)):
            spare_head(self.accelerator.unwrap_model(policy))
        self.set_up_engine(self.console)
        self.run_folder = run_folder
        self._set_up_rooms()

    def _set_up_rooms(self) -> None:
        """What a batch goes through, in its order."""
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        self._templates = args.prompt_templates(self._tokenizer)
        self.prompt_template = self._templates[""]
        self.render = lru_cache(maxsize=65_536)(self._render)
        self.segmenter = Segmenter(
            args.segments, args.segment_min_tokens, sentence_end_test(self._tokenizer)
        )
        self.reader = Reader(
            args.reader, self._tokenizer, self.eos_token_ids, policy, self.accelerator.device
        )
        self.rollout_reader = RolloutReader(
            self.reader, policy, self.render, unwritten_roles(args.roles)
        )
        self.runtime = RewardRuntime(
            self.rewards,
            gather=gather,
            gather_object=lambda item: gather_object([item]),
            main_process=self.accelerator.is_main_process,
        )
        self.runtime.start_from(policy.name_or_path)
        self.credit = self._make_credit()
        self.anchors = KeptAnchors(args.anchor_steps)

    def _make_credit(self) -> Credit:
        if step_labels(self.rewards):
            return SegmentCredit(self.args.shaping, self.scale_rewards)
        weights = [reward.weight for reward in self.rewards]
        return GroupCredit(self.scale_rewards, self.multi_objective_aggregation, weights)

    # -- a batch, from texts to advantages ---------------------------------

    def generate(self, rollouts: Rollouts, write: Write) -> tuple[Rollouts, Any]:
        """Write for the texts, and along with them, or apart, for the anchors that are not kept."""
        own, temperature = int(rollouts.trained.sum()), self.args.anchor_temperature
        prompts = [self.render(*text) for text in zip(rollouts.texts, rollouts.roles, strict=True)]
        ids = [prompt.token_ids for prompt in prompts]
        places = self._places_to_write(rollouts)
        asked = [ids[i] for i in places]
        if temperature is None and not (self.use_vllm and self.vllm_mode == "server"):
            found, logps = write(asked, self.num_generations)
        else:
            found, logps = write(asked[:own], self.num_generations)
            if asked[own:]:
                with self.sampling_temperature(temperature):
                    found = found + write(asked[own:], 1)[0]
        self.rollout_reader.places = places
        written = list(rollouts.token_ids)  # those of anchors that are kept
        for i, row in zip(reversed(places), reversed(found), strict=True):  # fillers first
            written[i] = row
        ended = [not row or row[-1] in self.eos_token_ids for row in written]
        rollouts = dataclasses.replace(
            rollouts,
            prompts=[prompt.string for prompt in prompts],
            token_ids=written,
            rationales=self._tokenizer.batch_decode(written, skip_special_tokens=True),
            truncated=~torch.tensor(ended, device=rollouts.truncated.device),
            prefix_ends=self._prefix_ends(written, own),
        )
        return rollouts, logps

    def _render(self, text: str, role: str) -> Prompt:
        return self._templates.get(role, self.prompt_template).render(text)

    def _places_to_write(self, rollouts: Rollouts) -> list[int]:
        """Numbers of the texts that are written for, as many on every process: the first one fills
        up."""
        unwritten = self.rollout_reader.unwritten
        rows = enumerate(zip(rollouts.roles, rollouts.token_ids, strict=True))
        places = [i for i, (role, kept) in rows if role not in unwritten and not kept]
        if unwritten:
            count = torch.tensor([len(places)], device=self.accelerator.device)
            places += [0] * (int(gather(count).max()) - len(places))
        return places

    def _prefix_ends(self, token_ids: list[list[int]], own: int) -> Tensor | None:
        """(B, K+1) ends of segments, by the typical length of all processes' rollouts; an anchor is
        one segment. None where no reward asks for prefixes."""
        if not any(reward.steps for reward in self.rewards):
            return None
        device = self.accelerator.device
        if self.mode == "train" or self.segmenter.typical_length is None:
            lengths = gather(torch.tensor([len(ids) for ids in token_ids[:own]], device=device))
            self.segmenter.follow(float(lengths.float().mean()))
        ends = [self.segmenter.ends(ids) for ids in token_ids[:own]]
        ends += [[len(ids)] * (self.segmenter.segments + 1) for ids in token_ids[own:]]
        return torch.tensor(ends, device=device)

    def read(self, rollouts: Rollouts) -> Rollouts:
        """Read, gather, centre; and add the fields of the rows."""
        raw = self.rollout_reader.read(rollouts).gather(self._anchor_count, gather, gather_object)
        self.reader.update_centre(raw.embeddings)
        self._raw = raw.embeddings
        rows, prefixes = self.bundles[self.mode].rows, raw.prefix_embeddings
        world = dataclasses.replace(
            raw,
            embeddings=self.reader.finish(raw.embeddings),
            prefix_embeddings=None if prefixes is None else self.reader.finish(prefixes),
            columns=row_columns([rows[example] for example in raw.example.tolist()]),
            step=self.state.global_step + 1,
            seed=self.args.seed,
        )
        if self.mode == "train":
            self.log_all(self.anchors.remember(world))
        empty = [not rationale.strip() for rationale in world.trained_rows.rationales]
        self.log_all({"rollouts/empty": sum(empty) / len(empty)})
        self.log_all(distinct_n(world.token_ids))
        self.log_all(collapse_metrics(world.embeddings, raw.embeddings, world.example))
        return world

    def score(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor]:
        """Ask the rewards about this process's share, and gather what they say."""
        batch = reward_batch(rollouts, self.own_rows(rollouts), self.false_negatives)
        for_plain_functions = {
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        scored = self.runtime.score(batch, for_plain_functions)
        rollouts = with_scores(rollouts, self.rewards, scored, gather)
        check_totals(rollouts)
        self.log_all(scored.metrics)
        if self.args.reader_loss is not None and self.mode == "train":
            written = self.rollout_reader.written(batch)
            self._reader_loss = ReaderLoss(self.args.reader_loss, self.reader, written, batch)
            if self.reader.config.learn_weight:
                temperature = self.args.reader_loss.temperature
                learn_weight(self.reader, self._raw, rollouts, temperature, self.false_negatives)
        if self.reader.config.span == "joint":
            self.log_all({"reader/weight": self.reader.weight})
        if self.false_negatives is not None:
            own_share = torch.tensor([batch.masked_share()], device=rollouts.example.device)
            share = gather(own_share).mean().item()
            self.log_all({"false_negatives/masked_share": share})
            self.say(self.false_negatives.watch(share))
        return rollouts, scored.rewards

    def give_credit(self, rollouts: Rollouts, output: dict[str, Any]) -> Rollouts:
        """Settle `output["advantages"]`, (B,) or (B, T)."""
        trained = rollouts.trained_rows
        notes = {"credit": self.credit.notes(self.progress)}
        if self.false_negatives is not None:
            notes[FALSE_NEGATIVES] = mask_settings(self.false_negatives)
        advantages = self.credit(trained, self.progress)
        output["advantages"] = like_completions(advantages[self.own_rows(rollouts)], output)
        if trained.step_scores is not None:
            self.log_all(shaping_metrics(*prefix_columns(trained)))
        if self.mode == "train":
            self.say(self.credit.learn(trained))
            if self.state.global_step == 0:
                self.say(check_first_batch(advantages))
            if self._reader_loss is not None:
                count, device = len(output["advantages"]), output["completion_ids"].device
                output["rollout"] = torch.arange(count, device=device)
        return dataclasses.replace(rollouts, notes=notes).with_advantages(advantages)

    def keep(self, rollouts: Rollouts) -> None:
        """Store and print, where it is time to."""
        keep_rollouts(rollouts, self, self.run_folder)

    # -- loss ---------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and `reader_loss` where the recipe asks for it."""
        policy_loss = super().compute_loss
        reader_loss = self._reader_loss
        if reader_loss is None or self.mode != "train":
            return policy_loss(model, inputs, *args, **kwargs)
        rows = inputs["rollout"]
        loss, raw = self.rollout_reader.read_for_loss(
            [reader_loss.written[row] for row in rows.tolist()],
            inputs,
            lambda: policy_loss(model, inputs, *args, **kwargs),
            self.accelerator.autocast,
        )
        distance, accuracy = reader_loss(rows, raw, inputs["completion_mask"].any(dim=1))
        both = torch.stack([distance.detach(), accuracy]).unsqueeze(0)
        means = gather(both).nanmean(0).tolist()
        self.log_all({"reader_loss/loss": means[0], "reader_loss/accuracy": means[1]})
        return loss + reader_loss.weight * distance / self.current_gradient_accumulation_steps

    # -- using and saving it ---------------------------------

    def encoder(self) -> RationaleEncoder:
        """The policy as it is now, as an encoder."""
        return RationaleEncoder(
            self.accelerator.unwrap_model(self.model),
            self._tokenizer,
            self.prompt_template,
            self.reader,
            self.eos_token_ids,
            self.max_completion_length,
            roles=encoder_roles(self.args.roles, self._templates),
        )

    def save_extra_state(self, folder: Path) -> None:
        for name, state in self._extra_state().items():
            (folder / name).write_text(json.dumps(state), encoding="utf-8")

    def load_extra_state(self, folder: Path) -> None:
        self.reader.load(folder)
        rewards, shaping, anchors = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in self._extra_state()
        )
        self.runtime.load_state_dict(rewards)
        self.segmenter.load_state_dict(shaping["segmenter"])
        self.credit.load_state_dict(shaping["credit"])
        self.anchors.load_state_dict(anchors)

    def _extra_state(self) -> dict[str, dict[str, Any]]:
        shaping = {
            "segmenter": self.segmenter.state_dict(),
            "credit": self.credit.state_dict(),
        }
        return {
            "rewards.json": self.runtime.state_dict(),
            "shaping.json": shaping,
            "anchors.json": self.anchors.state_dict(),
        }


def _weighted(rewards: list[LoadedReward], weights: Sequence[float] | None) -> list[LoadedReward]:
    """Rewards with TRL's `reward_weights`, where those are given."""
    if weights is None:
        return rewards
    if len(weights) != len(rewards):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards")
    return [
        dataclasses.replace(reward, weight=float(w))
        for reward, w in zip(rewards, weights, strict=True)
    ]


def _named(label: str) -> Callable[..., Any]:
    """A stand-in with a name: TRL only reads the names, `_calculate_rewards` is ours."""

    def reward(**_: Any) -> Any:
        raise AssertionError("rewards are called by the runtime")

    reward.__name__ = label
    return reward
