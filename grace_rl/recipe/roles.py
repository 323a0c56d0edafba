"""Which texts of a row get rationales, and how they fill a generation batch.

The functions take a `GraceGRPOConfig`, made or a draft.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from grace_rl.errors import UserError
from grace_rl.recipe.prompt import Instruction
from grace_rl.recipe.schema import Section, nearest

SUPERVISED_ROLES = ("query", "positive", "negative", "negative_positive")
UNSUPERVISED_ROLES = ("text", "anchor")


class RoleConfig(Section):
    """One role.

    Args:
        samples: Rationales of each text, at least 1; None is `num_generations` for a trained role
            and 1 for an anchor.
        train: Whether the policy learns from them; a text that is not written for teaches nothing.
        write: Whether rationales are written at all. Without, a text is embedded as it is, in one
            pass.
        instruction: What the policy is told about these texts, in place of the recipe's
            `instruction`: a system message or a whole prompt.

    Raises:
        UserError: With every mistake in the values.
    """

    recipe_key = "roles"

    samples: int | None = Field(None, ge=1)
    train: bool = True
    write: bool = True
    instruction: Instruction | None = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.write:
            if self.train and "train" in self.model_fields_set:
                raise UserError("train: there is nothing to learn from with write: false")
            object.__setattr__(self, "train", False)
            wrong = {"samples": self.samples not in (None, 1), "instruction": self.instruction}
            if found := [f"{key}: has no effect with write: false" for key in wrong if wrong[key]]:
                raise UserError(found)
        return self


_Role = Annotated[RoleConfig, BeforeValidator(lambda value: {} if value is None else value)]
Roles = dict[str, _Role]


def default_roles() -> Roles:
    """Hard negatives are compared with; see papers/grace.md 3.4 for why queries are trained too."""
    return {"query": RoleConfig(), "positive": RoleConfig(), "negative": RoleConfig(train=False)}


def trained_roles(roles: Mapping[str, RoleConfig]) -> list[str]:
    return [name for name, role in roles.items() if role.train]


def unwritten_roles(roles: Mapping[str, RoleConfig]) -> frozenset[str]:
    """Roles whose texts are embedded without a rationale."""
    return frozenset(name for name, role in roles.items() if not role.write)


def role_problems(roles: Mapping[str, RoleConfig], num_generations: int) -> Iterator[str]:
    """What does not fit, each as `key: what to do`."""
    known = (*SUPERVISED_ROLES, *UNSUPERVISED_ROLES)
    for name, role in roles.items():
        if name not in known:
            yield f"roles.{name}: unknown role{nearest(name, known)}; roles are {', '.join(known)}"
        elif role.train and role.samples not in (None, num_generations):
            yield (
                f"roles.{name}.samples: is {role.samples}, but trained roles are rolled out "
                f"num_generations = {num_generations} times; set both to the same number, "
                "or train: false"
            )
    if set(roles) & set(SUPERVISED_ROLES) and set(roles) & set(UNSUPERVISED_ROLES):
        yield (
            "roles: text and anchor belong to unsupervised rows and cannot be mixed with the others"
        )
    if not trained_roles(roles):
        yield "roles: no role is trained; leave out train: false for at least one"


def processes() -> int:
    """Of this run, or of the one that is being checked."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def batch_size(config: Any) -> int:
    """Rollouts per generation batch, over all processes, as TRL counts them."""
    if config.generation_batch_size is not None:
        return int(config.generation_batch_size)
    steps = config.steps_per_generation or config.gradient_accumulation_steps
    return int(config.per_device_train_batch_size * processes() * steps)


def bundle_size(config: Any) -> int:
    """Rollouts of one row."""
    return len(trained_roles(config.roles)) * int(config.num_generations)


def rows_per_batch(config: Any) -> int:
    """Rows of one generation batch."""
    return batch_size(config) // bundle_size(config)


def row_problems(config: Any, rows: int, key: str) -> Iterator[str]:
    """There must be rows for one generation batch."""
    if (needed := rows_per_batch(config)) > rows:
        yield (
            f"{key}: a generation batch takes {batch_size(config)} / "
            f"({len(trained_roles(config.roles))} trained roles x {config.num_generations} "
            f"num_generations) = {needed} rows, but there are {rows}; give more rows or a smaller "
            "batch"
        )


def batch_problems(config: Any) -> Iterator[str]:
    """Whole bundles must fill a generation batch, and generation batches the steps."""
    if config.num_generations is None:
        yield "num_generations: must be at least 2, not None"
        return
    if None not in (config.generation_batch_size, config.steps_per_generation):
        yield (
            "generation_batch_size: cannot be set together with steps_per_generation; "
            "keep one of the two"
        )
        return
    several = list(role_problems(config.roles, config.num_generations))
    yield from several
    if several:
        return
    bundle, batch = bundle_size(config), batch_size(config)
    device, count = config.per_device_train_batch_size, processes()
    if config.generation_batch_size is not None:
        key, arithmetic = "generation_batch_size", f"{batch}"
    else:
        key = "per_device_train_batch_size"
        steps = (
            "steps_per_generation"
            if config.steps_per_generation
            else ("gradient_accumulation_steps")
        )
        plural = "es" if count > 1 else ""
        arithmetic = (
            f"{device} x {count} process{plural} x {getattr(config, steps)} {steps} = {batch}"
        )
    if batch % bundle:
        below, above = batch // bundle * bundle, math.ceil(batch / bundle) * bundle
        yield (
            f"{key}: {arithmetic} rollouts per generation batch, which must be a multiple of "
            f"{len(trained_roles(config.roles))} trained roles x {config.num_generations} "
            f"num_generations = {bundle}: {f'{below} or {above}' if below else above} would do"
        )
    elif batch % (device * count):
        yield (
            f"{key}: {batch} must be a multiple of per_device_train_batch_size x processes = "
            f"{device} x {count} = {device * count}"
        )
    elif config.save_strategy == "steps":
        yield from _save_problems(config, batch // (device * count))


def _save_problems(config: Any, steps_per_generation: int) -> Iterator[str]:
    micro_batches = steps_per_generation * config.num_iterations
    between = max(1, micro_batches // config.gradient_accumulation_steps)
    if config.save_steps >= 1 and config.save_steps % between:
        yield (
            f"save_steps: {config.save_steps:g} must be a multiple of the {between} optimizer "
            "steps that one generation batch serves: a checkpoint between them would lose its rest"
        )
