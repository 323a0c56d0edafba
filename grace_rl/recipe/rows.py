"""The part of a recipe about rows: where they come from, and which are scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from grace_rl.errors import UserError, missing
from grace_rl.recipe.schema import Items, Section, validated
from grace_rl.recipe.source import RecipeSource

SCENES = "scenes"
Split = Literal["train", "validation", "test", "transfer"]
SCENES_SPLITS: tuple[str, ...] = get_args(Split)
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
MOST_SCENES = 1_000_000


class ScenesOptions(Section):
    """Keyword arguments of `grace_rl.data.scenes.rows`, which describes them."""

    form: Literal["triplet", "quad", "pair", "unsupervised", "sft"] = "triplet"
    seed: int = Field(0, ge=0)
    clean_rows: int = Field(0, ge=0, le=MOST_SCENES)
    facts: Items[int] = Field((3, 6), min_length=2, max_length=2)
    copied: float = Field(0.3, ge=0, le=1)
    ordered: float = Field(0.5, ge=0, le=1)
    filler: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _elsewhere(cls, values: Any) -> Any:
        for key, other in (("split", "dataset_train_split"), ("count", "dataset_rows")):
            if isinstance(values, dict) and key in values:
                raise UserError(f"{key}: is set by {other}")
        return values


class DataConfig(Section):
    """Where rows come from. In a recipe each key begins with `dataset_`.

    Args:
        dataset_name: `scenes`, a local file (.jsonl, .csv, both also as .gz, or .parquet) or a hub
            id.
        config: Configuration of a hub data set.
        train_split: Split of a hub data set or of scenes.
        rows: Only the first so many rows, at least 1; None takes all (scenes: as many as `rows()`
            makes by default).
        options: Of scenes.
        columns: Our column -> the file's, for example `{query: anchor}`.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: f"dataset_{name.removeprefix('dataset_')}",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    dataset_name: str = Field(min_length=1)
    config: str | None = None
    train_split: str = "train"
    rows: int | None = Field(None, ge=1)
    options: ScenesOptions = ScenesOptions()
    columns: dict[str, str] = {}

    @model_validator(mode="after")
    def _rules(self) -> Self:
        name, is_file, problems = self.dataset_name, is_local_file(self.dataset_name), []
        if name != SCENES and self.options.model_fields_set:
            problems.append("dataset_options: only scenes takes options; remove it")
        if name == SCENES and self.columns:
            problems.append("dataset_columns: the columns of scenes need no other names; remove it")
        if name == SCENES and self.train_split not in SCENES_SPLITS:
            splits = ", ".join(SCENES_SPLITS)
            problems.append(
                f"dataset_train_split: scenes has the splits {splits}, not {self.train_split!r}"
            )
        if name == SCENES and (self.rows or 0) > MOST_SCENES:
            problems.append(f"dataset_rows: must be at most {MOST_SCENES}, not {self.rows}")
        if (is_file or name == SCENES) and self.config is not None:
            problems.append("dataset_config: only a hub data set has configurations; remove it")
        if is_file and self.train_split != "train":
            problems.append("dataset_train_split: a local file has no splits; remove it")
        if problems:
            raise UserError(problems)
        return self


DATA_KEYS = tuple(str(field.alias) for field in DataConfig.model_fields.values())


class EvaluationConfig(Section):
    """Scored before and after training (scenes only).

    Args:
        dataset_splits: Splits of scenes.
        rows: Rows of each split, at least 2.
    """

    recipe_key = "evaluation"

    dataset_splits: Items[Split] = ("test", "transfer")
    rows: int = Field(200, ge=2, le=MOST_SCENES)


def is_local_file(dataset_name: str) -> bool:
    """Whether a data set is a local file, by its ending.

    >>> is_local_file("rows.jsonl.gz"), is_local_file("sentence-transformers/all-nli")
    (True, False)
    """
    return dataset_name.endswith(ROW_SUFFIXES)


def looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def read_data(source: RecipeSource, look: bool = True) -> DataConfig | None:
    """The `dataset_` keys of a file; None where one is wrong.

    Args:
        source: The file.
        look: A local file must be there.
    """
    if not source.tree.get("dataset_name"):
        source.missing("dataset_name", "give scenes, a local file or a hub id")
    values = {key: source.tree[key] for key in DATA_KEYS if source.tree.get(key) is not None}
    data: DataConfig | None = validated(DataConfig, {"dataset_name": SCENES} | values, source)
    if look and data is not None:
        source.take(file_problems(data.dataset_name))
    return data


def file_problems(dataset_name: str) -> Iterator[str]:
    """A local file must be there, and of a kind that can be read."""
    is_file = is_local_file(dataset_name)
    if is_file and not Path(dataset_name).is_file():
        yield f"dataset_name: {missing(f'file {dataset_name}')}"
    if is_file or dataset_name == SCENES:
        return
    if looks_like_path(dataset_name) or Path(dataset_name).is_file():
        yield f"dataset_name: {dataset_name}: a local file must end in {', '.join(ROW_SUFFIXES)}"
