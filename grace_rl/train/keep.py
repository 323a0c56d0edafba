"""What becomes of a batch of rollouts: stored, printed, and looked at once for the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_rl.reward.runtime import RewardError
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.rollout.store import write_rollouts
from grace_rl.train.progress import print_group


def keep_rollouts(rollouts: Rollouts, trainer: Any, run_folder: Path | None) -> None:
    """Store the rollouts and anchors of a logged step and of the last; now and then print a group.

    Args:
        rollouts: Those of all processes, with scores and advantages.
        trainer: A `GraceGRPOTrainer`; its main process stores and prints.
        run_folder: The run directory; None stores nothing.
    """
    if not trainer.accelerator.is_main_process:
        return
    step, args = rollouts.step, trainer.args
    if run_folder is not None and is_logged(step, trainer):
        write_rollouts(run_folder, step, rollouts.to_arrow())
    every = args.print_rollouts_steps
    if every > 0 and (step % every == 0 or step == 1):
        group = rollouts.take(rollouts.trained & (rollouts.group == rollouts.group[0]))
        labels = [reward.label for reward in trainer.rewards]
        print_group(trainer.console, group.to_arrow().to_pylist(), labels)


def is_logged(step: int, trainer: Any) -> bool:
    """Whether a step is logged; or one of those that its generation batch serves, from it on."""
    last = step + int(getattr(trainer.args, "steps_between_generations", 1)) - 1
    every, end = max(1, int(trainer.state.logging_steps)), int(trainer.state.max_steps)
    first = step == 1 and bool(trainer.args.logging_first_step)
    return first or last // every > (step - 1) // every or step <= end <= last


def check_totals(rollouts: Rollouts) -> None:
    """Raises RewardError, on every process alike, where rewards are too large for a deviation.

    Their squares overflow float32 then: the deviation is infinite and every advantage 0.
    """
    totals = rollouts.totals[~rollouts.totals.isnan()]
    if not len(totals) or bool(((totals - totals.mean()) ** 2).sum().isfinite()):
        return
    sizes = {label: float(s.nan_to_num().abs().max()) for label, s in rollouts.scores.items()}
    label = max(sizes, key=lambda name: sizes[name])
    raise RewardError(
        f"the rewards are too large to compare: their total reaches {float(totals.abs().max()):.3g}"
        f" at step {rollouts.step}, mostly by {label!r}; advantages divide by its deviation, which "
        "is no number then; scale the reward down"
    )


def check_first_batch(advantages: Tensor) -> str | None:
    """A sentence if the first batch teaches nothing."""
    if bool(torch.any(advantages)):
        return None
    return (
        "every advantage of the first batch is 0: no text has two rollouts that the rewards tell "
        "apart, so this step changes nothing. If this goes on, look at temperature, "
        "rewards/<name>/within_group_std and the weights (docs/rewards.md)"
    )
