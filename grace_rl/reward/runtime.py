"""Running the rewards of one batch: the one place where a reward's exception is caught.

Every process scores its own rollouts; afterwards all processes know all values, or all of them
raise the same error. What TRL then does with the result (weights, nansum, advantages) is unchanged:
gates and rows that one reward could not score are settled inside the returned columns.
"""

from __future__ import annotations

import inspect
import math
import types
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grace_rl.errors import UserError, describe_error
from grace_rl.reward.batch import RewardBatch
from grace_rl.reward.calls import Calls
from grace_rl.reward.loading import LoadedReward, build_rewards
from grace_rl.reward.outputs import (
    CheckedOutput,
    failed_margin,
    read_output,
    unscored_output,
    without_infinities,
)
from grace_rl.reward.totals import apply_gates, weighted_totals
from grace_rl.rollout.groups import fill_unscored, group_stds
from grace_rl.run.printing import shown
from grace_rl.run.zero import outside_zero3

__all__ = ["RewardError", "RewardRuntime", "Scored", "weighted_totals"]

FLAT_BATCHES = 10  # a weighted reward that is flat for so many batches in a row is named once


class RewardError(UserError):
    """A reward with `on_error: raise` failed; the same text on every process."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What the trainer needs, for the W trained rollouts of all processes in world order.

    Args:
        rewards: (W, R) float32, so that the weighted nansum over R is the total: gates applied, and
            a row that one reward did not score holds this reward's group mean, which moves it
            neither up nor down (NaN where nobody in the group, or nothing in the row, is scored).
        values: (W, R) float32, as the rewards returned them; NaN = not scored.
        group: (W,) long.
        components: `label/component` -> (W,), for the log.
        steps: label -> (B, K+1) scores of prefixes, this process's rows only.
        metrics: `rewards/<label>/...` -> finite number, equal on every process; a mean or deviation
            of nothing is left out.
    """

    rewards: Tensor
    values: Tensor
    group: Tensor
    components: dict[str, Tensor]
    steps: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Report:
    """What every process tells the others before any tensor is gathered; one entry per reward."""

    errors: list[str | None]
    nonfinite: list[int] = field(default_factory=list)
    components: list[str] = field(default_factory=list)


