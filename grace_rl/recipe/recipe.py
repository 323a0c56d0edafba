"""A YAML file and command-line overrides -> one validated, typed recipe.

A recipe is flat, like TRL's: every field of the method's config and of TRL's `ModelConfig` keeps
its name, and the keys of `OWN_KEYS` come on top. Every mistake is reported together with the
others, before a model loads: where it was written, the key, what to do.

Importing this module is cheap; TRL is imported when a recipe is loaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import grace_rl.recipe.fields as fields
from grace_rl.errors import UserError, missing
from grace_rl.recipe.methods import METHODS, named
from grace_rl.recipe.requirements import (
    evaluation_problems,
    file_problems,
    idle_problems,
    kwargs_problems,
    loading_problems,
    package_problems,
)
from grace_rl.recipe.rewards import RewardSpec, reward_specs
from grace_rl.recipe.roles import batch_size, row_problems, rows_per_batch, trained_roles
from grace_rl.recipe.rows import (
    DATA_KEYS,
    SCENES,
    DataConfig,
    EvaluationConfig,
    looks_like_path,
    read_data,
)
from grace_rl.recipe.schema import read_section, shown, split_key, unknown_recipe_key
from grace_rl.recipe.source import RecipeSource, read_source

OWN_KEYS = ("method", *DATA_KEYS, "rewards", "evaluation")
"""Keys that are no fields of TRL's or our trainer configs."""

LOAD_REWARDS = "grace_rl.reward.loading:load_rewards"
REWARD_RULE = "grace_rl.train.grpo_config:reward_problems"


