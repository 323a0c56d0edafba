"""The one reader of files of records: JSON lines, CSV and parquet, compressed or not.

Rows of recipes, texts of `embed`, tasks of `evaluate` and the chunks of `curate` all come through
here, so that what one of them takes all of them take, and a mistake has the same place everywhere.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import split_protocol, url_to_fs

from grace_rl.errors import UserError, first_line, missing
from grace_rl.recipe.rows import ROW_SUFFIXES

SHOWN_PROBLEMS = 20
GZIP = b"\x1f\x8b"
PANDAS_INDEX = "__index_level_"  # beginning of the name that pandas gives a stored index

Record = tuple[str, Any]
"""`(place, record)`; a record that cannot be read is the reason, a str."""


def is_address(place: str) -> bool:
    """Whether a place is one of fsspec's: `s3://bucket/texts`, and not a path of this machine."""
    return split_protocol(place)[0] is not None


def file_system(place: str) -> tuple[Any, str]:
    """The file system of an address or a path, as fsspec has it, and the path within.

    Raises:
        UserError: fsspec knows no such file system, or lacks the package for it.
    """
    try:
        system, path = url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place}: {first_line(error)}") from error
    return system, path


def file_records(path: Path) -> Iterator[Record]:
    """The records of a file, one after the other, in constant memory.

    What is compressed with gzip is known by its content. Bytes that mark the byte order, blank
    lines and the index of pandas are no part of the records; an empty cell of CSV is null.

    Yields:
        `(place, record)`; a record that cannot be read is the reason, a str. The place is
        `file:line`, the line where the record begins, or `file: row n`, counted from 1, in parquet.

    Raises:
        UserError: There is no such file, it is damaged, or of no kind that is known.
    """
    name = path.name.removesuffix(".gz")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = next((read for ending, read in readers.items() if name.endswith(ending)), None)
    if reader is None or not path.name.endswith(ROW_SUFFIXES):
        raise UserError(f"{path}: must be one of {', '.join(ROW_SUFFIXES)}")
    try:
        yield from reader(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing('such file')}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked; damage is a mistake in words."""
    with path.open("rb") as file:
        packed = file.peek(2)[:2] == GZIP
        if path.suffix == ".gz" and not packed and file.peek(1):
            raise UserError(f"{path}: is not a gzip file, though its name ends in .gz")
        with gzip.open(file) if packed else file as plain:
            try:
                yield plain  # type: ignore[misc]  # both give lines of bytes
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: the gzip file is damaged: {error}") from error


def _jsonl(path: Path) -> Iterator[Record]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _object(line, first=number == 1)


def _object(line: bytes, first: bool) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at character {error.pos + 1}"
    except ValueError:
        return "is not JSON that can be read: a number has too many digits"
    except RecursionError:
        return "is not JSON that can be read: nested too deeply"
    if isinstance(value, dict):
        return value
    return f"is not an object with keys but a {type(value).__name__}"


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a cell may be as long as a text
    with _opened(path) as lines:
        # Undecodable bytes become surrogates, which the check of the texts reports by line.
        decoded = (
            line.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape")
            for number, line in enumerate(lines)
        )
        cells = csv.reader(decoded)
        start = 1
        try:
            header = next(cells, [])
            if doubled := sorted({name for name in header if header.count(name) > 1}):
                raise UserError(f"{path}:1: two columns have the name {doubled[0]!r}")
            start = cells.line_num + 1
            for row in cells:
                if len(row) > len(header):
                    yield f"{path}:{start}", f"has more cells than the header's {len(header)}"
                elif row:
                    values = [cell or None for cell in row] + [None] * (len(header) - len(row))
                    yield f"{path}:{start}", dict(zip(header, values, strict=True))
                start = cells.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{start}: is not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            kept = [name for name in names if not name.startswith(PANDAS_INDEX)]
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.select(kept).to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: is not parquet that can be read: {first_line(error)}") from error
