"""The tasks of `grace-rl evaluate`: a YAML list of mteb task names and local files.

    - STSBenchmark                                                # a task of mteb, from the hub
    - {name: stsb, kind: sts, path: data/stsb-test.jsonl.gz}
    - {name: cranfield, kind: retrieval, path: data/cranfield}    # .corpus, .queries, .qrels
    - {name: trec, kind: classification, path: data/trec}         # .train, .test

A path is a file, or the beginning of several files' names; the ending (`.jsonl`, `.jsonl.gz`,
`.csv`, `.parquet`) may be left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from grace_rl.data.files import SHOWN_PROBLEMS, file_records
from grace_rl.errors import UserError, missing
from grace_rl.recipe.rows import ROW_SUFFIXES
from grace_rl.recipe.schema import MOST_EXACT, Section, shown, validated
from grace_rl.recipe.source import RecipeSource, read_list
from grace_rl.run.identity import digest

# kind -> part of the task -> columns that a row must have, with their types
NUMBER = (int, float)
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "sts": {"": {"sentence1": str, "sentence2": str, "score": NUMBER}},
    "retrieval": {
        ".corpus": {"_id": str, "text": str},
        ".queries": {"_id": str, "text": str},
        ".qrels": {"query-id": str, "corpus-id": str, "score": int},
    },
    "reranking": {"": {"query": str, "sentence": str, "relevant": int}},
    "classification": {
        ".train": {"text": str, "label": (str, int)},
        ".test": {"text": str, "label": (str, int)},
    },
    "clustering": {"": {"text": str, "label": (str, int)}},
    "pair_classification": {"": {"sentence1": str, "sentence2": str, "label": int}},
}
ENDINGS = ("", *ROW_SUFFIXES)


class TaskEntry(Section):
    """One entry of a task file: the name of one of mteb's tasks, or local files.

    Args:
        name: As scores call it, or mteb's.
        kind: Of local files.
        path: A file, or the beginning of the files' names; `~` is the home directory.
        rows: Only so many, at least 2, spread evenly over the file (over `.train` and `.test`); of
            retrieval and reranking so many queries.
    """

    name: str = Field(min_length=1)
    kind: (
        Literal[
            "sts",
            "retrieval",
            "reranking",
            "classification",
            "clustering",
            "pair_classification",
        ]
        | None
    ) = None
    path: str | None = None
    rows: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if not self.name.strip():
            raise UserError("name: must be a text that is not empty")
        if self.kind is None and self.path is None:
            if self.rows is not None:
                raise UserError("rows: is for local files; leave it out")
            _check_mteb_name(self.name)
        elif self.kind is None:
            raise UserError(f"kind: is missing; there are {', '.join(KINDS)}")
        elif self.path is None:
            raise UserError("path: is missing; give a file, or the beginning of the files' names")
        return self


@dataclass(frozen=True)
class LocalTask:
    """A task of local files.

    Attributes:
        name: As scores call it.
        kind: A key of `KINDS`.
        parts: Part of the task -> its rows, checked.
    """

    name: str
    kind: str
    parts: dict[str, list[dict[str, Any]]]


Task = LocalTask | str
"""A local task, or the name of one of mteb's."""


def load_tasks(path: str | Path) -> list[Task]:
    """Read a task file, and the files that it names.

    Raises:
        UserError: With every mistake: file and line, the key, what to do.
    """
    entries, source = read_list(path)
    tasks: list[Task] = []
    names: set[str] = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, str | dict):
            message = "must be the name of a task of mteb, or {name, kind, path}"
            source.problems.append(source.problem((i,), message))
            continue
        values = {"name": entry} if isinstance(entry, str) else entry
        if isinstance(values.get("name"), str):
            if values["name"] in names:
                message = f"there are two tasks {values['name']!r}; give each a name of its own"
                source.problems.append(source.problem((i, "name"), message))
            names.add(values["name"])
        checked = validated(TaskEntry, values, source, (i,))
        if checked is not None:
            local = checked.kind is not None
            tasks.append(_local(checked, source, i) if local else checked.name)
    if not entries:
        source.problems.append(f"{path}: names no task")
    return source.settled(tasks)


def tasks_digest(tasks: Sequence[Task]) -> str:
    """Changes with the tasks and with what is in their files."""
    return digest([task if isinstance(task, str) else vars(task) for task in tasks])


def _check_mteb_name(name: str) -> None:
    try:
        import mteb
    except ImportError as error:
        raise UserError(
            f"name: {name} is a task of mteb, which is not installed; install 'grace-rl[mteb]'"
        ) from error
    try:
        mteb.get_task(name)
    except KeyError as error:
        reason = str(error).strip('"')
        raise UserError(
            f"name: mteb has no such task: {reason}; a local one needs kind, path"
        ) from error


