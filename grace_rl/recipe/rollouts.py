"""The part of a recipe about rollouts: rewards, and batches that whole bundles must fill."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from grace_rl.recipe.keys import trainer_value
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.rows import DataConfig
from grace_rl.recipe.source import RecipeSource

if TYPE_CHECKING:
    from grace_rl.reward.loading import RewardSpec


def trained_roles(roles: dict[str, Any]) -> list[str]:
    return [name for name, options in roles.items() if (options or {}).get("train", True)]


def batch_size(training: dict[str, Any]) -> int:
    """Rollouts per generation batch, over all processes, as TRL counts them."""
    given = training.get("generation_batch_size")
    if given is not None:
        return int(given)
    steps = training.get("steps_per_generation") or trainer_value(
        training, "gradient_accumulation_steps"
    )
    return int(trainer_value(training, "per_device_train_batch_size") * _processes() * steps)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_batch_sizes(source: RecipeSource, training: dict[str, Any], data: DataConfig) -> None:
    """Roles, generations and batch sizes must fit: whole bundles fill a generation batch."""
    from grace_rl.data.bundles import parse_roles

    before = len(source.problems)
    for name, options in training["roles"].items():
        if options is not None and not isinstance(options, dict):
            message = f"must be a mapping such as {{samples: 8, train: true}}, not {options!r}"
            source.problems.append(source.problem(("roles", name), message))
    positive = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "generation_batch_size",
    )
    counts = [trainer_value(training, key) for key in (*positive, "steps_per_generation")]
    if any(count is not None and count < 1 for count in counts):
        return  # reported with the other numbers
    generations = trainer_value(training, "num_generations")
    if generations is None or generations < 2:
        message = (
            f"must be at least 2, not {generations}: an advantage compares rollouts of one text"
        )
        source.problems.append(source.problem(("num_generations",), message))
    if (
        training.get("generation_batch_size") is not None
        and training.get("steps_per_generation") is not None
    ):
        message = "cannot be set together with steps_per_generation; keep one of the two"
        source.problems.append(source.problem(("generation_batch_size",), message))
    if len(source.problems) > before:
        return
    if source.collect(lambda: parse_roles(training["roles"], generations)) is None:
        return

    trained = len(trained_roles(training["roles"]))
    bundle, batch = trained * generations, batch_size(training)
    device, accumulation = (trainer_value(training, key) for key in positive[:2])
    processes = _processes()
    per_step = device * processes
    if training.get("generation_batch_size") is not None:
        key, sum_ = "generation_batch_size", f"{batch}"
    else:
        key = "per_device_train_batch_size"
        steps_key = (
            "steps_per_generation"
            if training.get("steps_per_generation")
            else "gradient_accumulation_steps"
        )
        steps = training.get("steps_per_generation") or accumulation
        plural = "es" if processes > 1 else ""
        sum_ = f"{device} x {processes} process{plural} x {steps} {steps_key} = {batch}"
    if batch % bundle:
        below, above = batch // bundle * bundle, math.ceil(batch / bundle) * bundle
        source.problems.append(
            source.problem(
                (key,),
                f"{sum_} rollouts per generation batch, which must be a multiple of "
                f"{trained} trained roles x {generations} num_generations = {bundle}: "
                f"{f'{below} or {above}' if below else above} would do",
            )
        )
    elif batch % per_step:
        message = (
            f"{batch} must be a multiple of per_device_train_batch_size x processes = "
            f"{device} x {processes} = {per_step}"
        )
        source.problems.append(source.problem((key,), message))
    elif data.rows is not None and batch // bundle > data.rows:
        source.problems.append(
            source.problem(
                ("dataset_rows",),
                f"a generation batch takes {batch} / ({trained} trained roles x "
                f"{generations} num_generations) = {batch // bundle} rows, but dataset_rows is "
                f"{data.rows}; give more rows or a smaller batch",
            )
        )


def rewards_of(source: RecipeSource, values: dict[str, Any], method: str) -> list[RewardSpec]:
    entries = values.get("rewards", [])
    if entries and not METHODS[method].rollouts:
        message = f"method: {method} writes nothing that could be rewarded; remove it"
        source.problems.append(source.problem(("rewards",), message))
    if METHODS[method].rollouts and not entries:
        source.missing("rewards", "give at least one, for example [{name: contrastive}]")
    return reward_specs(source, entries)


def reward_specs(source: RecipeSource, entries: list[dict[str, Any]]) -> list[RewardSpec]:
    from grace_rl.reward.loading import RewardSpec

    specs = []
    for i, entry in enumerate(entries):
        entry = dict(entry)
        name = entry.pop("name", None)
        if not isinstance(name, str):
            source.problems.append(
                source.problem(("rewards", i), "has no name; write {name: contrastive}")
            )
            name = ""
        place, colon, attribute = name.rpartition(":")
        # A file is relative to the recipe, and made absolute so that a run's copy still finds it.
        if colon and place.endswith(".py"):
            name = f"{(source.path.parent / place).resolve()}:{attribute}"
        reserved = {key: entry.pop(key) for key in ("weight", "on_error", "label") if key in entry}
        specs.append(RewardSpec(name=name, **reserved, keywords=entry))
    return specs


def _stand_in(batch: Any) -> list[float]:
    return []


def check_rewards(source: RecipeSource, specs: list[RewardSpec], training: dict[str, Any]) -> None:
    from grace_rl.credit.segments import SHAPING_SETTINGS, check_shaping
    from grace_rl.reward.loading import load_rewards

    # What has no name was reported already; a stand-in keeps the numbers of the others.
    wanted = [spec if spec.name else _stand_in for spec in specs]
    loaded = source.collect(lambda: load_rewards(wanted, source.path.parent))
    weights = training.get("reward_weights")
    if weights is not None and len(weights) != len(specs):
        message = (
            f"has {len(weights)} numbers for {len(specs)} rewards; "
            "better give each reward its weight"
        )
        source.problems.append(source.problem(("reward_weights",), message))
    if loaded is not None:
        settings = {name: trainer_value(training, name) for name in SHAPING_SETTINGS}
        source.collect(lambda: check_shaping(settings, loaded))
    gates = [reward.label for reward in loaded or [] if reward.gates and reward.weight]
    if gates and training.get("multi_objective_aggregation") == "normalize_then_sum":
        message = (
            f"normalize_then_sum forms no totals for the gate {', '.join(gates)} to act on; "
            "use sum_then_normalize"
        )
        source.problems.append(source.problem(("multi_objective_aggregation",), message))
