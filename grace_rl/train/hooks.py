"""TRL's GRPO trainer as six calls: where its private methods meet ours.

TRL's `_generate_and_score_completions` calls the methods below in the order of the file. Each
hands the batch on to a call of `grace_rl.train.grpo`: `generate`, `read`, `score`; then come
`give_credit` and `keep`. The private methods are pinned by tests/train/test_private_methods.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from grace_rl.data.bundles import Bundles, BundleSampler, RoleText
from grace_rl.rollout.engines import GRPOTrainer, repair_weight_push
from grace_rl.rollout.kept_server import keep_server
from grace_rl.rollout.prompts import Prompt
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.train.anchors import KeptAnchors, to_write
from grace_rl.train.grpo_config import GraceGRPOConfig
from grace_rl.train.phases import PHASES, PhaseClock
from grace_rl.train.policy_trainer import PolicyTrainer
from grace_rl.train.rollout_reader import RolloutReader

Write = Callable[[list[list[int]], int], tuple[list[list[int]], Any]]
"""Token ids of prompts and samples of each -> token ids and log-probabilities."""


class RolloutTrainer(PolicyTrainer, GRPOTrainer):
    """TRL's trainer around batches of whole bundles; see the module."""

    # TRL calls these optional, but they are set once its own `__init__` is through.
    args: GraceGRPOConfig  # type: ignore[assignment]
    model: nn.Module
    chat_template_kwargs: dict[str, Any]
    max_completion_length: int
    num_generations: int
    num_generations_eval: int
    shuffle_dataset: bool

    console: Console
    anchors: KeptAnchors
    bundles: dict[str, Bundles]
    clock: PhaseClock
    rollout_reader: RolloutReader
    render: Callable[[str, str], Prompt]
    _rollouts: Rollouts | None = None  # under way
    _anchor_count = 0  # of all processes

    def set_up_engine(self, console: Any) -> None:
        """vLLM, where it writes: repaired, kept alive and timed."""
        if not self.use_vllm:
            return
        repair_weight_push(self.vllm_generation)
        if self.vllm_mode == "server":
            keep_server(self.vllm_generation, self.args.vllm_server_retry_timeout, console)
        generation: Any = self.vllm_generation  # mypy lets nothing replace a method
        generation.sync_weights = self.clock.wrapped("sync", generation.sync_weights)

    # -- the six calls ---------------------------------

    def generate(self, rollouts: Rollouts, write: Write) -> tuple[Rollouts, Any]:
        """This process's texts -> what is written for them; and TRL's log-probabilities."""
        raise NotImplementedError

    def read(self, rollouts: Rollouts) -> Rollouts:
        """This process's rollouts -> those of all, with their vectors."""
        raise NotImplementedError

    def score(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor]:
        """All rollouts -> the same with their scores; and (W, R) rewards for TRL."""
        raise NotImplementedError

    def give_credit(self, rollouts: Rollouts, output: dict[str, Any]) -> Rollouts:
        """All rollouts -> the same with advantages, which are also put into TRL's output."""
        raise NotImplementedError

    def keep(self, rollouts: Rollouts) -> None:
        """Keep all rollouts of a training batch."""
        raise NotImplementedError

    # -- TRL's methods, in the order in which it calls them ---------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> BundleSampler:
        args = self.args
        return self.bundles["train"].sampler(
            "generation_batch_size",
            args.generation_batch_size or 0,
            self.num_generations,
            self.num_iterations * (args.steps_per_generation or 1),
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> BundleSampler:
        return self.bundles["eval"].sampler(
            "per_device_eval_batch_size x processes",
            self.args.per_device_eval_batch_size * self.accelerator.num_processes,
            self.num_generations_eval,
            shuffle=False,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock("train"):
            loss = super().training_step(*args, **kwargs)
        if self._step % self.current_gradient_accumulation_steps == 0:
            own = torch.tensor(self.clock.take(), device=self.accelerator.device)
            means = self.accelerator.reduce(own, reduction="mean").tolist()  # over processes
            times = zip(PHASES, means, strict=True)
            self.log_all({f"time/{phase}": seconds for phase, seconds in times})
        return loss

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        bundles = self.bundles[self.mode]
        texts = [bundles.prompts[item["prompt_number"]] for item in inputs]
        anchors = bundles.anchors_of(dict.fromkeys(gather_object([t.example for t in texts])))
        self._rollouts = self._to_write(texts, anchors)
        output = super()._generate_and_score_completions(inputs)
        rollouts = self.give_credit(self._under_way, output)
        if self.mode == "train":
            self.keep(rollouts)
        self._rollouts = None
        return output

    def _to_write(self, texts: list[RoleText], anchors: list[RoleText]) -> Rollouts:
        """This process's texts, its share of the anchors to write, and of those that are kept."""
        self._anchor_count, processes = len(anchors), self.accelerator.num_processes
        known: list[list[int]] = [[] for _ in anchors]
        if self.mode == "train":
            known = self.anchors.known(anchors, self.state.global_step + 1)
        new, kept = (self._own_share(part, processes) for part in to_write(known, processes))
        rows = [anchors[i] for i in new + kept]
        rollouts = Rollouts.to_write(texts, rows, self.accelerator.device)
        ids: list[list[int]] = [[]] * (len(texts) + len(new)) + [known[i] for i in kept]
        return dataclasses.replace(rollouts, token_ids=ids)

    def _own_share(self, numbers: list[int], processes: int) -> list[int]:
        share = len(numbers) // processes
        first = self.accelerator.process_index * share
        return numbers[first : first + share]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        own = zip(prompts, self._under_way.roles, strict=False)  # which come before the anchors
        return [self.render(*text).token_ids for text in own], None, {}

    def _generate_single_turn(  # type: ignore[override]  # has_tool_images: there are no tools
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int
    ) -> Any:
        trls, own, tokens = super()._generate_single_turn, len(prompt_ids), 0
        before = self.clock.seconds["rollout"]

        def write(prompts: list[list[int]], samples: int) -> tuple[list[list[int]], Any]:
            nonlocal tokens
            with nullcontext() if self.use_vllm else self.rollout_reader.while_writing():
                ids, logps = trls(prompts, images, fields, samples)
            tokens += sum(map(len, ids))
            return ids, logps

        with self.clock("rollout"):
            self._rollouts, logps = self.generate(self._under_way, write)
        written = self._rollouts.token_ids
        seconds = self.clock.seconds["rollout"] - before
        per_second = tokens * self.accelerator.num_processes / seconds
        self._log_metric("rollout/tokens_per_second", per_second)
        return written[:own], logps and logps[:own]

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
        overhearing: AbstractContextManager[None] = nullcontext()
        if self._could_overhear:
            overhearing = self.rollout_reader.overhearing(
                self._under_way, input_ids, logits_to_keep, kwargs.get("batch_size")
            )
        with overhearing:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    @property
    def _could_overhear(self) -> bool:
        """Whether the next forward is TRL's first over these rollouts, and shows what is read."""
        args = self.args
        between = (args.steps_per_generation or 1) * self.num_iterations
        old_logps = args.gradient_accumulation_steps % between != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )
        return bool(
            self._rollouts is not None
            and not self._rollouts.embeddings.shape[1]
            and self.rollout_reader.shares_forwards
            and old_logps  # else the first forward is a reference model's
            and self.rollout_reader.needs_a_forward
            and not self.mask_truncated_completions  # hides the rationale from attention
        )

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[str],
        completions: list[str],
        completion_ids_list: Any,
    ) -> Tensor:
        """Every process's rewards, (W, R), NaN = not scored."""
        with self.clock("embed"):
            world = self.read(self._under_way)
        with self.clock("reward"):
            self._rollouts, rewards = self.score(world)
        return rewards

    # -- for all of them ---------------------------------

    @property
    def mode(self) -> str:
        """`train` or `eval`, as TRL names them."""
        return "train" if self.model.training else "eval"

    @property
    def progress(self) -> float:
        """The share of training that is over."""
        return self.state.global_step / max(1, self.state.max_steps)

    @property
    def _under_way(self) -> Rollouts:
        """The batch that TRL's method is busy with; from `read` on that of all processes."""
        if self._rollouts is None:
            raise RuntimeError("no batch of rollouts is under way")
        return self._rollouts

    def own_rows(self, rollouts: Rollouts) -> slice:
        """This process's rollouts among all."""
        count = int(rollouts.trained.sum()) // self.accelerator.num_processes
        first = self.accelerator.process_index * count
        return slice(first, first + count)

    def log_all(self, metrics: dict[str, float]) -> None:
        """Metrics that are the same on every process."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    @contextmanager
    def sampling_temperature(self, temperature: float | None) -> Iterator[None]:
        """Within it, whatever writes uses this temperature; None is the usual one."""
        holder = self.vllm_generation if self.use_vllm else self.generation_config
        usual = holder.temperature
        holder.temperature = usual if temperature is None else temperature
        try:
            yield
        finally:
            holder.temperature = usual


def like_completions(values: Tensor, output: dict[str, Any]) -> Tensor:
    """This process's (B,) or (B, T) values, as wide as its completions and on their device."""
    mask = output["completion_mask"]
    if values.dim() == 2:
        missing = max(0, mask.size(1) - values.size(1))
        values = torch.nn.functional.pad(values, (0, missing))[:, : mask.size(1)]
    return values.to(mask.device)
