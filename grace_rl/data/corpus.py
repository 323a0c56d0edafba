"""Texts in partitions: one file read in order, or many parquet files of which any piece is read.

A partition is what one worker does at a time and what becomes one part of an output. A partition
is always the same rows: it is told by its file and by its place there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from grace_rl.data.files import SHOWN_PROBLEMS, file_system, is_address
from grace_rl.data.texts import InOrder, TextSource
from grace_rl.errors import UserError, first_line
from grace_rl.run.identity import file_digest


class Partition(NamedTuple):
    """Rows of one file, one after the other.

    Attributes:
        number: Of the partition among all, from 0.
        file: The file's path.
        start: Number of its first row within the file, from 0.
        rows: How many, at least 1.
        first: The number of the file's row 0 among all rows: the id of rows that have none.
    """

    number: int
    file: str
    start: int
    rows: int
    first: int = 0


class Texts(Protocol):
    """Where texts come from, in partitions."""

    @property
    def columns(self) -> TextSource:
        """What is read of a row; its `path` counts for a single file only."""

    def partitions(self, size: int) -> tuple[list[Partition], type]:
        """Partitions of `size` rows or fewer, and the type of the ids.

        Raises:
            UserError: There are no rows, or no texts in them.
        """

    def read(self, partition: Partition) -> list[dict[str, Any] | str]:
        """The partition's rows, `{id, text?, rationale?}`; of a bad one what is wrong, a str.

        Raises:
            UserError: The file cannot be read.
        """

    def digests(self) -> dict[str, str]:
        """File -> a digest of its content."""


def texts_of(place: str, columns: TextSource) -> Texts:
    """The texts of a place: a file, or a folder, pattern (`*`) or address (`s3://...`) of parquet.

    Args:
        place: Where they are.
        columns: What to read of a row.
    """
    if is_address(place) or "*" in place or Path(place).is_dir():
        return ParquetTexts(place, columns)
    return OneFile(columns)


class OneFile:
    """A file of any kind, checked as a whole before anything is done, and read in its order."""

    def __init__(self, columns: TextSource) -> None:
        self._columns = columns
        self._rows = InOrder(columns.rows)

    @property
    def columns(self) -> TextSource:
        return self._columns

    def partitions(self, size: int) -> tuple[list[Partition], type]:
        rows, kind = self.columns.check()
        return _cut(str(self.columns.path), rows, size, 0, 0), kind

    def read(self, partition: Partition) -> list[dict[str, Any] | str]:
        return self._rows.read(partition.start, partition.rows)

    def digests(self) -> dict[str, str]:
        return {str(self.columns.path): file_digest(self.columns.path)}


@dataclass(frozen=True)
class ParquetTexts:
    """Parquet files behind any file system that fsspec knows, by their row groups.

    Only footers are read before the work; bad rows are met, and told, on the way.

    Attributes:
        place: A folder, a pattern or an address of either.
        columns: What to read of a row.
    """

    place: str
    columns: TextSource

    def partitions(self, size: int) -> tuple[list[Partition], type]:
        parts: list[Partition] = []
        problems: list[str] = []
        kinds: dict[type, str] = {}
        first = 0
        for path in self._files:
            with self._open(path) as file:
                wrong = self._wrong(file.schema_arrow, kinds, path)
                problems += [f"{path}: {what}" for what in wrong]
                rows = file.metadata.num_rows
            parts += _cut(path, rows, size, len(parts), first)
            first += rows
        if problems[SHOWN_PROBLEMS:]:
            more = len(problems) - SHOWN_PROBLEMS
            problems[SHOWN_PROBLEMS:] = [f"... and {more} more like these"]
        if problems:
            raise UserError(problems)
        if not parts:
            raise UserError(f"{self.place}: has no rows")
        return parts, next(iter(kinds))

    def read(self, partition: Partition) -> list[dict[str, Any] | str]:
        columns = (self.columns.id, self.columns.text, self.columns.rationale)
        with self._open(partition.file) as file:
            names = [name for name in columns if name and name in file.schema_arrow.names]
            start, groups = partition.start, []
            before = 0  # rows of the groups that lie before
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if before + rows <= partition.start:
                    start -= rows
                elif before < partition.start + partition.rows:
                    groups.append(group)
                before += rows
            records = _slice(file, groups, names, start, partition.rows)
            return [
                self._row(partition, number, record)
                for number, record in enumerate(records, partition.start)
            ]

    def _row(
        self, partition: Partition, number: int, record: dict[str, Any]
    ) -> dict[str, Any] | str:
        row, problem = self.columns.row(partition.first + number, record)
        if self.columns.id in record and record[self.columns.id] is None:
            problem = f"{self.columns.id} is missing"
        return f"{partition.file}: row {number + 1}: {problem}" if problem else row

    def digests(self) -> dict[str, str]:
        """By the bytes of local files; elsewhere by what the store tells of a file's version."""
        local = "file" in _protocols(self._system)
        if local:
            return {path: file_digest(path) for path in self._files}
        return {path: _told(self._system.checksum(path)) for path in self._files}

    @cached_property
    def _system(self) -> Any:
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[Any, str]:
        return file_system(self.place)

    @cached_property
    def _files(self) -> list[str]:
        system, path = self._found
        try:
            pattern = (
                path if "*" in path or system.isfile(path) else path.rstrip("/") + "/*.parquet"
            )
            files = sorted(system.glob(pattern))
        except OSError as error:
            raise UserError(f"{self.place}: cannot be listed: {error}") from error
        # Names that begin so are notes of whoever wrote the folder.
        files = [file for file in files if not file.rpartition("/")[2].startswith(("_", "."))]
        if not files:
            raise UserError(f"{self.place}: there are no parquet files")
        return files

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, filesystem=self._system, memory_map=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{path}: is not parquet that can be read: {reason}") from error

    def _wrong(self, schema: pa.Schema, kinds: dict[type, str], path: str) -> list[str]:
        """What is wrong with a file's columns."""
        there = ", ".join(schema.names) or "nothing"
        needed = [name for name in (self.columns.text, self.columns.rationale) if name]
        wrong = [
            f"column {name} is not there, but {there}"
            for name in needed
            if name not in schema.names
        ]
        kind: type = int
        if self.columns.id in schema.names:
            told = schema.field(self.columns.id).type
            if pa.types.is_string(told) or pa.types.is_large_string(told):
                kind = str
            elif not pa.types.is_integer(told):
                wrong.append(f"{self.columns.id} must be texts or whole numbers, not {told}")
        kinds.setdefault(kind, path)
        if len(kinds) > 1:
            other = next(iter(kinds.values()))
            wrong.append(f"its ids are of another type than those of {other}")
            kinds.pop(kind)
        return wrong


def _slice(
    file: pq.ParquetFile, groups: list[int], names: list[str], start: int, rows: int
) -> Iterator[dict[str, Any]]:
    """Rows of some row groups, in memory for a thousand at a time."""
    at = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=names):
        if at < start + rows and at + len(batch) > start:
            skipped = max(0, start - at)
            yield from batch.slice(skipped, start + rows - at - skipped).to_pylist()
        at += len(batch)


def _cut(file: str, rows: int, size: int, number: int, first: int) -> list[Partition]:
    starts = range(0, rows, size)
    return [
        Partition(number + i, file, start, min(size, rows - start), first)
        for i, start in enumerate(starts)
    ]


def _protocols(system: Any) -> tuple[str, ...]:
    protocol = system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _told(version: Any) -> str:
    return hashlib.blake2b(str(version).encode(), digest_size=16).hexdigest()
