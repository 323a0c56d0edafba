"""What rewards return: read, checked and made float32 tensors, or refused with a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from grace_rl.reward.batch import RewardBatch, RewardOutput
from grace_rl.reward.loading import LoadedReward

RESERVED_COMPONENTS = {
    "mean",
    "std",
    "within_group_std",
    "errors",
    "nonfinite",
    "unscored",
    "gated",
}


@dataclass(frozen=True, eq=False)
class CheckedOutput:
    """A checked RewardOutput: float32 tensors on the batch's device, NaN where nothing is scored.

    Attributes:
        failed: (B,) bool, where the gate did not pass; None without a gate.
        nonfinite: How many rows had an infinity in their value or steps; see `without_infinities`.
    """

    values: Tensor
    steps: Tensor | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    failed: Tensor | None = None
    margin: float = 1.0
    nonfinite: int = 0


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
    outputs = [read_output(reward(batch.prefix(k), {}), reward, batch) for k in range(prefixes)]
    if not outputs:
        raise ValueError("the batch has no prefix embeddings, so no prefix can be scored")
    whole = outputs[-1]
    steps = torch.stack([output.values for output in outputs], dim=1)
    return RewardOutput(values=whole.values, steps=steps, components=whole.components)


def read_output(result: Any, reward: LoadedReward, batch: RewardBatch) -> CheckedOutput:
    """Check what a reward returned; raises ValueError or TypeError with a sentence."""
    if reward.steps and getattr(result, "steps", None) is None:
        raise ValueError("it declares `steps = True` and returned none: return a RewardOutput")
    if not isinstance(result, RewardOutput):
        return CheckedOutput(_column("the reward", result, batch))
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
    if not math.isfinite(result.margin):
        raise ValueError(f"RewardOutput.margin is {result.margin}; it must be finite")
    return CheckedOutput(
        values=_column("RewardOutput.values", result.values, batch),
        steps=None if result.steps is None else _steps(result.steps, reward, batch),
        components={
            name: _column(f"the component {name!r}", column, batch)
            for name, column in result.components.items()
        },
        failed=None if result.gate is None else _failed(result.gate, batch),
        margin=float(result.margin),
    )


def unscored_output(reward: LoadedReward, batch: RewardBatch) -> CheckedOutput:
    """What a reward that failed counts as; with steps if it has any, as on the other processes."""
    nothing = batch.embeddings.new_full((len(batch),), torch.nan)
    if not reward.steps or batch.prefix_ends is None:
        return CheckedOutput(nothing)
    return CheckedOutput(nothing, nothing[:, None].repeat(1, batch.prefix_ends.shape[1]))


def without_infinities(output: CheckedOutput) -> CheckedOutput:
    """The output with NaN for every infinity, in place, and the number of such rows."""
    rows = output.values.isinf()
    output.values[rows] = torch.nan
    if output.steps is not None:
        rows = rows | output.steps.isinf().any(dim=1)
        output.steps[output.steps.isinf()] = torch.nan
    for column in output.components.values():
        column[column.isinf()] = torch.nan
    return replace(output, nonfinite=int(rows.sum()))


def failed_margin(output: CheckedOutput) -> Tensor:
    """(B,) 0 where the gate passed (or there is none), else the margin."""
    if output.failed is None:
        return torch.zeros_like(output.values)
    return output.failed.to(output.values.dtype) * output.margin


def _steps(steps: Any, reward: LoadedReward, batch: RewardBatch) -> Tensor:
    if not reward.steps:
        raise ValueError(
            "it returned steps; declare them with the attribute `steps = True` on its class or "
            "function, so that prefixes are embedded"
        )
    steps = _plain(torch.as_tensor(steps), batch)
    if batch.prefix_ends is None or steps.shape != batch.prefix_ends.shape:
        wanted = None if batch.prefix_ends is None else tuple(batch.prefix_ends.shape)
        raise ValueError(
            f"RewardOutput.steps has shape {tuple(steps.shape)}, expected that of "
            f"RewardBatch.prefix_ends, {wanted}"
        )
    return steps


def _failed(gate: Any, batch: RewardBatch) -> Tensor:
    gate = torch.as_tensor(gate, device=batch.embeddings.device)
    if gate.shape != (len(batch),) or gate.dtype != torch.bool:
        raise ValueError(
            f"RewardOutput.gate has shape {tuple(gate.shape)} and {gate.dtype}, "
            f"expected ({len(batch)},) and torch.bool"
        )
    return ~gate


def _column(what: str, values: Any, batch: RewardBatch) -> Tensor:
    """(B,) float32 of its own memory, NaN for None; whatever TRL iterates over is iterated over."""
    count = len(batch)
    if isinstance(values, Tensor):
        column = _plain(values, batch)
    else:
        try:
            several = None if isinstance(values, str | bytes | Mapping) else iter(values)
        except TypeError:
            several = None
        if several is None:
            raise TypeError(
                f"{what} is a {type(values).__name__}; return {count} numbers, one for each "
                "rollout, or a RewardOutput"
            )
        entries = list(islice(several, count + 1))
        if len(entries) > count:
            raise ValueError(f"{what} has more than {count} values, but there are {count} rollouts")
        numbers = [_number(what, i, value) for i, value in enumerate(entries)]
        column = torch.tensor(numbers, dtype=torch.float32, device=batch.embeddings.device)
    if column.shape != (count,):
        shape = f"{len(column)} values" if column.dim() == 1 else f"shape {tuple(column.shape)}"
        raise ValueError(f"{what} has {shape}, but there are {count} rollouts")
    return column


def _number(what: str, i: int, value: Any) -> float:
    if value is None:
        return math.nan
    if not hasattr(value, "__float__") or getattr(value, "ndim", False):
        raise TypeError(f"{what}: entry {i} is {value!r}, expected a number or None")
    return float(value)


def _plain(tensor: Tensor, batch: RewardBatch) -> Tensor:
    """A float32 copy without gradient, on the batch's device, in the usual layout."""
    if tensor.is_complex():
        raise TypeError(f"a reward is a real number, not {tensor.dtype}")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.detach().to(batch.embeddings.device, torch.float32, copy=True)
