"""The stored rollouts of a run in memory, as one table that follows the files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd

from grace_rl.inspect.patterns import MADE, PARTS, ROLLOUTS, pattern_tables, words_of
from grace_rl.rollout.store import REWARD
from grace_rl.run.records import rollout_files

LIGHT = {
    "step": "BIGINT",
    "row": "BIGINT",
    "example": "BIGINT",
    "group": "BIGINT",
    "role": "VARCHAR",
    "text": "VARCHAR",
    "rationale": "VARCHAR",
    "tokens": "BIGINT",
    "truncated": "BOOLEAN",
    "advantage": "FLOAT",
    "total": "FLOAT",
}
FILES_AT_ONCE = 200
AT_ONCE = 50_000  # rollouts whose words are looked at together
LOOK_AGAIN = 1.0  # seconds between looks for new files


class RolloutTable:
    """Texts, numbers and rewards of every stored rollout, read as the files appear.

    Args:
        path: The run directory.

    Files that cannot be read are left out of the answers and named by `unreadable`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unreadable: dict[int, str] = {}
        self._lock = threading.Lock()
        self._asking = threading.Lock()  # for patterns
        self._patterns_of: dict[int, tuple[int, int]] | None = None
        self._loaded: dict[int, tuple[int, int]] = {}
        self._looked = -LOOK_AGAIN
        # No extension may be fetched: nothing leaves the machine.
        self._database = duckdb.connect(
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        columns = ", ".join(f"{quoted(name)} {kind}" for name, kind in LIGHT.items())
        self._database.execute(f"CREATE TABLE rollouts ({columns})")

    def ask(self, query: str, values: Sequence[Any] = ()) -> pd.DataFrame:
        """The answer to a question in SQL about the table `rollouts`."""
        self.refresh()
        return self._database.cursor().execute(query, list(values)).df()

    def ask_patterns(self, query: str, values: Sequence[Any] = ()) -> pd.DataFrame:
        """The answer to a question about the tables of `patterns.MADE`, which follow the files."""
        self.refresh()
        with self._asking:
            if self._patterns_of != self._loaded:
                of = dict(self._loaded)
                self._find_patterns()
                self._patterns_of = of
            return self._database.cursor().execute(query, list(values)).df()

    def _find_patterns(self) -> None:
        """Make the tables of patterns anew: what a word of one step is depends on all texts."""
        database = self._database.cursor()
        database.begin()  # whoever asks meanwhile sees the tables as they were
        database.execute(MADE)
        texts = database.sql("SELECT DISTINCT text FROM rollouts").to_arrow_table()["text"]
        known = set(words_of(texts.combine_chunks())[1])
        for steps in database.execute(PARTS, [AT_ONCE]).fetchall():
            part = database.sql(ROLLOUTS, params=list(steps)).to_arrow_table()
            for name, table in pattern_tables(part, known).items():
                database.register("part", table)
                database.execute(f"INSERT INTO {name} BY NAME SELECT * FROM part")
        database.commit()

    def names(self) -> list[str]:
        """Columns, as far as files are read."""
        answer = self._database.cursor().execute("SELECT * FROM rollouts LIMIT 0")
        return [column[0] for column in answer.description]

    def refresh(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load what has been written since; every question does this by itself.

        Args:
            progress: Called with the number of files loaded and to load.
        """
        with self._lock:
            if self._loaded and time.monotonic() - self._looked < LOOK_AGAIN:
                return
            self._load(progress or (lambda done, total: None))
            self._looked = time.monotonic()

    def _load(self, progress: Callable[[int, int], None]) -> None:
        files, stamps = rollout_files(self.path), {}
        for step, path in files.items():
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            stamps[step] = (about.st_mtime_ns, about.st_size)
        gone = [step for step, stamp in self._loaded.items() if stamps.get(step) != stamp]
        database = self._database.cursor()
        if gone:
            database.execute("DELETE FROM rollouts WHERE list_contains(?, step)", [gone])
            for step in gone:
                del self._loaded[step]
                self.unreadable.pop(step, None)
        new = [step for step in stamps if step not in self._loaded]
        for start in range(0, len(new), FILES_AT_ONCE):
            progress(start, len(new))
            part = new[start : start + FILES_AT_ONCE]
            try:
                self._insert(database, [files[step] for step in part])
            except duckdb.Error:
                self._insert_each(database, {step: files[step] for step in part})
            self._loaded |= {step: stamps[step] for step in part}
        progress(len(new), len(new))

    def _insert_each(self, database: duckdb.DuckDBPyConnection, files: dict[int, Path]) -> None:
        """Some of the files are broken, or a resuming run has cut them off meanwhile."""
        for step, path in files.items():
            try:
                self._insert(database, [path])
            except duckdb.Error as error:
                reason = str(error).partition("\n")[0]
                self.unreadable[step] = f"the rollouts of step {step} are left out: {reason}"

    def _insert(self, database: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> None:
        paths = list(map(str, files))
        source = "read_parquet(?, union_by_name = true, file_row_number = true)"
        described = database.execute(f"SELECT * FROM {source} LIMIT 0", [paths]).description
        there = [column[0] for column in described]
        rewards = [name for name in there if name.startswith(REWARD)]
        known = self.names()
        for name in rewards:
            if name not in known:
                database.execute(f"ALTER TABLE rollouts ADD COLUMN {quoted(name)} FLOAT")
        made = {"row": "file_row_number", "tokens": "len(token_ids)"}
        made |= {} if "total" in there else {"total": "NULL"}
        columns = [*LIGHT, *rewards]
        database.execute(
            f"INSERT INTO rollouts ({', '.join(map(quoted, columns))}) "
            f"SELECT {', '.join(made.get(name, quoted(name)) for name in columns)} FROM {source}",
            [paths],
        )


def quoted(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'