def _local(entry: TaskEntry, source: RecipeSource, i: int) -> LocalTask:
    """The task of an entry; what is wrong with its files goes to `source.problems`."""
    where, kind = str(Path(str(entry.path)).expanduser()), str(entry.kind)
    parts: dict[str, list[dict[str, Any]]] = {}
    before = len(source.problems)
    for part, columns in KINDS[kind].items():
        candidates = [Path(where + part + ending) for ending in ENDINGS]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            message = missing(f"{where}{part} with one of the endings {', '.join(ROW_SUFFIXES)}")
            source.problems.append(source.problem((i, "path"), message))
            continue
        try:
            parts[part] = _rows(file, columns)
        except UserError as error:
            source.problems += error.problems
    if len(source.problems) == before:
        if kind == "retrieval":
            _check_ids(where, parts, source.problems)
        if entry.rows is not None:
            _cut(kind, parts, entry.rows)
        part, column, enough, message = ENOUGH[kind]
        if not enough({row.get(column) for row in parts[part]}):
            source.problems.append(f"{where}{part}: {message}")
    return LocalTask(entry.name, kind, parts)


def _cut(kind: str, parts: dict[str, list[dict[str, Any]]], most: int) -> None:
    """Keep so many rows, spread evenly: files are often sorted by source. Of what belongs to a
    query all or nothing is kept."""
    if kind == "retrieval":
        parts[".queries"] = _spread(parts[".queries"], most)
        queries = {row["_id"] for row in parts[".queries"]}
        parts[".qrels"] = [row for row in parts[".qrels"] if row["query-id"] in queries]
    elif kind == "reranking":
        queries = set(_spread(list(dict.fromkeys(row["query"] for row in parts[""])), most))
        parts[""] = [row for row in parts[""] if row["query"] in queries]
    else:
        parts |= {part: _spread(rows, most) for part, rows in parts.items()}


def _spread(items: list[Any], most: int) -> list[Any]:
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _rows(file: Path, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        UserError: With the bad ones, file and line.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    bad = 0
    for place, record in file_records(file):
        if isinstance(record, str):
            wrong = [record]
        else:
            row = _exact(record, columns, of_texts=file.suffix == ".csv")
            rows.append(row)
            wrong = [
                f"{column} must be {WORDS[kind]}, not {shown(row.get(column))}"
                for column, kind in columns.items()
                if not isinstance(row.get(column), kind) or not _is_plain(row[column])
            ]
        bad += bool(wrong)
        if bad <= SHOWN_PROBLEMS:
            problems += [f"{place}: {one}" for one in wrong]
    if bad > SHOWN_PROBLEMS:
        problems.append(f"{file}: ... and {bad - SHOWN_PROBLEMS} more bad rows like these")
    if not rows and not bad:
        problems.append(f"{file}: has no rows")
    if problems:
        raise UserError(problems)
    return rows


def _exact(record: dict[str, Any], columns: dict[str, Any], of_texts: bool) -> dict[str, Any]:
    """A row with the numbers that it must have: 2.0 is a whole one, and cells of CSV are texts."""
    row = dict(record)
    for column, kind in columns.items():
        value = row.get(column)
        if of_texts and isinstance(value, str) and kind in (int, NUMBER):
            with contextlib.suppress(ValueError):
                value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        row[column] = value
    return row


def _is_plain(value: Any) -> bool:
    """Neither true nor false, no NaN or infinity, and no text that UTF-8 does not have."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, bool) and abs(value) <= MOST_EXACT


WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    NUMBER: "a number",
    (str, int): "a text or a whole number",
}

# kind -> part, column, what its different values must be, and what is wrong if they are not
ENOUGH: dict[str, tuple[str, str, Callable[[set[Any]], bool], str]] = {
    "sts": ("", "score", lambda found: len(found) > 1, "all scores are equal; nothing to rank"),
    "pair_classification": ("", "label", {0, 1}.__eq__, "labels must be 0 and 1, and both there"),
    "classification": (".train", "label", lambda found: len(found) > 1, "has a single label"),
    "clustering": ("", "label", lambda found: len(found) > 1, "has a single label"),
    "retrieval": (
        ".qrels",
        "score",
        lambda found: max(found, default=0) >= 1,
        "no score is 1 or more",
    ),
    "reranking": (
        "",
        "relevant",
        lambda found: max(found, default=0) >= 1,
        "nothing is relevant (1 or more)",
    ),
}


def _check_ids(where: str, parts: dict[str, list[dict[str, Any]]], problems: list[str]) -> None:
    for part in (".queries", ".corpus"):
        count = len(parts[part]) - len({row["_id"] for row in parts[part]})
        if count:
            problems.append(f"{where}{part}: {count} rows have the _id of another")
    for key, part in (("query-id", ".queries"), ("corpus-id", ".corpus")):
        known = {row.get("_id") for row in parts[part]}
        unknown = [row[key] for row in parts[".qrels"] if row.get(key) not in known]
        if unknown:
            problems.append(
                f"{where}.qrels: {len(unknown)} rows name a {key} that is not in "
                f"{where}{part}, first {unknown[0]!r}"
            )