class RewardRuntime:
    """Scores batches with a list of rewards, on one process or on many.

    Rewards are called in threads of their own (`grace_rl.reward.calls`), without gradient.

    Args:
        rewards: From `load_rewards`; built here if they are not.
        gather: (B, ...) tensor of this process -> (W, ...) tensor of all, in world order.
        gather_object: An object of this process -> the list of every process's object.
        main_process: Only this process warns.

    Raises:
        UserError: There are no rewards, or one cannot be built.
    """

    def __init__(
        self,
        rewards: Sequence[LoadedReward],
        *,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        gather_object: Callable[[Any], list[Any]] = lambda item: [item],
        main_process: bool = True,
    ) -> None:
        if not rewards:
            raise UserError("rewards: name at least one reward")
        build_rewards(rewards)
        self.rewards = list(rewards)
        self.labels = [reward.label for reward in self.rewards]
        self.weights = torch.tensor([reward.weight for reward in self.rewards])  # (R,)
        self.gates = [r.label for r in self.rewards if r.gates and r.weight != 0]
        self._calls = Calls()
        self._gather = gather
        self._gather_object = gather_object
        self._main_process = main_process
        self._flat_batches = dict.fromkeys(self.labels, 0)
        self._warned: set[str] = set()
        self._not_started: set[str] = set()
        self._policy = ""

    def start_from(self, policy: str) -> None:
        """Tell the rewards that have a method `start_from` where the policy was loaded from.

        Every process calls it together, before the first batch. A reward that fails here and
        abstains is told again with each batch, until it succeeds.

        Raises:
            RewardError: As `score`.
        """
        self._policy, self._not_started = policy, set(self.labels)
        outcomes = self._outcomes(self._start, lambda reward, result: None)
        self._agree("before the first step", outcomes)

    def score(
        self, batch: RewardBatch, trainer_arguments: Mapping[str, Any] | None = None
    ) -> Scored:
        """Score one batch; every process calls it together.

        Args:
            batch: This process's rollouts; the same number on every process.
            trainer_arguments: What only plain TRL functions get; TRL's trainer gives trainer_state,
                log_extra and log_metric. Without it trainer_state knows the step only.

        Raises:
            RewardError: A reward with `on_error: raise` failed on any process.
        """
        outcomes = self._call_all(batch, trainer_arguments)
        rows = sorted(set(batch.example.tolist()))
        numbers = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        reports = self._agree(f"at step {batch.step}, data rows {numbers}", outcomes)
        self._warn_of_infinities(reports, batch.step)
        outputs = [
            outcome if isinstance(outcome, CheckedOutput) else unscored_output(reward, batch)
            for reward, outcome in zip(self.rewards, outcomes, strict=True)
        ]
        values = self._gather(torch.stack([output.values for output in outputs], dim=1))
        group = self._gather(batch.group)
        components = self._gather_components(outputs, reports, len(batch))
        rewards = fill_unscored(values, group)
        metrics = self._counts(reports, values)
        if self.gates:
            failed = self._gather(torch.stack([failed_margin(o) for o in outputs], dim=1))
            rewards = apply_gates(rewards, failed, self.weights.to(values.device), group)
            for i, reward in enumerate(self.rewards):
                if reward.gates:
                    share = float((failed[:, i] > 0).float().mean())
                    metrics[f"rewards/{reward.label}/gated"] = share
        for name, column in components.items():
            metrics[f"rewards/{name}"] = float(column.nanmean())
        for i, label in enumerate(self.labels):
            scored = rewards[:, i]
            if label not in self.gates:  # a filled-in mean is not a score
                scored = scored.where(~values[:, i].isnan(), torch.nan)
            std = group_stds(scored, group)
            metrics[f"rewards/{label}/within_group_std"] = float(std.nanmean())
            self._watch_variance(i, scored, std)
        return Scored(
            rewards=rewards,
            values=values,
            group=group,
            components=components,
            steps={
                label: output.steps
                for label, output in zip(self.labels, outputs, strict=True)
                if output.steps is not None
            },
            metrics={name: value for name, value in metrics.items() if not math.isnan(value)},
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to warn as if it had never stopped."""
        return {"flat_batches": dict(self._flat_batches), "warned": sorted(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; rewards that it does not know start at zero."""
        for label in self.labels:
            self._flat_batches[label] = state["flat_batches"].get(label, 0)
        self._warned = set(state["warned"])

    def _start(self, reward: LoadedReward) -> None:
        if reward.label in self._not_started:
            start_from = getattr(reward.function, "start_from", None)
            if start_from is not None:
                start_from(self._policy)
            self._not_started.discard(reward.label)

    def _call_all(
        self, batch: RewardBatch, trainer_arguments: Mapping[str, Any] | None
    ) -> list[Any]:
        """Every reward's `CheckedOutput`, or its exception."""
        if trainer_arguments is None:
            trainer_arguments = {
                "trainer_state": types.SimpleNamespace(global_step=batch.step),
                "log_extra": lambda column, values: None,
                "log_metric": lambda name, value: None,
            }

        def call(reward: LoadedReward) -> Any:
            if batch.embeddings.is_cuda:
                torch.cuda.set_device(batch.embeddings.device)  # of this thread
            self._start(reward)
            return reward(batch.apart(), trainer_arguments)

        def read(reward: LoadedReward, result: Any) -> CheckedOutput:
            return without_infinities(read_output(result, reward, batch))

        return self._outcomes(call, read)

    @outside_zero3()
    def _outcomes(
        self, call: Callable[[LoadedReward], Any], read: Callable[[LoadedReward, Any], Any]
    ) -> list[Any]:
        """The error boundary: what `read` makes of what `call` returns or waits for, or why not."""

        def attempt(reward: LoadedReward) -> Any:
            try:
                result = call(reward)
                return (
                    finish(reward, result) if inspect.isawaitable(result) else read(reward, result)
                )
            except BaseException as error:  # Ctrl-C is none: it reaches the main thread only
                return error

        async def finish(reward: LoadedReward, waited_for: Awaitable[Any]) -> Any:
            try:
                return read(reward, await waited_for)
            except BaseException as error:
                return error

        outcomes: list[Any] = []
        for reward in self.rewards:
            try:
                result = self._calls.run(reward.label, partial(attempt, reward), reward.timeout)
            except TimeoutError as error:
                result = error
            outcomes.append(result)
        waiting = [i for i, outcome in enumerate(outcomes) if inspect.iscoroutine(outcome)]
        together = [(self.labels[i], outcomes[i], self.rewards[i].timeout) for i in waiting]
        for i, outcome in zip(waiting, self._calls.run_together(together), strict=True):
            outcomes[i] = outcome
        return outcomes

    def _agree(self, when: str, outcomes: Sequence[Any]) -> list[_Report]:
        """Exchange reports; raise on every process if a reward that must not fail failed on one."""
        errors = [outcome if isinstance(outcome, BaseException) else None for outcome in outcomes]
        outputs = [outcome if isinstance(outcome, CheckedOutput) else None for outcome in outcomes]
        own = _Report(
            errors=[
                None if error is None else f"{when}: {_explain(error, reward)}"
                for reward, error in zip(self.rewards, errors, strict=True)
            ],
            nonfinite=[0 if output is None else output.nonfinite for output in outputs],
            components=[
                f"{label}/{name}"
                for label, output in zip(self.labels, outputs, strict=True)
                for name in (output.components if output is not None else ())
            ],
        )
        reports: list[_Report] = self._gather_object(own)
        fatal: list[str] = []
        for i, reward in enumerate(self.rewards):
            found = [
                f"the reward {reward.label!r} failed"
                + (f" on process {process} of {len(reports)}" if len(reports) > 1 else "")
                + f" {report.errors[i]}"
                for process, report in enumerate(reports)
                if report.errors[i] is not None
            ]
            if found and reward.on_error == "raise":
                fatal += found
            elif found:
                self._warn_once(f"errors {reward.label}", f"{found[0]}; it abstains")
        if fatal:
            cause = next((error for error in errors if error is not None), None)
            raise RewardError(fatal) from cause
        return reports

    def _warn_of_infinities(self, reports: Sequence[_Report], step: int) -> None:
        for i, label in enumerate(self.labels):
            if any(report.nonfinite[i] for report in reports):
                self._warn_once(
                    f"nonfinite {label}",
                    f"the reward {label!r} returned an infinite value at step {step}; "
                    "such rows count as not scored",
                )

    def _gather_components(
        self, outputs: Sequence[CheckedOutput], reports: Sequence[_Report], count: int
    ) -> dict[str, Tensor]:
        names = sorted({name for report in reports for name in report.components})
        if not names:
            return {}
        own = {
            f"{label}/{name}": column
            for label, output in zip(self.labels, outputs, strict=True)
            for name, column in output.components.items()
        }
        missing = outputs[0].values.new_full((count,), torch.nan)
        gathered = self._gather(torch.stack([own.get(name, missing) for name in names], dim=1))
        return dict(zip(names, gathered.unbind(1), strict=True))

    def _counts(self, reports: Sequence[_Report], values: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for i, label in enumerate(self.labels):
            failures = sum(report.errors[i] is not None for report in reports)
            metrics[f"rewards/{label}/errors"] = float(failures)
            metrics[f"rewards/{label}/nonfinite"] = float(sum(r.nonfinite[i] for r in reports))
            metrics[f"rewards/{label}/unscored"] = float(values[:, i].isnan().float().mean())
        return metrics

    def _watch_variance(self, i: int, scored: Tensor, std: Tensor) -> None:
        """Name a weighted reward that cannot move an advantage. A gate that is quiet is fine."""
        reward = self.rewards[i]
        if reward.weight == 0 or reward.gates:
            return
        scale = scored.nan_to_num().abs().max()
        flat = bool(std.nan_to_num().max() <= 1e-6 * scale)  # 1e-6: float32 rounding of a constant
        self._flat_batches[reward.label] = self._flat_batches[reward.label] + 1 if flat else 0
        if self._flat_batches[reward.label] >= FLAT_BATCHES:
            why = (
                "scored nothing" if bool(scored.isnan().all()) else "did not vary inside any group"
            )
            self._warn_once(
                f"flat {reward.label}",
                f"the reward {reward.label!r} (weight {reward.weight:g}) {why} for {FLAT_BATCHES} "
                "batches in a row, so it does not change any advantage; "
                "compare with docs/rewards.md, 'How variance is watched'",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            if self._main_process:
                warnings.warn(shown(message), stacklevel=4)


def _explain(error: BaseException, reward: LoadedReward) -> str:
    """What went wrong, its line, and what to do about the usual misunderstandings."""
    text = describe_error(error, reward.plugin.source)
    if reward.trl_parameters is not None and "string indices must be integers" in text:
        text += "; prompts and completions are texts here: write completion, not [0]['content']"
    elif "signal only works in main thread" in text:
        text += "; rewards run in a thread of their own: use the reward's `timeout` for a limit"
    return text
