"""The tasks of `grace-rl evaluate`: a YAML list of mteb task names and local files.

    - STSBenchmark                                                # a task of mteb, from the hub
    - {name: stsb, kind: sts, path: data/stsb-test.jsonl.gz}
    - {name: cranfield, kind: retrieval, path: data/cranfield}    # .corpus, .queries, .qrels
    - {name: trec, kind: classification, path: data/trec}         # .train, .test

A path is a file, or the beginning of several files' names; `.jsonl` or `.jsonl.gz` may be left out.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.recipe.keys import nearest
from grace_rl.recipe.source import read_list
from grace_rl.run.identity import digest

# kind -> part of the task -> columns that a row must have, with their types
NUMBER = (int, float)
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "sts": {"": {"sentence1": str, "sentence2": str, "score": NUMBER}},
    "retrieval": {
        ".corpus": {"_id": str, "text": str},
        ".queries": {"_id": str, "text": str},
        ".qrels": {"query-id": str, "corpus-id": str, "score": NUMBER},
    },
    "reranking": {"": {"query": str, "sentence": str, "relevant": NUMBER}},
    "classification": {
        ".train": {"text": str, "label": (str, int)},
        ".test": {"text": str, "label": (str, int)},
    },
    "clustering": {"": {"text": str, "label": (str, int)}},
    "pair_classification": {"": {"sentence1": str, "sentence2": str, "label": int}},
}
CUT_KINDS = ("sts", "pair_classification", "clustering")  # of which `rows` takes the first
ENDINGS = ("", ".jsonl", ".jsonl.gz")
KEYS = ("name", "kind", "path", "rows")
SHOWN_PROBLEMS = 20


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
    problems = source.problems
    tasks: list[Task] = []
    names: set[str] = set()
    for i, entry in enumerate(entries):

        def problem(message: str, *key: str, i: int = i) -> None:
            words = f"{'.'.join(key)}: " if key else ""
            place = source.places.get((i, *key)) or source.places[(i,)]
            problems.append(f"{place}: {words}{message}")

        if isinstance(entry, str):
            entry = {"name": entry}
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            problem("must be the name of a task of mteb, or {name, kind, path}")
            continue
        for key in entry:
            if key not in KEYS:
                problem(f"unknown key{nearest(key, KEYS)}; there are {', '.join(KEYS)}", key)
        if name in names:
            problem(f"there are two tasks {name!r}; give each a name of its own", "name")
        names.add(name)
        if "kind" not in entry and "path" not in entry:
            if "rows" in entry:
                problem("is for local files; leave it out", "rows")
            _check_mteb_name(name, problem)
            tasks.append(name)
            continue
        kind, where, most = str(entry.get("kind")), entry.get("path"), entry.get("rows")
        if kind not in KINDS:
            hint = nearest(kind, KINDS)
            problem(f"must be one of {', '.join(KINDS)}, not {kind}{hint}", "kind")
        if not isinstance(where, str):
            problem("is missing; give a file, or the beginning of the files' names", "path")
        if most is not None and (not isinstance(most, int) or most < 2):
            problem(f"must be a whole number from 2 on, not {most!r}", "rows")
        elif most is not None and kind in KINDS and kind not in CUT_KINDS:
            problem(f"is for {', '.join(CUT_KINDS)}; leave it out", "rows")
        elif kind in KINDS and isinstance(where, str):
            tasks.append(LocalTask(name, kind, _parts(kind, where, most, problems, problem)))
    if not entries:
        problems.append(f"{path}: names no task")
    if problems:
        raise UserError(problems)
    return tasks


def tasks_digest(tasks: Sequence[Task]) -> str:
    """Changes with the tasks and with what is in their files."""
    return digest([task if isinstance(task, str) else asdict(task) for task in tasks])


def _check_mteb_name(name: str, problem: Any) -> None:
    import mteb

    try:
        mteb.get_task(name)
    except KeyError as error:
        problem(f"mteb has no such task: {str(error).strip(chr(34))}; a local one needs kind, path")


def _parts(
    kind: str, where: str, most: int | None, problems: list[str], problem: Any
) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    before = len(problems)
    for part, columns in KINDS[kind].items():
        found = [Path(where + part + ending) for ending in ENDINGS]
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            problem(
                f"there is no {where}{part}.jsonl or .jsonl.gz; "
                f"paths start at the working directory {Path.cwd()}",
                "path",
            )
            continue
        parts[part] = _rows(file, columns, most, problems)
    if len(problems) > before:
        return parts
    if kind == "retrieval":
        _check_ids(where, parts, problems)
    part, column, enough, message = ENOUGH[kind]
    if not enough({row.get(column) for row in parts[part]}):
        problems.append(f"{where}{part}: {message}")
    return parts


def _rows(
    file: Path, columns: dict[str, Any], most: int | None, problems: list[str]
) -> list[dict[str, Any]]:
    """The rows of a file; bad ones go to `problems` with file and line."""
    rows: list[dict[str, Any]] = []
    bad = 0
    for number, row in _lines(file, problems):
        if most is not None and len(rows) >= most:
            break
        wrong = [
            f"{column} must be {_say(kind)}, not {row.get(column)!r}"
            for column, kind in columns.items()
            if not isinstance(row.get(column), kind) or not _is_plain(row[column])
        ]
        bad += bool(wrong)
        if wrong and bad <= SHOWN_PROBLEMS:
            problems += [f"{file}:{number}: {one}" for one in wrong]
        rows.append(row)
    if bad > SHOWN_PROBLEMS:
        problems.append(f"{file}: ... and {bad - SHOWN_PROBLEMS} more bad rows like these")
    if not rows:
        problems.append(f"{file}: has no rows")
    return rows


def _lines(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    problems.append(f"{file}:{number}: is not JSON in UTF-8: {error}")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    problems.append(f"{file}:{number}: is not an object with keys")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problems.append(f"{file}: the gzip file is damaged after line {number}: {error}")


def _is_plain(value: Any) -> bool:
    """Neither true nor false, no NaN or infinity, and no text that UTF-8 does not have."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, bool) and math.isfinite(value)


def _say(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    words = {str: "a text", int: "a whole number", float: "a number"}
    return "a number" if float in kinds else " or ".join(words[one] for one in kinds)


# kind -> part, column, what its different values must be, and what is wrong if they are not
ENOUGH: dict[str, tuple[str, str, Callable[[set[Any]], bool], str]] = {
    "sts": ("", "score", lambda found: len(found) > 1, "all scores are equal; nothing to rank"),
    "pair_classification": ("", "label", {0, 1}.__eq__, "labels must be 0 and 1, and both there"),
    "classification": (".train", "label", lambda found: len(found) > 1, "has a single label"),
    "clustering": ("", "label", lambda found: len(found) > 1, "has a single label"),
    "retrieval": (".qrels", "score", lambda found: max(found) >= 1, "no score is 1 or more"),
    "reranking": ("", "relevant", lambda found: max(found) >= 1, "nothing is relevant (1 or more)"),
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
