"""Running the rewards of one batch: the one place where a reward's exception is caught.

Every process scores its own rollouts; afterwards all processes know all values, or all of them
raise the same error. What TRL then does with the result (weights, nansum, advantages) is unchanged:
gates and rows that one reward could not score are settled inside the returned columns.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
import types
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_rl.errors import UserError
from grace_rl.reward.batch import RewardBatch
from grace_rl.reward.loading import LoadedReward, describe_error
from grace_rl.reward.outputs import (
    CheckedOutput,
    drop_nonfinite,
    failed_margin,
    read_output,
    unscored_output,
)
from grace_rl.rollout.groups import fill_unscored, group_stds
from grace_rl.run.zero import outside_zero3

FAILURES = (Exception, SystemExit, asyncio.CancelledError)  # of a reward; Ctrl-C is none
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
    nonfinite: list[int]
    components: list[str]


class RewardRuntime:
    """Scores batches with a list of rewards, on one process or on many.

    Args:
        rewards: from `load_rewards`.
        gather: (B, ...) tensor of this process -> (W, ...) tensor of all, in world order.
        gather_object: an object of this process -> the list of every process's object.
        main_process: only this process warns.

    Raises:
        UserError: there are no rewards.
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
        self.rewards = list(rewards)
        self.labels = [reward.label for reward in self.rewards]
        self.weights = torch.tensor([reward.weight for reward in self.rewards])  # (R,)
        self.gates = [r.label for r in self.rewards if r.gates and r.weight != 0]
        self._gather = gather
        self._gather_object = gather_object
        self._main_process = main_process
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flat_batches = dict.fromkeys(self.labels, 0)
        self._warned: set[str] = set()

    def score(
        self, batch: RewardBatch, trainer_arguments: Mapping[str, Any] | None = None
    ) -> Scored:
        """Score one batch; every process calls it together.

        Args:
            batch: this process's rollouts; the same number on every process.
            trainer_arguments: what only plain TRL functions get; TRL's trainer gives trainer_state,
                log_extra and log_metric. Without it trainer_state knows the step only.

        Raises:
            RewardError: a reward with `on_error: raise` failed on any process.
        """
        if trainer_arguments is None:
            trainer_arguments = {
                "trainer_state": types.SimpleNamespace(global_step=batch.step),
                "log_extra": lambda column, values: None,
                "log_metric": lambda name, value: None,
            }
        outputs, errors = self._call_all(batch, trainer_arguments)
        nonfinite = [drop_nonfinite(output) for output in outputs]
        reports = self._agree(batch, outputs, errors, nonfinite)

        values = self._gather(torch.stack([output.values for output in outputs], dim=1))
        group = self._gather(batch.group)
        components = self._gather_components(outputs, reports, len(batch))
        weights = self.weights.to(values.device)
        rewards = fill_unscored(values, group)
        metrics = self._counts(reports, values)
        if self.gates:
            failed = self._gather(torch.stack([failed_margin(o) for o in outputs], dim=1))
            rewards = apply_gates(rewards, failed, weights, group)
            for i, label in enumerate(self.labels):
                if self.rewards[i].gates:
                    metrics[f"rewards/{label}/gated"] = float((failed[:, i] > 0).float().mean())
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

    @outside_zero3()
    def _call_all(
        self, batch: RewardBatch, trainer_arguments: Mapping[str, Any]
    ) -> tuple[list[CheckedOutput], list[BaseException | None]]:
        """Every reward's checked output; an unscored one beside the exception where it failed."""
        raw: list[Any] = []
        with torch.no_grad():
            for reward in self.rewards:
                try:
                    raw.append(reward(batch.apart(), trainer_arguments))
                except FAILURES as error:
                    raw.append(error)
        waiting = [i for i, result in enumerate(raw) if inspect.isawaitable(result)]
        for i, result in zip(waiting, self._await_all([raw[i] for i in waiting]), strict=True):
            raw[i] = result
        outputs: list[CheckedOutput] = []
        errors: list[BaseException | None] = []
        for reward, result in zip(self.rewards, raw, strict=True):
            try:
                if isinstance(result, BaseException):
                    raise result
                outputs.append(read_output(result, reward, batch))
                errors.append(None)
            except FAILURES as error:
                outputs.append(unscored_output(reward, batch))
                errors.append(error)
        return outputs, errors

    def _await_all(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        """Await all together, on one loop that lives as long as the run.

        Clients keep connections that belong to their loop, so a new loop per batch would break
        them; and a thread of its own works inside notebooks, whose main thread has a loop already.
        """
        if not awaitables:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def answer(awaitable: Awaitable[Any]) -> Any:
            try:
                return await awaitable
            except FAILURES as error:
                return error

        async def together() -> list[Any]:
            return await asyncio.gather(*map(answer, awaitables))

        return asyncio.run_coroutine_threadsafe(together(), self._loop).result()

    def _agree(
        self,
        batch: RewardBatch,
        outputs: Sequence[CheckedOutput],
        errors: Sequence[BaseException | None],
        nonfinite: list[int],
    ) -> list[_Report]:
        """Exchange reports; raise on every process if a reward that must not fail failed on one."""
        rows = sorted(set(batch.example.tolist()))
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        own = _Report(
            errors=[
                None
                if error is None
                else f"at step {batch.step}, data rows {shown}: "
                f"{describe_error(error, reward.source)}"
                for reward, error in zip(self.rewards, errors, strict=True)
            ],
            nonfinite=nonfinite,
            components=[
                f"{label}/{name}"
                for label, output in zip(self.labels, outputs, strict=True)
                for name in output.components
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
            if any(report.nonfinite[i] for report in reports):
                self._warn_once(
                    f"nonfinite {reward.label}",
                    f"the reward {reward.label!r} returned an infinite value at step {batch.step}; "
                    "such rows count as not scored",
                )
        if fatal:
            cause = next((error for error in errors if error is not None), None)
            raise RewardError(fatal) from cause
        return reports

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
                warnings.warn(message, stacklevel=4)


def weighted_totals(rewards: Tensor, weights: Tensor) -> Tensor:
    """The total that TRL computes: (W, R) and (R,) -> (W,), NaN where a row has no reward at all.

    >>> nan = float("nan")
    >>> rewards = torch.tensor([[1.0, 2.0], [3.0, nan], [nan, nan]])
    >>> weighted_totals(rewards, torch.tensor([1.0, 0.5]))
    tensor([2., 3., nan])
    """
    totals = (rewards * weights).nansum(dim=1)
    return torch.where(rewards.isnan().all(dim=1), torch.nan, totals)


def apply_gates(rewards: Tensor, failed: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """Put the totals of rollouts that failed a gate below the passing ones of their group.

    In each group the rollouts that failed fewest gates keep their totals; those that failed more
    get at most the worst total of the better ones minus their margin. If all failed alike, nothing
    changes. The correction goes into the columns of the failed gates, in equal parts.

    Args:
        rewards: (W, R), before gates.
        failed: (W, R), 0 where passed, else the margin.
        weights: (R,); a gate with weight 0 is not applied.
        group: (W,) long.

    Returns:
        (W, R), a new tensor.

    >>> rewards = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    >>> failed = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> weighted_totals(apply_gates(rewards, failed, torch.ones(2), torch.zeros(3)), torch.ones(2))
    tensor([1., 0., 2.])
    """
    failed = torch.where(weights == 0, 0.0, failed)
    broken = (failed > 0).sum(dim=1)  # (W,) how many gates
    totals = weighted_totals(rewards, weights)
    wanted = totals.clone()
    for number in group[broken > 0].unique().tolist():
        rows = (group == number).nonzero()[:, 0]
        floor = torch.tensor(torch.inf, device=rewards.device)
        for tier in broken[rows].unique().tolist():  # ascending
            members = rows[broken[rows] == tier]
            if floor.isfinite():
                limit = floor - failed[members].amax(dim=1)
                wanted[members] = torch.fmin(wanted[members], limit)
            floor = torch.minimum(floor, wanted[members].nan_to_num(nan=torch.inf).min())
    change = (wanted - totals.nan_to_num()) / broken  # per failed gate
    lowered = (wanted != totals) & ~wanted.isnan()
    corrected = rewards.nan_to_num() + change[:, None] / weights
    return torch.where((failed > 0) & lowered[:, None], corrected, rewards)
