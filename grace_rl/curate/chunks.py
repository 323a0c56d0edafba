"""Finished work, in files of a few hundred rows each: what is there is never done again.

    <output_dir>/<step>/settings.json   what the rows were made with
    <output_dir>/<step>/00000.jsonl     rows 0 to chunk_rows - 1, ...

A chunk's name says which rows it holds, whoever wrote it: shards of any number share one folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from grace_rl.errors import UserError
from grace_rl.run.files import whole_file, write_text


class Chunks:
    """The chunks of one step.

    Args:
        folder: Made if it is missing.
        settings: What its rows depend on.
        overwrite: Throw away what was made with other settings.

    Raises:
        UserError: The folder's rows were made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = folder
        note = folder / "settings.json"
        now = json.loads(json.dumps(settings))
        before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else now
        now_flat, flat = _flat(now), _flat(before)
        changed = sorted(k for k in now_flat | flat if now_flat.get(k) != flat.get(k))
        if changed and not overwrite:
            raise UserError(
                f"{folder}: its rows were made with other settings: "
                + ", ".join(f"{key} was {flat.get(key)!r}" for key in changed)
                + "; choose another output_dir, or --overwrite"
            )
        if changed:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if changed or not note.exists():
            write_text(note, json.dumps(now, indent=2) + "\n")

    def has(self, number: int) -> bool:
        return self._path(number).exists()

    def write(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        write_rows(self._path(number), rows)

    def read(self, number: int) -> list[dict[str, Any]]:
        return list(rows_of(self._path(number)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.jsonl"


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"rate": {"judge": "digits"}}` -> `{"rate.judge": "digits"}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": one for key, one in inner.items()} or {name: value}
    return flat


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, the whole file or none."""
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, one by one."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
