"""GRPO on rationales: TRL's trainer, with rewards that see embeddings.

A batch goes through six rooms: it is generated, read, scored, given credit, and kept; the loss is
TRL's. One table (`grace_rl.rollout.rollouts.Rollouts`) goes through them and gets fuller.

What differs from TRL's `GRPOTrainer`:

- The data set holds rows (query, positive, negatives, or text). Their texts become prompts by role,
  a row's rollouts stay in one generation batch, and anchors (texts of untrained roles) are written
  along with them.
- Rewards get a `RewardBatch`: this process's rollouts with their embeddings, and every process's as
  a pool. In-context readers take the hidden states from the forward that TRL makes for the old
  log-probabilities; where TRL skips that forward, or the reader is the bottleneck, one pass over
  the decoder stack is added.
- Advantages come from a `Credit` (`grace_rl.credit`): by group, as TRL's, or where a reward scores
  every prefix of a rationale (`stepwise`) by segment, (B, T) instead of (B,).
- `reader_loss` adds a loss with a gradient through the reader (train/reader_loss.py).
- Rollouts, rewards and advantages are kept in the run directory.

What differs from GRACE (arXiv 2510.04506): any role can be rolled out, so that negatives move the
advantage (there they are constant within a group and cancel), and the loss, clipping and scaling
are TRL's.

The private methods of TRL that are used are pinned by tests/train/test_private_methods.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from grace_rl.credit.by_group import GroupCredit
from grace_rl.credit.by_segment import SegmentCredit, prefix_columns
from grace_rl.credit.calibration import shaping_metrics
from grace_rl.credit.credit import Credit
from grace_rl.credit.segments import check_shaping, step_labels
from grace_rl.data.bundles import Bundles, BundleSampler, parse_roles
from grace_rl.data.false_negatives import false_negative_config, load_false_negatives
from grace_rl.embed.diagnostics import collapse_metrics, distinct_n
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader, ReaderConfig
from grace_rl.errors import UserError
from grace_rl.reward import RewardRuntime
from grace_rl.reward.batch import reward_batch
from grace_rl.reward.loading import LoadedReward, RewardSpec, build_rewards, load_rewards
from grace_rl.reward.scores import with_scores
from grace_rl.reward.stored import FALSE_NEGATIVES, mask_settings
from grace_rl.rollout.columns import row_columns
from grace_rl.rollout.engines import GRPOTrainer, repair_weight_push, vllm_start
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.rollout.segments import Segmenter, sentence_end_test
from grace_rl.rollout.server import keep_server
from grace_rl.run.checkpoints import CheckpointMixin
from grace_rl.run.screen import Screen
from grace_rl.train.grpo_config import GraceGRPOConfig, check_batches
from grace_rl.train.keep import RolloutKeeper, check_first_batch, check_totals
from grace_rl.train.phases import PHASES, PhaseClock
from grace_rl.train.reader_loss import ReaderLoss, reader_loss_config
from grace_rl.train.rollout_reader import RolloutReader


class GraceGRPOTrainer(CheckpointMixin, GRPOTrainer):
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

    # TRL calls these optional, but they are set once its own `__init__` is through.
    model: nn.Module
    chat_template_kwargs: dict[str, Any]
    max_completion_length: int
    num_generations: int
    num_generations_eval: int
    shuffle_dataset: bool

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
        reader_config = ReaderConfig(**args.reader)
        roles = parse_roles(args.roles, args.num_generations or 0)
        self.rewards = _weighted(load_rewards(rewards, Path.cwd()), args.reward_weights)
        args.reward_weights = [reward.weight for reward in self.rewards]
        self._bundles = {"train": Bundles(list(train_dataset), roles)}
        if eval_dataset is not None:
            self._bundles["eval"] = Bundles(list(eval_dataset), roles)
        check_batches(args, self._bundles["train"], self.rewards)
        build_rewards(self.rewards)
        self.shaping = check_shaping(vars(args), self.rewards)
        self._reader_loss_config = reader_loss_config(vars(args))
        self._reader_loss: ReaderLoss | None = None  # of the batch of rollouts
        self.false_negatives = load_false_negatives(
            false_negative_config(args.false_negatives),
            [row for bundles in self._bundles.values() for row in bundles.rows],
            run_folder,
        )
        self.console = console or Screen()
        self._rollouts: Rollouts | None = None  # under way through TRL's methods
        self._anchor_count = 0  # of all processes
        self._clock = PhaseClock()

        with vllm_start(args.use_vllm):
            super().__init__(
                model=model,
                reward_funcs=[_named(reward.label) for reward in self.rewards],
                args=args,
                train_dataset=self._bundles["train"].dataset(),
                eval_dataset=self._bundles["eval"].dataset() if eval_dataset is not None else None,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                peft_config=peft_config,
            )
        self._set_up_engine()
        self._set_up_rooms(reader_config, run_folder)

    def _set_up_engine(self) -> None:
        """vLLM, where it writes: repaired, kept alive and timed."""
        if not self.use_vllm:
            return
        repair_weight_push(self.vllm_generation)
        if self.vllm_mode == "server":
            keep_server(self.vllm_generation, self.args.vllm_server_retry_timeout, self.console)
        generation: Any = self.vllm_generation  # mypy lets nothing replace a method
        generation.sync_weights = self._clock.wrapped("sync", generation.sync_weights)

    def _set_up_rooms(self, reader_config: ReaderConfig, run_folder: Path | None) -> None:
        """What a batch goes through, in its order."""
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        main = self.accelerator.is_main_process
        self.prompt_template = PromptTemplate(
            self._tokenizer, args.instruction, args.max_text_tokens, self.chat_template_kwargs
        )
        self._render = lru_cache(maxsize=65_536)(self.prompt_template.render)
        self.segmenter = Segmenter(
            args.segments, args.segment_min_tokens, sentence_end_test(self._tokenizer)
        )
        self.reader = Reader(
            reader_config, self._tokenizer, self.eos_token_ids, policy, self.accelerator.device
        )
        self._rollout_reader = RolloutReader(self.reader, policy, self._render)
        self.runtime = RewardRuntime(
            self.rewards,
            gather=gather,
            gather_object=lambda item: gather_object([item]),
            main_process=main,
        )
        self.runtime.start_from(policy.name_or_path)
        self.credit = self._make_credit()
        self._keeper = RolloutKeeper(run_folder, self.console, args.print_rollouts_steps, main)

    def _make_credit(self) -> Credit:
        if step_labels(self.rewards):
            return SegmentCredit(self.shaping, self.scale_rewards)
        return GroupCredit(
            self.scale_rewards, self.multi_objective_aggregation, self.args.reward_weights
        )

    # -- batches of whole bundles ---------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> BundleSampler:
        args = self.args
        return self._bundles["train"].sampler(
            "generation_batch_size",
            args.generation_batch_size,
            self.num_generations,
            self.num_iterations * args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> BundleSampler:
        return self._bundles["eval"].sampler(
            "per_device_eval_batch_size x processes",
            self.args.per_device_eval_batch_size * self.accelerator.num_processes,
            self.num_generations_eval,
            shuffle=False,
        )

    # -- a batch, from texts to advantages ---------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate, read and score, inside TRL's method by those below; then credit, and keep."""
        bundles = self._bundles[self._mode]
        texts = [bundles.prompts[item["prompt_number"]] for item in inputs]
        anchors = bundles.anchors_of(dict.fromkeys(gather_object([text.example for text in texts])))
        self._anchor_count, processes = len(anchors), self.accelerator.num_processes
        share = -(-len(anchors) // processes)
        anchors += anchors[:1] * (share * processes - len(anchors))
        first = self.accelerator.process_index * share
        self._rollouts = Rollouts.to_write(
            texts, anchors[first : first + share], self.accelerator.device
        )
        output = super()._generate_and_score_completions(inputs)
        rollouts = self._give_credit(self._under_way, output)
        if self._mode == "train":
            self._keeper.keep(rollouts, self.state, self.rewards)
        self._rollouts = None
        return output

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _under_way(self) -> Rollouts:
        """The batch that TRL's method is busy with; afterwards that of all processes."""
        if self._rollouts is None:
            raise RuntimeError("no batch of rollouts is under way")
        return self._rollouts

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def _own_rows(self, rollouts: Rollouts) -> slice:
        """This process's rollouts among all."""
        count = int(rollouts.trained.sum()) // self.accelerator.num_processes
        first = self.accelerator.process_index * count
        return slice(first, first + count)

    def _log_all(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    def _say(self, advice: str | None) -> None:
        if advice and self.accelerator.is_main_process:
            self.console.print(advice, style="yellow", highlight=False)

    # -- generate ---------------------------------

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._render(prompt).token_ids for prompt in prompts], None, {}

    def _generate_single_turn(  # type: ignore[override]  # has_tool_images: there are no tools
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int
    ) -> Any:
        """Write for this process's share of texts and anchors; TRL gets what it asked for."""
        rollouts, write = self._under_way, super()._generate_single_turn
        own, before = len(prompt_ids), self._clock.seconds["rollout"]
        prompts = [self._render(text) for text in rollouts.texts]
        ids = [prompt.token_ids for prompt in prompts]
        temperature = self.args.anchor_temperature
        apart = temperature is not None or (self.use_vllm and self.vllm_mode == "server")
        with self._clock("rollout"):
            if apart:
                written, logps = write(ids[:own], images, fields, num_generations)
                if ids[own:]:
                    with self._sampling_temperature(temperature):
                        written = written + write(ids[own:], images, fields, 1)[0]
            else:
                written, logps = write(ids, images, fields, num_generations)
            truncated = [row[-1] not in self.eos_token_ids for row in written]
            self._rollouts = dataclasses.replace(
                rollouts,
                prompts=[prompt.string for prompt in prompts],
                token_ids=written,
                rationales=self._tokenizer.batch_decode(written, skip_special_tokens=True),
                truncated=torch.tensor(truncated, device=rollouts.truncated.device),
                prefix_ends=self._prefix_ends(written, own),
            )
        seconds = self._clock.seconds["rollout"] - before
        tokens = sum(map(len, written)) * self.accelerator.num_processes
        self._log_metric("rollout/tokens_per_second", tokens / seconds)
        return written[:own], logps and logps[:own]

    @contextmanager
    def _sampling_temperature(self, temperature: float | None) -> Iterator[None]:
        holder = self.vllm_generation if self.use_vllm else self.generation_config
        usual = holder.temperature
        holder.temperature = usual if temperature is None else temperature
        try:
            yield
        finally:
            holder.temperature = usual

    def _prefix_ends(self, token_ids: list[list[int]], own: int) -> Tensor | None:
        """(B, K+1) ends of segments, by the typical length of all processes' rollouts; an anchor is
        one segment. None where no reward asks for prefixes."""
        if not any(reward.steps for reward in self.rewards):
            return None
        device = self.accelerator.device
        if self._mode == "train" or self.segmenter.typical_length is None:
            lengths = gather(torch.tensor([len(ids) for ids in token_ids[:own]], device=device))
            self.segmenter.follow(float(lengths.float().mean()))
        ends = [self.segmenter.ends(ids) for ids in token_ids[:own]]
        ends += [[len(ids)] * (self.segmenter.segments + 1) for ids in token_ids[own:]]
        return torch.tensor(ends, device=device)

    # -- read ---------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """TRL's forward; that for the old log-probabilities also feeds in-context readers."""
        usable = (
            self._rollouts is not None
            and not self._rollouts.embeddings.shape[1]
            and self._rollout_reader.shares_forwards
            and self._makes_old_logps
            and not self._rollout_reader.has_overheard  # a reference model's forward comes later
            and not self.mask_truncated_completions  # hides the rationale from attention
        )
        overhearing: AbstractContextManager[None] = nullcontext()
        if usable:
            overhearing = self._rollout_reader.overhearing(
                self._under_way, input_ids, logits_to_keep, kwargs.get("batch_size")
            )
        with overhearing:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    @property
    def _makes_old_logps(self) -> bool:
        """Whether TRL's first forward over rollouts is for their old log-probabilities."""
        args = self.args
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return True
        between = (args.steps_per_generation or 1) * self.num_iterations
        return args.gradient_accumulation_steps % between != 0

    def _read(self, rollouts: Rollouts) -> Rollouts:
        """This process's rollouts -> those of all, with their vectors and their rows' fields."""
        raw = self._rollout_reader.read(rollouts).gather(self._anchor_count, gather, gather_object)
        self.reader.update_centre(raw.embeddings.mean(0))
        rows, prefixes = self._bundles[self._mode].rows, raw.prefix_embeddings
        world = dataclasses.replace(
            raw,
            embeddings=self.reader.finish(raw.embeddings),
            prefix_embeddings=None if prefixes is None else self.reader.finish(prefixes),
            columns=row_columns([rows[example] for example in raw.example.tolist()]),
            step=self.state.global_step + 1,
            seed=self.args.seed,
        )
        metrics = distinct_n(world.token_ids) | collapse_metrics(
            world.embeddings, raw.embeddings, world.example
        )
        empty = [not rationale.strip() for rationale in world.trained_rows.rationales]
        self._log_all(metrics | {"rollouts/empty": sum(empty) / len(empty)})
        return world

    # -- score ---------------------------------

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[str],
        completions: list[str],
        completion_ids_list: Any,
    ) -> Tensor:
        """Read, gather, score: every process's rewards, (W, R), NaN = not scored."""
        with self._clock("embed"):
            world = self._read(self._under_way)
        with self._clock("reward"):
            batch = reward_batch(world, self._own_rows(world), self.false_negatives)
            trl = {
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            }
            scored = self.runtime.score(batch, trl)
        self._log_all(scored.metrics)
        self._rollouts = with_scores(world, self.rewards, scored, gather)
        check_totals(self._rollouts)
        if self._reader_loss_config is not None and self._mode == "train":
            written = self._rollout_reader.written(batch)
            self._reader_loss = ReaderLoss(self._reader_loss_config, self.reader, written, batch)
        if self.false_negatives is not None:
            own_share = torch.tensor([batch.masked_share()], device=world.example.device)
            share = gather(own_share).mean().item()
            self._log_all({"false_negatives/masked_share": share})
            self._say(self.false_negatives.watch(share))
        return scored.rewards

    # -- credit ---------------------------------

    def _give_credit(self, world: Rollouts, output: dict[str, Any]) -> Rollouts:
        """Settle `output["advantages"]`, (B,) or (B, T); the table with every process's."""
        rollouts = world.trained_rows
        if rollouts.step_scores is not None:
            self._log_all(shaping_metrics(*prefix_columns(rollouts)))
        notes = {"credit": self.credit.notes(self._progress)}
        if self.false_negatives is not None:
            notes[FALSE_NEGATIVES] = mask_settings(self.false_negatives)
        advantages = self.credit(rollouts, self._progress)
        output["advantages"] = like_completions(advantages[self._own_rows(world)], output)
        if self._mode == "train":
            self._say(self.credit.learn(rollouts))
            if self.state.global_step == 0:
                self._say(check_first_batch(advantages))
            if self._reader_loss is not None:
                output["rollout"] = torch.arange(
                    len(output["advantages"]), device=output["completion_ids"].device
                )
        return dataclasses.replace(world, notes=notes).with_advantages(advantages)

    # -- loss ---------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and `reader_loss` where the recipe asks for it."""
        policy_loss = super().compute_loss
        reader_loss = self._reader_loss
        if reader_loss is None or self._mode != "train":
            return policy_loss(model, inputs, *args, **kwargs)
        rows = inputs["rollout"]
        loss, raw = self._rollout_reader.read_for_loss(
            [reader_loss.written[row] for row in rows.tolist()],
            inputs,
            lambda: policy_loss(model, inputs, *args, **kwargs),
            self.accelerator.autocast,
        )
        distance, accuracy = reader_loss(rows, raw, inputs["completion_mask"].any(dim=1))
        both = torch.stack([distance.detach(), accuracy]).unsqueeze(0)
        means = gather(both).nanmean(0).tolist()
        self._log_all({"reader_loss/loss": means[0], "reader_loss/accuracy": means[1]})
        return loss + reader_loss.weight * distance / self.current_gradient_accumulation_steps

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock("train"):
            loss = super().training_step(*args, **kwargs)
        if self._step % self.current_gradient_accumulation_steps == 0:
            own = torch.tensor(self._clock.take(), device=self.accelerator.device)
            means = self.accelerator.reduce(own, reduction="mean").tolist()  # over processes
            times = zip(PHASES, means, strict=True)
            self._log_all({f"time/{phase}": seconds for phase, seconds in times})
        return loss

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
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.encoder().save_beside(Path(output_dir or self.args.output_dir))

    def save_extra_state(self, folder: Path) -> None:
        for name, state in self._extra_state().items():
            (folder / name).write_text(json.dumps(state), encoding="utf-8")

    def load_extra_state(self, folder: Path) -> None:
        self.reader.load(folder)
        rewards, shaping = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in self._extra_state()
        )
        self.runtime.load_state_dict(rewards)
        self.segmenter.load_state_dict(shaping["segmenter"])
        self.credit.load_state_dict(shaping["credit"])

    def _extra_state(self) -> dict[str, dict[str, Any]]:
        shaping = {
            "segmenter": self.segmenter.state_dict(),
            "credit": self.credit.state_dict(),
        }
        return {"rewards.json": self.runtime.state_dict(), "shaping.json": shaping}


def like_completions(values: Tensor, output: dict[str, Any]) -> Tensor:
    """This process's (B,) or (B, T) values, as wide as its completions and on their device."""
    mask = output["completion_mask"]
    if values.dim() == 2:
        missing = max(0, mask.size(1) - values.size(1))
        values = torch.nn.functional.pad(values, (0, missing))[:, : mask.size(1)]
    return values.to(mask.device)


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
