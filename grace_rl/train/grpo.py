"""GRPO on rationales: TRL's trainer, with rewards that see embeddings.

What differs from TRL's `GRPOTrainer`:

- The data set holds rows (query, positive, negatives, or text). Their texts become prompts by role,
  a row's rollouts stay in one generation batch, and anchors (texts of untrained roles) are written
  along with them.
- Rewards get a `RewardBatch`: this process's rollouts with their embeddings, and every process's as
  a pool. In-context readers take the hidden states from the forward that TRL makes for the old
  log-probabilities; where TRL skips that forward, or the reader is the bottleneck, one pass over
  the decoder stack is added.
- A reward that scores every prefix of a rationale (`stepwise`) gives each segment an advantage
  of its own, (B, T) instead of (B,); `grace_rl.credit.segments` has the mathematics. The embeddings
  of prefixes come from the forwards that are made anyway.
- `reader_loss` adds a loss with a gradient through the reader (train/reader_loss.py).
- Rollouts, rewards and advantages are kept in the run directory.

What differs from GRACE (arXiv 2510.04506): any role can be rolled out, so that negatives move the
advantage (there they are constant within a group and cancel), and the loss, clipping and scaling
are TRL's.

Overridden private methods of TRL 1.16, each tested by name: `_get_train_sampler`,
`_get_eval_sampler`, `_generate_and_score_completions`, `_tokenize_prompts`,
`_generate_single_turn`, `_get_per_token_logps_and_entropies`, `_calculate_rewards`; and the public
`compute_loss`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from grace_rl.credit.segments import (
    Calibration,
    beta_advice,
    check_shaping,
    faded_penalty,
    shape_advantages,
    shaping_metrics,
    step_labels,
    to_tokens,
)
from grace_rl.data.bundles import Bundles, BundleSampler, parse_roles
from grace_rl.data.false_negatives import false_negative_config, load_false_negatives
from grace_rl.embed.diagnostics import collapse_metrics, distinct_n
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.reader import Reader, ReaderConfig, Written
from grace_rl.errors import UserError
from grace_rl.reward import Pool, RewardBatch
from grace_rl.reward.loading import LoadedReward, RewardSpec, load_rewards
from grace_rl.reward.runtime import RewardRuntime, weighted_totals
from grace_rl.rollout.engines import GRPOTrainer, repair_weight_push, vllm_start
from grace_rl.rollout.prompts import PromptTemplate
from grace_rl.rollout.rollouts import row_columns
from grace_rl.rollout.segments import Segmenter, sentence_end_test
from grace_rl.rollout.server import keep_server
from grace_rl.rollout.store import write_rollouts
from grace_rl.run.checkpoints import CheckpointMixin
from grace_rl.train.callbacks import print_group
from grace_rl.train.generation_batch import (
    GenerationBatch,
    StepTable,
    rollout_columns,
    rollout_fields,
    row_means,
    step_scores,
    stored_columns,
    token_advantages,
)
from grace_rl.train.grpo_config import GraceGRPOConfig, check_batches
from grace_rl.train.reader_loss import ReaderLoss, reader_loss_config
from grace_rl.train.rollout_reader import RolloutReader

PHASES = ("rollout", "embed", "reward", "train", "sync")
ADVICE_BATCHES = 10  # the calibration is judged once it has seen so many


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
        assert args.num_generations is not None  # TRL's config compares it with 2
        roles = parse_roles(args.roles, args.num_generations)
        self.rewards = _weighted(load_rewards(rewards, Path.cwd()), args.reward_weights)
        args.reward_weights = [reward.weight for reward in self.rewards]
        self._bundles = {"train": Bundles(list(train_dataset), roles)}
        if eval_dataset is not None:
            self._bundles["eval"] = Bundles(list(eval_dataset), roles)
        check_batches(args, self._bundles["train"], self.rewards)
        self.shaping = check_shaping(vars(args), self.rewards)
        self._contrastive_loss_config = reader_loss_config(vars(args))
        self._contrastive_loss: ReaderLoss | None = None  # of the batch of rollouts
        self.false_negatives = load_false_negatives(
            false_negative_config(args.false_negatives),
            [row for bundles in self._bundles.values() for row in bundles.rows],
            run_folder,
        )
        self.calibration = Calibration()
        self.run_folder = run_folder
        self.console = console or Console()
        self._batch: GenerationBatch | None = None
        self._phases: dict[str, float] = defaultdict(float)

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
        if self.use_vllm:
            repair_weight_push(self.vllm_generation)
            if self.vllm_mode == "server":
                keep_server(self.vllm_generation, args.vllm_server_retry_timeout, self.console)
            generation: Any = self.vllm_generation  # mypy lets nothing replace a method
            generation.sync_weights = self._timed("sync", generation.sync_weights)
        self.prompt_template = PromptTemplate(
            self._tokenizer, args.instruction, args.max_text_tokens, self.chat_template_kwargs
        )
        self.segmenter = Segmenter(
            args.segments, args.segment_min_tokens, sentence_end_test(self._tokenizer)
        )
        self._render = lru_cache(maxsize=65_536)(self.prompt_template.render)
        policy = self.accelerator.unwrap_model(self.model)
        for reward in self.rewards:
            if hasattr(reward.function, "start_from"):
                reward.function.start_from(policy.name_or_path)
        self.reader = Reader(
            reader_config, self._tokenizer, self.eos_token_ids, policy, self.accelerator.device
        )
        self._rollout_reader = RolloutReader(self.reader, policy)
        self.runtime = RewardRuntime(
            self.rewards,
            gather=gather,
            gather_object=lambda item: gather_object([item]),
            main_process=self.accelerator.is_main_process,
        )

    # -- batches of whole bundles ---------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> BundleSampler:
        bundles = self._bundles["train"]
        assert self.args.steps_per_generation is not None  # TRL's config has worked it out
        return BundleSampler(
            rows=len(bundles.rows),
            texts_per_row=len(bundles.trained),
            samples=self.num_generations,
            rows_per_batch=self.args.generation_batch_size
            // (len(bundles.trained) * self.num_generations),
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> BundleSampler:
        bundles = self._bundles["eval"]
        bundle_size = len(bundles.trained) * self.num_generations_eval
        batch_size = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        if batch_size % bundle_size:
            raise UserError(
                f"per_device_eval_batch_size x processes = {batch_size} must be a multiple of "
                f"trained roles x num_generations_eval = {bundle_size}"
            )
        return BundleSampler(
            rows=len(bundles.rows),
            texts_per_row=len(bundles.trained),
            samples=self.num_generations_eval,
            rows_per_batch=batch_size // bundle_size,
            repeat_count=1,
            shuffle=False,
        )

    # -- writing rationales ---------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        bundles = self._bundles["train" if self.model.training else "eval"]
        texts = [bundles.prompts[item["prompt_number"]] for item in inputs]
        examples = dict.fromkeys(gather_object([text.example for text in texts]))
        anchors = [
            text
            for example in examples
            for text, samples in bundles.anchors[example]
            for _ in range(samples)
        ]
        share = -(-len(anchors) // self.accelerator.num_processes)
        padded = anchors + anchors[:1] * (share * self.accelerator.num_processes - len(anchors))
        first = self.accelerator.process_index * share
        self._batch = GenerationBatch(texts, padded[first : first + share], len(anchors))
        output = super()._generate_and_score_completions(inputs)
        if self._batch.ends is not None:
            self._batch.steps = self._step_table(self._batch)
        self._assign_credit(self._batch, output)
        if self._contrastive_loss is not None:
            output["rollout"] = torch.arange(len(texts), device=output["completion_ids"].device)
        if self.model.training:
            self._keep_rollouts(self._batch, output)
        self._batch = None
        return output

    def _assign_credit(self, batch: GenerationBatch, output: dict[str, Any]) -> None:
        """Settle `output["advantages"]`: TRL's (B,), or (B, T) where a reward scores steps."""
        if not step_labels(self.rewards):
            return
        assert batch.steps is not None
        scores, ends, totals, group = batch.steps
        fitted = self.calibration if self.shaping.calibrate else Calibration()
        credit = shape_advantages(
            scores,
            ends,
            totals,
            group,
            gae_lambda=self.shaping.gae_lambda,
            slopes=fitted.slopes,
            intercepts=fitted.intercepts,
            penalty=faded_penalty(
                self.shaping.penalty, self.state.global_step / max(1, self.state.max_steps)
            ),
            margin=self.shaping.margin,
            scale=self.scale_rewards,
        )
        if self.model.training:  # fitted after use: no rollout has a say in its own baseline
            self.calibration.update(scores, ends, group)
            self._advise()
        own = self._own_rows(batch)
        advantages = to_tokens(credit[own], ends[own], output["completion_mask"].size(1))
        output["advantages"] = advantages.to(output["advantages"].device)

    def _step_table(self, batch: GenerationBatch) -> StepTable:
        """What all processes' rollouts score step by step, logged also where it is only watched."""
        assert batch.scored is not None and batch.ends is not None
        rewards = batch.scored.rewards
        totals = weighted_totals(rewards, self.runtime.weights.to(rewards.device))
        scores = gather(step_scores(self.rewards, batch.scored)).cpu()
        ends = gather(batch.ends.to(rewards.device)).cpu()
        group = batch.scored.group.cpu()
        for name, value in shaping_metrics(scores, ends, group).items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return StepTable(scores, ends, totals.cpu(), group)

    def _own_rows(self, batch: GenerationBatch) -> slice:
        """This process's rollouts among all."""
        first = self.accelerator.process_index * len(batch.texts)
        return slice(first, first + len(batch.texts))

    def _advise(self) -> None:
        """Say once, when the calibration has settled, that prefixes predict too little."""
        slopes = self.calibration.slopes
        if slopes is None or self.calibration.batches != ADVICE_BATCHES:
            return
        advice = beta_advice(slopes, self.shaping)
        if advice and self.accelerator.is_main_process:
            self.console.print(advice, style="yellow", highlight=False)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        assert self._batch is not None
        self._batch.prompts = [self._render(prompt) for prompt in prompts]
        return [prompt.token_ids for prompt in self._batch.prompts], None, {}

    def _generate_single_turn(  # type: ignore[override]  # has_tool_images: there are no tools
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int
    ) -> Any:
        batch = self._batch
        assert batch is not None
        start, synced = time.perf_counter(), self._phases["sync"]
        anchor_ids = [self._render(anchor.text).token_ids for anchor in batch.anchors]
        own_temperature = self.args.anchor_temperature
        if own_temperature is None and not (self.use_vllm and self.vllm_mode == "server"):
            ids, logps = super()._generate_single_turn(
                prompt_ids + anchor_ids, images, fields, num_generations
            )
            batch.token_ids, batch.anchor_token_ids = ids[: len(prompt_ids)], ids[len(prompt_ids) :]
            logps = logps and logps[: len(prompt_ids)]
        else:
            batch.token_ids, logps = super()._generate_single_turn(
                prompt_ids, images, fields, num_generations
            )
            if anchor_ids:
                with self._sampling_temperature(own_temperature):
                    batch.anchor_token_ids, _ = super()._generate_single_turn(
                        anchor_ids, images, fields, 1
                    )
        if any(reward.steps for reward in self.rewards):
            batch.ends = self._segment(batch.token_ids)
        seconds = time.perf_counter() - start - (self._phases["sync"] - synced)
        self._phases["rollout"] += seconds
        written = sum(map(len, batch.token_ids)) + sum(map(len, batch.anchor_token_ids))
        self._log_metric(
            "rollout/tokens_per_second", written * self.accelerator.num_processes / seconds
        )
        return batch.token_ids, logps

    @contextmanager
    def _sampling_temperature(self, temperature: float | None) -> Iterator[None]:
        holder = self.vllm_generation if self.use_vllm else self.generation_config
        usual = holder.temperature
        holder.temperature = usual if temperature is None else temperature
        try:
            yield
        finally:
            holder.temperature = usual

    # -- reading them ---------------------------------

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
        forward = super()._get_per_token_logps_and_entropies
        batch = self._batch
        usable = (
            batch is not None
            and batch.raw is None
            and model is self.model
            and self._rollout_reader.shares_forwards
            and not torch.is_grad_enabled()
            and not self.mask_truncated_completions  # hides the rationale from attention
        )
        if not usable:
            return forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        assert batch is not None
        written = [
            Written(prompt, ids, "")
            for prompt, ids in zip(batch.prompts, batch.token_ids, strict=True)
        ]
        with self._rollout_reader.during_forward(
            written, input_ids, logits_to_keep, batch.ends, kwargs.get("batch_size")
        ) as vectors:
            output = forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        batch.raw = torch.cat(vectors)
        return output

    # -- scoring them ---------------------------------

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[str],
        completions: list[str],
        completion_ids_list: Any,
    ) -> Tensor:
        """Embed, gather the pool, score: every process's rewards, (W, R), NaN = not scored."""
        batch = self._batch
        assert batch is not None
        start = time.perf_counter()
        written = [
            Written(*item) for item in zip(batch.prompts, batch.token_ids, completions, strict=True)
        ]
        rationales = [
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in batch.anchor_token_ids
        ]
        anchors = [
            Written(self._render(text.text), ids, rationale)
            for text, ids, rationale in zip(
                batch.anchors, batch.anchor_token_ids, rationales, strict=True
            )
        ]
        if batch.raw is None:
            read, raw_anchors = self._rollout_reader.apart(written, anchors, batch.ends)
        else:
            read = batch.raw
            raw_anchors = self.reader.read(anchors) if anchors else read.new_empty(0, read.size(-1))
        raw = read if batch.ends is None else read[:, -1]
        world_raw = torch.cat([gather(raw), gather(raw_anchors)[: batch.anchor_count]])
        self.reader.update_centre(world_raw.mean(0))
        fields = rollout_fields(batch.texts, written, self.eos_token_ids)
        anchor_fields = rollout_fields(batch.anchors, anchors, self.eos_token_ids)
        world = gather_object(fields) + gather_object(anchor_fields)[: batch.anchor_count]
        batch.pool = Pool(
            **rollout_columns(world, self.reader.finish(world_raw)),
            false_negatives=self.false_negatives,
        )
        self._phases["embed"] += time.perf_counter() - start

        start = time.perf_counter()
        mode = "train" if self.model.training else "eval"
        seen = RewardBatch(
            **rollout_columns(fields, self.reader.finish(raw)),
            prompts=[item.prompt.string for item in written],
            prefix_embeddings=None if batch.ends is None else self.reader.finish(read),
            prefix_ends=None if batch.ends is None else batch.ends.to(raw.device),
            columns=row_columns([self._bundles[mode].rows[text.example] for text in batch.texts]),
            pool=batch.pool,
            step=self.state.global_step + 1,
            seed=self.args.seed,
        )
        batch.scored = self.runtime.score(
            seen,
            {
                "trainer_state": self.state,
                "log_extra": self._log_completion_extra,
                "log_metric": self._log_metric,
            },
        )
        self._phases["reward"] += time.perf_counter() - start
        if self._contrastive_loss_config is not None and mode == "train":
            self._contrastive_loss = ReaderLoss(
                self._contrastive_loss_config, self.reader, written, seen
            )
        metrics = batch.scored.metrics | distinct_n(batch.pool.token_ids)
        metrics |= collapse_metrics(batch.pool.embeddings, world_raw, batch.pool.example)
        if self.false_negatives is not None:
            share = gather(torch.tensor([seen.masked_share()], device=raw.device)).mean().item()
            metrics["false_negatives/masked_share"] = share
            advice = self.false_negatives.watch(share)
            if advice and self.accelerator.is_main_process:
                self.console.print(advice, style="yellow", highlight=False)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        return batch.scored.rewards

    def _segment(self, token_ids: list[list[int]]) -> Tensor:
        """(B, K+1) ends of segments, by the typical length of all processes' rollouts."""
        if self.model.training or self.segmenter.typical_length is None:
            lengths = gather(torch.tensor([len(ids) for ids in token_ids], device=self.args.device))
            self.segmenter.follow(float(lengths.float().mean()))
        return torch.tensor([self.segmenter.ends(ids) for ids in token_ids])

    # -- learning to read them ---------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and `reader_loss` where the recipe asks for it.

        An in-context reader takes the hidden states from the forward that TRL makes for the loss;
        the bottleneck needs one more, over the rationales alone.
        """
        contrast = self._contrastive_loss
        if contrast is None or not self.model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        rows = inputs["rollout"]
        written = [contrast.written[row] for row in rows.tolist()]
        if self._rollout_reader.shares_forwards:
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            with self._rollout_reader.during_forward(
                written, tokens, inputs["completion_ids"].size(1)
            ) as vectors:
                loss = super().compute_loss(model, inputs, *args, **kwargs)
            raw = torch.cat(vectors)
        else:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            with self.accelerator.autocast():
                raw = self.reader.read(written, gradient=True)
        visible = inputs["completion_mask"].any(dim=1)
        distance, accuracy = contrast(rows, raw, visible)
        found = gather(torch.stack([distance.detach(), accuracy]).unsqueeze(0)).nanmean(0).tolist()
        for name, value in zip(("loss", "accuracy"), found, strict=True):
            self._metrics["train"][f"reader_loss/{name}"].append(value)
        return loss + contrast.weight * distance / self.current_gradient_accumulation_steps

    # -- keeping and reporting them ---------------------------------

    def _keep_rollouts(self, batch: GenerationBatch, output: dict[str, Any]) -> None:
        """Store the rollouts and anchors of a logged step; now and then print a group.

        Both are those of every process.
        """
        step = self.state.global_step + 1
        every = self.args.print_rollouts_steps
        logged = step % max(1, int(self.state.logging_steps)) == 0
        logged = logged or (step == 1 and self.args.logging_first_step)
        printed = every > 0 and (step % every == 0 or step == 1)
        if not (logged or printed):
            return
        advantages = gather(row_means(output))
        by_token = gather_object(token_advantages(batch, output["advantages"]))
        if not self.accelerator.is_main_process:
            return
        columns = stored_columns(batch, self.rewards, advantages, by_token)
        if logged and self.run_folder is not None:
            write_rollouts(self.run_folder, step, columns)
        if printed:
            chosen = [i for i, group in enumerate(columns["group"]) if group == columns["group"][0]]
            chosen = [i for i in chosen if columns["advantage"][i] is not None]
            rows = [{name: values[i] for name, values in columns.items()} for i in chosen]
            print_group(self.console, rows, [reward.label for reward in self.rewards])

    def _timed(self, phase: str, function: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> Any:
            start = time.perf_counter()
            try:
                return function()
            finally:
                self._phases[phase] += time.perf_counter() - start

        return timed

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        start, before = time.perf_counter(), sum(self._phases.values())
        loss = super().training_step(*args, **kwargs)
        others = sum(self._phases.values()) - before
        self._phases["train"] += time.perf_counter() - start - others
        if self._step % self.current_gradient_accumulation_steps == 0:
            own = torch.tensor([self._phases[p] for p in PHASES], device=self.accelerator.device)
            means = self.accelerator.reduce(own, reduction="mean").tolist()  # over processes
            for phase, seconds in zip(PHASES, means, strict=True):
                self._metrics["train"][f"time/{phase}"].append(seconds)
            self._phases.clear()
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
        (folder / "rewards.json").write_text(
            json.dumps(self.runtime.state_dict()), encoding="utf-8"
        )
        shaping = {
            "segmenter": self.segmenter.state_dict(),
            "calibration": self.calibration.state_dict(),
        }
        (folder / "shaping.json").write_text(json.dumps(shaping), encoding="utf-8")

    def load_extra_state(self, folder: Path) -> None:
        self.reader.load(folder)
        self.runtime.load_state_dict(
            json.loads((folder / "rewards.json").read_text(encoding="utf-8"))
        )
        shaping = json.loads((folder / "shaping.json").read_text(encoding="utf-8"))
        self.segmenter.load_state_dict(shaping["segmenter"])
        self.calibration.load_state_dict(shaping["calibration"])


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
