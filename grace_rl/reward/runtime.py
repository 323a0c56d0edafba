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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grace_rl.errors import UserError
from grace_rl.reward.batch import RewardBatch, RewardOutput, group_means, group_stds
from grace_rl.reward.loading import LoadedReward, describe_error
from grace_rl.zero import outside_zero3

FLAT_BATCHES = 10  # a weighted reward that is flat for so many batches in a row is named once
RESERVED_COMPONENTS = {
    "mean",
    "std",
    "within_group_std",
    "errors",
    "nonfinite",
    "unscored",
    "gated",
}


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
        nonfinite = [_drop_nonfinite(output) for output in outputs]
        reports = self._agree(batch, outputs, errors, nonfinite)

        values = self._gather(torch.stack([output.values for output in outputs], dim=1))
        group = self._gather(batch.group)
        components = self._gather_components(outputs, reports, len(batch))
        weights = self.weights.to(values.device)
        rewards = _fill_unscored(values, group)
        metrics = self._counts(reports, values)
        if self.gates:
            failed = self._gather(torch.stack([_failed_margin(o) for o in outputs], dim=1))
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
    ) -> tuple[list[_Output], list[Exception | None]]:
        """Every reward's checked output; an unscored one beside the exception where it failed."""
        raw: list[Any] = []
        with torch.no_grad():
            for reward in self.rewards:
                try:
                    raw.append(reward(batch, trainer_arguments))
                except Exception as error:
                    raw.append(error)
        waiting = [i for i, result in enumerate(raw) if inspect.isawaitable(result)]
        for i, result in zip(waiting, self._await_all([raw[i] for i in waiting]), strict=True):
            raw[i] = result
        outputs: list[_Output] = []
        errors: list[Exception | None] = []
        for reward, result in zip(self.rewards, raw, strict=True):
            try:
                if isinstance(result, BaseException):
                    raise result
                outputs.append(_read(result, reward, batch))
                errors.append(None)
            except Exception as error:
                outputs.append(_unscored(reward, batch))
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

        async def together() -> list[Any]:
            return await asyncio.gather(*awaitables, return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(together(), self._loop).result()

    def _agree(
        self,
        batch: RewardBatch,
        outputs: Sequence[_Output],
        errors: Sequence[Exception | None],
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
        self, outputs: Sequence[_Output], reports: Sequence[_Report], count: int
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


@dataclass(frozen=True, eq=False)
class _Output:
    """A checked RewardOutput: float32 tensors on the batch's device."""

    values: Tensor
    steps: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    failed: Tensor | None = None  # (B,) bool
    margin: float = 1.0


def score_prefixes(reward: LoadedReward, batch: RewardBatch) -> RewardOutput:
    """What a reward that looks at embeddings says about every prefix of the rationales.

    Args:
        reward: called with the batch once per prefix, each time with that prefix's embeddings.
        batch: with prefix embeddings.

    Returns:
        Values and components as for the whole rationales, and `steps`, (B, K+1).

    Raises:
        ValueError: the reward returns something else than values, or the batch has no prefixes.
    """
    prefixes = 0 if batch.prefix_ends is None else batch.prefix_ends.shape[1]
    outputs = [_read(reward(batch.prefix(k), {}), reward, batch) for k in range(prefixes)]
    if not outputs:
        raise ValueError("the batch has no prefix embeddings, so no prefix can be scored")
    whole = outputs[-1]
    steps = torch.stack([output.values for output in outputs], dim=1)
    return RewardOutput(values=whole.values, steps=steps, components=whole.components)


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


def _fill_unscored(values: Tensor, group: Tensor) -> Tensor:
    """Give a row that other rewards scored the group's mean of the reward that did not score it.

    TRL would count it as 0, which is far above or below its siblings for most rewards.
    """
    other = ~values.isnan().all(dim=1, keepdim=True)
    return torch.where(values.isnan() & other, group_means(values, group), values)


def _failed_margin(output: _Output) -> Tensor:
    """(B,) 0 where the gate passed (or there is none), else the margin."""
    if output.failed is None:
        return torch.zeros_like(output.values)
    return output.failed.to(output.values.dtype) * output.margin


def _drop_nonfinite(output: _Output) -> int:
    """Turn infinities into NaN, in place; returns how many rows had one in values or steps."""
    rows = output.values.isinf()
    output.values[rows] = torch.nan
    if output.steps is not None:
        rows = rows | output.steps.isinf().any(dim=1)
        output.steps[output.steps.isinf()] = torch.nan
    for column in output.components.values():
        column[column.isinf()] = torch.nan
    return int(rows.sum())


def _unscored(reward: LoadedReward, batch: RewardBatch) -> _Output:
    """What a reward that failed counts as; with steps if it has any, as on the other processes."""
    nothing = batch.embeddings.new_full((len(batch),), torch.nan)
    if not reward.steps or batch.prefix_ends is None:
        return _Output(nothing)
    return _Output(nothing, nothing[:, None].repeat(1, batch.prefix_ends.shape[1]))


def _read(result: Any, reward: LoadedReward, batch: RewardBatch) -> _Output:
    """Check what a reward returned; raises ValueError or TypeError with a sentence."""
    if reward.steps and getattr(result, "steps", None) is None:
        raise ValueError("it declares `steps = True` and returned none: return a RewardOutput")
    if not isinstance(result, RewardOutput):
        return _Output(_column("the reward", result, batch))
    if result.gate is not None and not reward.gates:
        raise ValueError(
            "it returned a gate; declare it with the attribute `gates = True` on its class or "
            "function, so that the trainer can check the recipe"
        )
    clash = sorted(RESERVED_COMPONENTS & set(result.components))
    if clash or any("/" in name for name in result.components):
        raise ValueError(
            f"component names must not contain '/' or be one of {sorted(RESERVED_COMPONENTS)}; "
            f"found {sorted(result.components)}"
        )
    steps = None
    if result.steps is not None:
        steps = torch.as_tensor(result.steps, device=batch.embeddings.device).detach()
        steps = steps.to(torch.float32, copy=True)
        if not reward.steps:
            raise ValueError(
                "it returned steps; declare them with the attribute `steps = True` on its class or "
                "function, so that prefixes are embedded"
            )
        if batch.prefix_ends is None or steps.shape != batch.prefix_ends.shape:
            wanted = None if batch.prefix_ends is None else tuple(batch.prefix_ends.shape)
            raise ValueError(
                f"RewardOutput.steps has shape {tuple(steps.shape)}, expected that of "
                f"RewardBatch.prefix_ends, {wanted}"
            )
    failed = None
    if result.gate is not None:
        gate = torch.as_tensor(result.gate, device=batch.embeddings.device)
        if gate.shape != (len(batch),) or gate.dtype != torch.bool:
            raise ValueError(
                f"RewardOutput.gate has shape {tuple(gate.shape)} and {gate.dtype}, "
                f"expected ({len(batch)},) and torch.bool"
            )
        failed = ~gate
    return _Output(
        values=_column("RewardOutput.values", result.values, batch),
        steps=steps,
        components={
            name: _column(f"the component {name!r}", column, batch)
            for name, column in result.components.items()
        },
        failed=failed,
        margin=result.margin,
    )


def _column(what: str, values: Any, batch: RewardBatch) -> Tensor:
    """(B,) float32 of its own memory, NaN for None."""
    device, count = batch.embeddings.device, len(batch)
    if isinstance(values, list | tuple):
        for i, value in enumerate(values):
            if value is not None and not hasattr(value, "__float__"):
                raise TypeError(f"{what}: entry {i} is {value!r}, expected a number or None")
        values = torch.tensor([torch.nan if v is None else float(v) for v in values], device=device)
    elif isinstance(values, Tensor) or hasattr(values, "__array__"):
        values = torch.as_tensor(values, device=device).detach().to(torch.float32, copy=True)
    else:
        raise TypeError(
            f"{what} is a {type(values).__name__}; "
            f"return a tensor or a list of {count} numbers, or a RewardOutput"
        )
    if values.shape != (count,):
        shape = f"{len(values)} values" if values.dim() == 1 else f"shape {tuple(values.shape)}"
        raise ValueError(f"{what} has {shape}, but there are {count} rollouts")
    return values.to(torch.float32)
