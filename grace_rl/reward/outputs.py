"""What rewards return: read, checked and made float32 tensors, or refused with a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    return CheckedOutput(
        values=_column("RewardOutput.values", result.values, batch),
        steps=steps,
        components={
            name: _column(f"the component {name!r}", column, batch)
            for name, column in result.components.items()
        },
        failed=failed,
        margin=result.margin,
    )


def unscored_output(reward: LoadedReward, batch: RewardBatch) -> CheckedOutput:
    """What a reward that failed counts as; with steps if it has any, as on the other processes."""
    nothing = batch.embeddings.new_full((len(batch),), torch.nan)
    if not reward.steps or batch.prefix_ends is None:
        return CheckedOutput(nothing)
    return CheckedOutput(nothing, nothing[:, None].repeat(1, batch.prefix_ends.shape[1]))


def drop_nonfinite(output: CheckedOutput) -> int:
    """Turn infinities into NaN, in place; returns how many rows had one in values or steps."""
    rows = output.values.isinf()
    output.values[rows] = torch.nan
    if output.steps is not None:
        rows = rows | output.steps.isinf().any(dim=1)
        output.steps[output.steps.isinf()] = torch.nan
    for column in output.components.values():
        column[column.isinf()] = torch.nan
    return int(rows.sum())


def failed_margin(output: CheckedOutput) -> Tensor:
    """(B,) 0 where the gate passed (or there is none), else the margin."""
    if output.failed is None:
        return torch.zeros_like(output.values)
    return output.failed.to(output.values.dtype) * output.margin


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
