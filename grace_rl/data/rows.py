"""Rows from a file, a hub data set or the built-in world, checked before anything starts.

A row is supervised, `{query, positive, negative?, negative_positive?, id?, source?}`, or
unsupervised, `{text}`. `negative` may be a text or a list of texts and becomes a list. Other
columns are kept: rewards see them, and the cold start reads `rationale` and `rationale_positive`.
Every process reads the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_rl.data.files import SHOWN_PROBLEMS, file_records
from grace_rl.errors import UserError, first_line
from grace_rl.recipe.rows import is_local_file

if TYPE_CHECKING:
    from grace_rl.recipe.rows import DataConfig

Row = dict[str, Any]


def read_rows(data: DataConfig) -> list[Row]:
    """The rows of a recipe's `dataset_*` keys.

    Args:
        data: `recipe.data`. Files are read line by line and only as far as `rows` asks.

    Raises:
        UserError: There is no such data, it has no rows, or rows are bad: empty or missing texts,
            wrong types, invalid UTF-8 or JSON, supervised and unsupervised rows mixed. Bad rows are
            listed together, with file and line.
    """
    return list(stream_rows(data))


def stream_rows(data: DataConfig) -> Iterator[Row]:
    """The good rows of `read_rows` one by one, without keeping them.

    Raises:
        UserError: As `read_rows`, after the last row.
    """
    if data.dataset_name == "scenes":
        from grace_rl.data import scenes

        count = {} if data.rows is None else {"count": data.rows}
        options: dict[str, Any] = {**data.options.given(), **count}
        yield from scenes.rows(split=data.train_split, **options)  # type: ignore[arg-type]
        return
    problems: list[str] = []
    good = bad = 0
    first_kind: tuple[str, str] | None = None  # (kind, place) of the first good row
    for place, record in _records(data):
        if data.rows is not None and good + bad >= data.rows:
            break
        if isinstance(record, str):
            found = [record]
        else:
            row, found = _checked(record, data.columns)
            kind = "unsupervised" if "text" in row else "supervised"
            if not found and first_kind is None:
                first_kind = (kind, place)
            if not found and first_kind is not None and kind != first_kind[0]:
                found = [
                    f"is {kind}, but the rows before it are {first_kind[0]} ({first_kind[1]}); "
                    "keep one kind"
                ]
            if not found:
                good += 1
                yield row
        bad += bool(found)
        problems += [f"{place}: {problem}" for problem in found]
    if len(problems) > SHOWN_PROBLEMS:
        problems[SHOWN_PROBLEMS:] = [
            f"... and {len(problems) - SHOWN_PROBLEMS} more like these ({bad} bad rows in all)"
        ]
    if problems:
        raise UserError(problems)
    if not good:
        raise UserError(f"{data.dataset_name}: has no rows")


def _records(data: DataConfig) -> Iterator[tuple[str, Any]]:
    """`(place, record)` one after the other; a record that cannot be read is the reason, a str."""
    if is_local_file(data.dataset_name):
        return file_records(Path(data.dataset_name).expanduser())
    return _hub(data)


def _hub(data: DataConfig) -> Iterator[tuple[str, Any]]:
    import datasets

    split = data.train_split if data.rows is None else f"{data.train_split}[:{data.rows}]"
    try:
        found = datasets.load_dataset(data.dataset_name, data.config, split=split)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        offline = datasets.config.HF_HUB_OFFLINE
        hint = (
            "HF_HUB_OFFLINE is set, so only data sets in the cache are found"
            if offline
            else "check name and split"
        )
        where = (
            f"{data.dataset_name} ({data.config}, {split})"
            if data.config
            else f"{data.dataset_name} ({split})"
        )
        raise UserError(
            f"dataset_name: cannot load {where} from the hub: {reason}; {hint}"
        ) from error
    for number, record in enumerate(found):
        yield f"{data.dataset_name}: row {number}", record


def _checked(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Row, list[str]]:
    """The row under our names, and what is wrong with it."""
    row = {key: value for key, value in record.items() if key not in columns.values()}
    row |= {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    problems = [
        f"has no column {theirs!r}, which dataset_columns takes for {ours}"
        for ours, theirs in columns.items()
        if theirs not in record
    ]
    if problems:
        return row, problems
    supervised = "query" in row or "positive" in row
    if supervised and "text" in row:
        return row, ["has both text and query or positive; a row is one or the other"]
    if not supervised and "text" not in row:
        there = ", ".join(map(str, row)) or "nothing"
        return row, [
            f"has neither query and positive nor text, but {there}; "
            "dataset_columns gives columns other names"
        ]
    required = ("query", "positive") if supervised else ("text",)
    for key in required:
        problems += (
            _text_problems(key, row[key]) if row.get(key) is not None else [f"{key} is missing"]
        )
    if not supervised:
        return row, problems

    negatives = row.get("negative")
    negatives = (
        [] if negatives is None else [negatives] if isinstance(negatives, str) else negatives
    )
    if isinstance(negatives, list):
        many = len(negatives) > 1
        for i, negative in enumerate(negatives):
            problems += _text_problems(f"negative[{i}]" if many else "negative", negative)
    else:
        problems.append(f"negative must be a text or a list of texts, not {_say(negatives)}")
    row["negative"] = negatives
    if row.get("negative_positive") is None:
        row.pop("negative_positive", None)
    else:
        problems += _text_problems("negative_positive", row["negative_positive"])
        if not negatives:
            problems.append("negative_positive has no negative to be a paraphrase of")
    return row, problems


def pair_problems(
    method: str, rows: Sequence[Mapping[str, Any]], name: str = "the rows"
) -> list[str]:
    """What a method that needs pairs says of rows that have text alone."""
    if not rows or "query" in rows[0]:
        return []
    return [f"method {method} needs pairs: {name} have text alone; give query and positive"]


def _text_problems(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        return [f"{name} must be a text, not {_say(value)}"]
    if not value.strip():
        return [f"{name} is empty"]
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return [f"{name} is not valid UTF-8 (character {error.start + 1})"]
    return []


def _say(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:37] + '...'} ({type(value).__name__})"