@dataclass(frozen=True)
class Recipe:
    """One validated recipe.

    Attributes:
        method: Name of an entry of `grace_rl.recipe.methods.METHODS`.
        model: Keywords of TRL's `ModelConfig`; always has `model_name_or_path`.
        training: Keywords of the trainer's config that were given, all of our own with their
            defaults, and `output_dir`; typed.
        data: Where rows come from.
        rewards: In the recipe's order; empty for methods without rollouts.
        evaluation: None leaves evaluation out.
        name: From the file: `quickstart.yaml` -> `quickstart`, `scenes/sft.yaml` -> `scenes-sft`.
        source: What was written, and where.
    """

    method: str
    model: dict[str, Any]
    training: dict[str, Any]
    data: DataConfig
    rewards: list[RewardSpec]
    evaluation: EvaluationConfig | None
    name: str = field(compare=False)
    source: RecipeSource = field(compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path

    def problems(self, found: Iterable[str]) -> list[str]:
        """Problems that begin with a key, with the place where that key was written."""
        return [self.source.problem(*split_key(problem)) for problem in found]

    @cached_property
    def config(self) -> Any:
        """Every field of the trainer's config, as the recipe or its default has it.

        It is what `training_arguments` begins with, before transformers looks at the machine.
        """
        return fields.draft(METHODS[self.method].config_class(), self.training)

    def training_arguments(self, **settled: Any) -> Any:
        """The trainer's config, such as `GraceGRPOConfig`.

        Args:
            **settled: Fields that are settled by how the run was started, whatever the recipe says.

        Raises:
            UserError: The config refuses the values on this machine.
        """
        return self._build(METHODS[self.method].config_class(), self.training | settled)

    def model_config(self) -> Any:
        """TRL's `ModelConfig`. Raises UserError if it refuses the values."""
        return self._build(model_class(), self.model)

    def _build(self, config: Callable[..., Any], keywords: dict[str, Any]) -> Any:
        try:
            return config(**keywords)
        except UserError as error:
            raise UserError(self.problems(error.problems)) from error
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            key = next(
                (word for word in re.findall(r"\w+", reason) if word in self.source.tree), ""
            )
            says = f"{getattr(config, '__name__', config)} says: {reason}"
            raise Refusal(self.source.problem((key,) if key else (), says)) from error

    def resolved(self) -> dict[str, Any]:
        """What `--dry-run` prints and the run directory keeps. It loads to an equal recipe.

        It has everything given, and our own keys with their defaults.
        """
        data = self.data
        tree: dict[str, Any] = {
            "method": self.method,
            **self.model,
            **{key: value for key, value in data.given().items() if value not in (None, {})},
            "dataset_train_split": data.train_split,
            **fields.plain(self.training),
        }
        if self.rewards:
            tree["rewards"] = [reward.entry() for reward in self.rewards]
        if self.evaluation is not None:
            tree["evaluation"] = self.evaluation.model_dump(mode="json")
        return tree


@dataclass(frozen=True)
class Draft:
    """What is right of a recipe that has mistakes, so that it can be looked at all the same.

    Attributes:
        recipe: Without the values that are wrong.
        wrong: The keys of the mistakes.
        told: A further problem as it is told.
    """

    recipe: Recipe
    wrong: set[str]
    told: Callable[[str], str] = str


class RecipeError(UserError):
    """Mistakes in a recipe, with what is right of it.

    Args:
        problems: The mistakes.
        drafts: The recipe, or those of its stages; none where too little is left.
    """

    def __init__(self, problems: Sequence[str], drafts: Sequence[Draft] = ()) -> None:
        super().__init__(problems)
        self.drafts = list(drafts)


class Refusal(UserError):
    """TRL or transformers refuse a config."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: See `grace_rl.recipe.source.read_source`.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    return recipe_of(read_source(path, overrides))


def kept_recipe(run: str | Path) -> Recipe:
    """The recipe of a run directory, only to be read: nothing that it names is looked for.

    Raises:
        UserError: There is none, or it is not of this version.
    """
    return recipe_of(read_source(Path(run) / "recipe.yaml"), look=False)


def recipe_of(source: RecipeSource, look: bool = True) -> Recipe:
    """A recipe from what was read; see `load_recipe`.

    Args:
        source: What was read.
        look: Look for the model, files and rewards that it names; importing a reward runs its code.
    """
    method = source.tree.get("method", "grpo")
    if method not in list(METHODS):  # a list could be no key
        source.add(("method",), f"must be one of {', '.join(METHODS)}, not {shown(method)}")
        method = "grpo"
    config, name = METHODS[method].config_class(), default_name(source.path)
    _check_keys(source, method)
    model = _typed(source, model_class(), source.tree)
    if model.get(
        "use_peft"
    ):  # TRL's .05 takes a third of a training step on a CPU (performance.md)
        model.setdefault("lora_dropout", 0.0)
    given = _typed(source, config, source.tree)
    training = fields.own_defaults(config) | {"output_dir": f"runs/{name}"} | given
    training["output_dir"] = training["output_dir"] or f"runs/{name}"
    data = read_data(source, look)
    evaluation = None
    if source.tree.get("evaluation") is not None:
        evaluation = read_section(EvaluationConfig, source, ("evaluation",))
    _check_model(source, model, look)
    wrong = set(fields.keys_of(config)) & set(source.tree) - set(given)
    draft = fields.draft(config, training)
    source.take(fields.broken_rules(draft, wrong))
    source.take([*kwargs_problems(draft), *evaluation_problems(draft)])
    if data is not None and data.dataset_name != SCENES and source.tree.get("evaluation"):
        source.add(("evaluation",), "only scenes can be scored during training; remove it")
    if METHODS[method].rollouts and data is not None and data.rows is not None:
        rule = functools.partial(row_problems, rows=data.rows, key="dataset_rows")
        source.take(fields.broken_rules(draft, wrong | source.reported, [rule]))
    rewards = _rewards(source, method)
    if look:
        source.take([*idle_problems(draft, given), *loading_problems(draft, model)])
        source.take([*file_problems(training), *package_problems(draft, model)])
        _look_for_rewards(source, rewards, draft, wrong | source.reported)
    if data is None:
        raise RecipeError(list(dict.fromkeys(source.problems)))
    recipe = Recipe(method, model, training, data, rewards, evaluation, name, source)
    if source.problems:
        drafts = [Draft(recipe, source.reported)] if "method" not in source.reported else []
        raise RecipeError(list(dict.fromkeys(source.problems)), drafts)
    return recipe


def model_class() -> Any:
    """TRL's `ModelConfig`."""
    from trl import ModelConfig

    return ModelConfig


def recipe_keys(method: str) -> list[str]:
    """Every key that a recipe of a method may have."""
    config = METHODS[method].config_class()
    return [*OWN_KEYS, *fields.keys_of(model_class()), *fields.keys_of(config)]


def describe(recipe: Recipe, rows: int | None) -> list[str]:
    """What a run of the recipe loads and does, a line each.

    Args:
        recipe: A loaded recipe.
        rows: Number of rows where known.
    """
    data = recipe.data
    counted = "not loaded yet" if rows is None else f"{rows} rows"
    lines = [
        f"model      {recipe.model['model_name_or_path']}",
        f"rows       {data.dataset_name}, split {data.train_split}: {counted}",
    ]
    if METHODS[recipe.method].rollouts:
        config = recipe.config
        trained = trained_roles(config.roles)
        examples, prompts = rows_per_batch(config), rows_per_batch(config) * len(trained)
        lines.append(
            f"batch      {examples} rows x {len(trained)} trained roles ({', '.join(trained)}) = "
            f"{prompts} prompts, x {config.num_generations} = {batch_size(config)} rollouts "
            "per generation batch"
        )
        lines.append(
            "rewards    "
            + ", ".join(f"{r.label or r.name} (weight {r.weight:g})" for r in recipe.rewards)
        )
    lines.append(f"output     {recipe.training['output_dir']}")
    return lines


def default_name(path: Path) -> str:
    """A recipe's name, from its file: see `Recipe.name`."""
    stem, folder = path.stem, path.resolve().parent
    if stem == "recipe":  # the one kept in a run directory
        return folder.name
    one_of_many = stem in METHODS or folder.parent.name == "recipes"
    return f"{folder.name}-{stem}" if one_of_many else stem


# --- the parts of a recipe --------------------------------------------------------------------


def _check_keys(source: RecipeSource, method: str) -> None:
    known = recipe_keys(method)
    for key in source.tree:
        if key not in known:
            others = [other for other in METHODS if other != method and key in recipe_keys(other)]
            hint = f" (it belongs to method: {' or '.join(others)})" if others else ""
            source.add((key,), unknown_recipe_key(key, known) + hint)


def _typed(source: RecipeSource, config: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config class that were given, typed; wrong ones are left out."""
    keys = fields.keys_of(config)
    right, wrong = fields.typed(config, {key: tree[key] for key in tree if key in keys})
    for path, message in wrong:
        source.add(path, message)
    return right


def _check_model(source: RecipeSource, model: dict[str, Any], look: bool) -> None:
    name = model.get("model_name_or_path")
    if not name:
        source.missing("model_name_or_path", "give scenes, a folder or a hub id")
    elif look and looks_like_path(name) and not (Path(name) / "config.json").is_file():
        source.add(("model_name_or_path",), missing(f"model in {name} (no config.json)"))
    if not model.get("use_peft"):
        for key in model:
            if key.startswith("lora_") or key in ("use_rslora", "use_dora"):
                source.add((key,), "has no effect without use_peft: true")


# --- rewards ----------------------------------------------------------------------------------


def _rewards(source: RecipeSource, method: str) -> list[RewardSpec]:
    if METHODS[method].rollouts:
        return reward_specs(source)
    if source.tree.get("rewards"):
        message = f"method: {method} writes nothing that could be rewarded; remove it"
        source.add(("rewards",), message)
    return []


def _look_for_rewards(
    source: RecipeSource, specs: list[RewardSpec], config: Any, wrong: set[str]
) -> None:
    loaded = source.collect(lambda: named(LOAD_REWARDS)(specs, source.path.parent))
    if loaded:
        rule = functools.partial(named(REWARD_RULE), rewards=loaded)
        source.take(fields.broken_rules(config, wrong, [rule]))
