"""The trainer's config of a run on many processes, built in one process that starts no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe


def arguments_alone(recipe: Recipe, processes: int, **settled: Any) -> Any:
    """`recipe.training_arguments()` with the batches of all processes together.

    Args:
        recipe: Loaded for so many processes (`grace_rl.launch.lines.counted`).
        processes: At least 1.
        **settled: As in `training_arguments`.

    Raises:
        UserError: The config refuses the values on this machine.
    """
    batch = recipe.config.per_device_train_batch_size * processes
    alone = {"deepspeed": None, "per_device_train_batch_size": batch}
    return recipe.training_arguments(**(alone | settled))
