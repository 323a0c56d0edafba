"""Texts from a file of any size, one after the other, checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from grace_rl.data.files import SHOWN_PROBLEMS, file_records
from grace_rl.errors import UserError


@dataclass(frozen=True)
class TextSource:
    """A file of texts (see `grace_rl.data.files`), and the columns to read.

    Attributes:
        path: The file.
        text: Column of the texts, None to read none.
        id: Column of the ids, in all rows or in none; without it rows are numbered from 0.
        rationale: Column of stored rationales, None to read none. An empty one is a rationale too.
        shard: `(i, n)`, i from 1 to n: every n-th row, beginning with the i-th.
    """

    path: Path
    text: str | None = "text"
    id: str = "id"
    rationale: str | None = None
    shard: tuple[int, int] = (1, 1)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The shard's rows, `{id, text?, rationale?}`.

        Raises:
            UserError: A row is bad; says in which line.
        """
        for row in self._checked():
            if isinstance(row, str):
                raise UserError(row)
            yield row

    def check(self) -> tuple[int, type]:
        """Read all of the file once: the shard's number of rows, and the type of their ids.

        Raises:
            UserError: Rows are bad, listed together with file and line, or there are none.
        """
        problems: list[str] = []
        bad = count = 0
        kind: type = int
        for row in self._checked():
            if isinstance(row, str):
                bad += 1
                problems += [row] if bad <= SHOWN_PROBLEMS else []
            else:
                count += 1
                kind = type(row["id"])
        if bad > SHOWN_PROBLEMS:
            problems.append(f"... and {bad - SHOWN_PROBLEMS} more like these")
        if problems:
            raise UserError(problems)
        if not count:
            of = "" if self.shard[1] == 1 else f" in shard {self.shard[0]}/{self.shard[1]}"
            raise UserError(f"{self.path}: has no rows{of}")
        return count, kind

    def _checked(self) -> Iterator[dict[str, Any] | str]:
        """Rows, or what is wrong with them."""
        first, step = self.shard
        kind: type | None = None  # of the ids, as in the file's first good row
        given = False  # whether that row has one
        for number, (place, record) in enumerate(file_records(self.path)):
            mine = number % step == first - 1
            if kind is not None and not mine:
                continue
            if isinstance(record, str):
                if mine:
                    yield f"{place}: {record}"
                continue
            row, problem = self.row(number, record)
            if not problem:
                if kind is None:
                    kind, given = type(row["id"]), record.get(self.id) is not None
                if (record.get(self.id) is not None) is not given:
                    problem = f"column {self.id} is in some rows only; give all rows an id, or none"
                elif type(row["id"]) is not kind:
                    problem = (
                        f"{self.id} is {row['id']!r}, but those before it are {_TYPES[kind]}; "
                        "give all rows ids of one type"
                    )
            if mine:
                yield f"{place}: {problem}" if problem else row

    def row(self, number: int, record: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """`{id, text?, rationale?}` of a record, and what is wrong with it, "" if nothing."""
        row = {"id": number if record.get(self.id) is None else record[self.id]}
        wide = isinstance(row["id"], int) and not -(2**63) <= row["id"] < 2**63
        if type(row["id"]) not in _TYPES or wide:
            return row, f"{self.id} must be a text or a whole number (64 bits), not {row['id']!r}"
        for name, column in (("text", self.text), ("rationale", self.rationale)):
            if column is None:
                continue
            value = record.get(column)
            if value is None and column in record:
                value = ""
            if not isinstance(value, str):
                there = ", ".join(map(str, record)) or "nothing"
                wrong = "is no text" if column in record else f"is not there, but {there}"
                return row, f"column {column} {wrong}"
            if name == "text" and not value.strip():
                return row, f"{column} is empty"
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                return row, f"{column} is not valid UTF-8 (character {error.start + 1})"
            row[name] = value
        return row, ""


_TYPES = {str: "texts", int: "numbers"}


class InOrder:
    """Rows of something that is read from its beginning on: any run of them.

    Runs that are not asked for in order cost a new beginning. A copy, in another process too,
    begins anew.

    Args:
        begin: Gives the rows from the first on.
    """

    def __init__(self, begin: Callable[[], Iterable[Any]]) -> None:
        self._begin = begin
        self._rows: Iterator[Any] = iter(())
        self._at: int | None = None  # the row that comes next

    def read(self, start: int, count: int) -> list[Any]:
        """Rows `start` to `start + count - 1`, counted from 0, as far as there are so many."""
        if self._at is None or start < self._at:
            self._rows, self._at = iter(self._begin()), 0
        skipped = start - self._at
        next(islice(self._rows, skipped, skipped), None)
        self._at = start + count
        return list(islice(self._rows, count))

    def __reduce__(self) -> tuple[Any, ...]:
        return InOrder, (self._begin,)


def in_chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` rows; the last may be shorter.

    >>> [*in_chunks(iter("abcde"), 2)]
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    while chunk := list(islice(rows, size)):
        yield chunk
