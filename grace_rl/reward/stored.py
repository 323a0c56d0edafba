"""Stored rollouts as the batches that rewards saw: a reward can be tried on them without a model.

Only data is read: the rollouts, and the vectors of the guide that masked false negatives. Nothing
that a run names is imported or built (`grace_rl.reward.consent`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grace_rl.data.false_negatives import FalseNegativeConfig, FalseNegatives
from grace_rl.data.guide import Guide
from grace_rl.errors import UserError
from grace_rl.reward.batch import RewardBatch, reward_batch
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.rollout.store import read_rollouts, rollout_files

FALSE_NEGATIVES = "false_negatives"  # in the notes of a step: the mask's settings, guide and all


def stored_steps(run: str | Path, steps: Iterable[int] | None = None) -> Iterator[Rollouts]:
    """The stored steps of a run in rising order, one in memory at a time.

    Args:
        run: The run directory.
        steps: Only these; the default is all.

    Yields:
        Every rollout of a step, then its anchors.

    Raises:
        UserError: There is no such run or step, or no rollouts are stored, or not all of them.
    """
    numbers = sorted(rollout_files(run)) if steps is None else list(steps)
    if not numbers:
        raise UserError(f"{run}: no rollouts are stored there yet")
    for step in numbers:
        try:
            yield Rollouts.from_arrow(read_rollouts(run, [step]))
        except ValueError as error:
            raise UserError(f"{run}: step {step}: {error}") from error


def stored_batch(rollouts: Rollouts, run: str | Path) -> RewardBatch:
    """What the rewards of one process would see of a stored step.

    Raises:
        UserError: The guide that masked false negatives is not there any more.
    """
    settings = rollouts.notes.get(FALSE_NEGATIVES)
    mask = None if settings is None else _mask(dict(settings), Path(run))
    return reward_batch(rollouts, slice(int(rollouts.trained.sum())), mask)


def mask_settings(mask: FalseNegatives) -> dict[str, Any]:
    """The notes from which `stored_batch` makes the mask again."""
    return mask.config.model_dump(mode="json") | {"guide": str(mask.guide.folder.resolve())}


def _mask(settings: dict[str, Any], run: Path) -> FalseNegatives:
    folders = (Path(settings["guide"]), run / "guide")  # the run may have been moved
    guide = next((folder for folder in folders if folder.is_dir()), None)
    if guide is None:
        raise UserError(f"{run}: the guide of its false negatives is gone: {settings['guide']}")
    return FalseNegatives(FalseNegativeConfig(**settings), Guide(guide))
