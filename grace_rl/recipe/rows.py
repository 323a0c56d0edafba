"""The part of a recipe about rows: where they come from, and which are scored."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_rl.recipe.keys import convert, nearest
from grace_rl.recipe.source import KeyPath, RecipeSource

SCENES = "scenes"
SCENES_SPLITS = ("train", "validation", "test", "transfer")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from.

    Attributes:
        dataset_name: `scenes`, a local file (.jsonl, .csv, both also as .gz, or .parquet) or a hub
            id.
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


def is_local_file(dataset_name: str) -> bool:
    """Whether a data set is a local file, by its ending.

    >>> is_local_file("rows.jsonl.gz"), is_local_file("sentence-transformers/all-nli")
    (True, False)
    """
    return dataset_name.endswith(ROW_SUFFIXES)


def looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def data_config(source: RecipeSource, values: dict[str, Any]) -> DataConfig:
    def problem(key: str, message: str) -> None:
        source.problems.append(source.problem((key,), message))

    name = values.get("dataset_name")
    if not name:
        source.missing("dataset_name", "give scenes, a local file or a hub id")
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


def evaluation_config(
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
