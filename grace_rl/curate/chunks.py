"""Finished work, in files of a few hundred rows each: what is there is never done again.

    <output_dir>/<step>/settings.json   what the rows were made with, and digests of what from
    <output_dir>/<step>/00000.jsonl     rows 0 to chunk_rows - 1, ...

A chunk's name says which rows it holds, whoever wrote it: shards of any number share one folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grace_rl.data.files import file_records
from grace_rl.errors import UserError
from grace_rl.run.files import whole_file, write_json
from grace_rl.run.identity import changed


class Chunks:
    """The chunks of one step.

    Args:
        folder: Made if it is missing.
        settings: What its rows depend on, as JSON has it.
        overwrite: Throw away what was made with other settings.

    Raises:
        UserError: The folder's rows were made with other settings, or nobody knows with which.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        note = folder / "settings.json"
        before = settings
        if note.exists():
            try:
                before = dict(json.loads(note.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                before = {"settings": "damaged"}
        elif self._made():
            before = {"settings": "missing"}
        different = changed(before, settings)
        if different and not overwrite:
            raise UserError(
                f"{folder}: its rows were made with other settings: "
                + ", ".join(f"{key} was {before.get(key)!r}" for key in different)
                + "; choose another output_dir, or --overwrite"
            )
        if different:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if different or not note.exists():
            write_json(note, settings)

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        write_rows(self._path(number), rows)

    def read(self, number: int) -> list[dict[str, Any]]:
        return list(rows_of(self._path(number)))

    def _made(self) -> bool:
        return any(self.folder.glob("*.jsonl"))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, the whole file or none."""
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, one by one.

    Raises:
        UserError: The file is damaged; says in which line.
    """
    for place, record in file_records(path):
        if isinstance(record, str):
            raise UserError(f"{place}: {record}; remove the file, and it is made again")
        yield record
