"""Which keys of a recipe may differ when a run resumes, and which of two recipes do differ."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from grace_rl.run.secrets import is_secret

MAY_CHANGE = (
    # How long a run goes on. The learning-rate schedule is that of the new length.
    "max_steps",
    "num_train_epochs",
    # What is kept, shown and sent, and when.
    "name",
    "output_dir",
    "run_name",
    "save_*",
    "log*",
    "report_to",
    "project",
    "trackio_*",
    "wandb_*",
    "disable_tqdm",
    "print_rollouts_steps",
    "panel_texts",
    "num_completions_to_print",
    "stale_engine_threshold",
    "push_to_hub*",
    "hub_*",
    # Scored before and after, or beside the training.
    "evaluation*",
    "eval_*",
    # Memory and speed of the same computation.
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ds3_gather_for_generation",
    "vllm_gpu_memory_utilization",
    "vllm_enable_sleep_mode",
    "vllm_server_*",
    "vllm_group_port",
)
"""Keys (patterns) that may differ on resuming: none changes what the next step computes."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key that differs and may not: empty if the run can go on."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key)!r} in the run, now {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and not may_change(key)
    ]


def may_change(key: str) -> bool:
    """Whether a dotted key may differ: one of `MAY_CHANGE`, or a secret, which no run keeps."""
    key = _in_its_stage(key)
    return is_secret(key) or any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _in_its_stage(key: str) -> str:
    """`stages.2.max_steps` as `max_steps`."""
    return key.split(".", 2)[-1] if key.startswith("stages.") else key


def _flat(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; an absent key and one that is null are the same."""
    if prefix == "stages" and isinstance(recipe, list):
        recipe = dict(enumerate(recipe, start=1))
    if not isinstance(recipe, Mapping):
        return {prefix: recipe}
    return {
        name: value
        for key, item in recipe.items()
        for name, value in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
