"""What a run left, as tables: rollouts, groups, one text through the steps, metrics.

The page, the terminal and notebooks ask the same questions here. Files are read as they appear, so
a run can be looked at while it trains; nothing is ever written.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import yaml

from grace_rl.errors import UserError
from grace_rl.inspect.filters import Filter
from grace_rl.rollout.store import REWARD, read_rollouts, rollout_files
from grace_rl.run.records import read_metrics, read_status

HEAVY = ("token_ids", "step_scores", "step_ends", "token_advantages", "embedding")
"""Columns that are read from the files only where they are asked for."""

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
}
FILES_AT_ONCE = 200
LOOK_AGAIN = 1.0  # seconds between looks for new files


class Run:
    """A run directory, read only.

    Args:
        path: `runs/<name>`.

    Raises:
        UserError: There is no run.

    Rollouts are told apart by `step` and `row`, the place in the step's file. Files that cannot be
    read are left out of the answers and named by `unreadable`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run directory")
        if read_status(self.path) is None and not rollout_files(self.path):
            raise UserError(f"{path}: holds neither a run's status.json nor rollouts")
        self.name = self.path.resolve().name
        self._lock = threading.Lock()
        self._loaded: dict[int, tuple[int, int]] = {}
        self._unreadable: dict[int, str] = {}
        self._looked = -LOOK_AGAIN
        self._metrics: tuple[tuple[int, int], pd.DataFrame] | None = None
        # No extension may be fetched: nothing leaves the machine.
        self._database = duckdb.connect(
            config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
        )
        columns = ", ".join(f"{_name(name)} {kind}" for name, kind in LIGHT.items())
        self._database.execute(f"CREATE TABLE rollouts ({columns})")

    # -- what there is ---------------------------------

    @property
    def rewards(self) -> list[str]:
        """Labels of the rewards, as far as they are loaded."""
        return [name.removeprefix(REWARD) for name in self._names() if name.startswith(REWARD)]

    def unreadable(self) -> list[str]:
        """A sentence for each file of rollouts that is broken."""
        self.refresh()
        return list(self._unreadable.values())

    def status(self) -> dict[str, Any]:
        """status.json, or nothing."""
        return read_status(self.path) or {}

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, or nothing."""
        path = self.path / "recipe.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        return content if isinstance(content, dict) else {}

    def evaluation(self) -> pd.DataFrame:
        """Scores before and after; one row for each name and way of reading, maybe none."""
        path = self.path / "evaluation.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        flat = [{"name": r["name"], "rationale": r["rationale"], **r["scores"]} for r in rows]
        return pd.DataFrame(flat)

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl so far, one row per logged step; what a step did not log is NaN."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return pd.DataFrame({"step": pd.Series(dtype="int64")})
        about = path.stat()
        stamp = (about.st_mtime_ns, about.st_size)
        if self._metrics is None or self._metrics[0] != stamp:
            table = pd.DataFrame(read_metrics(self.path))
            self._metrics = (stamp, table)
        return self._metrics[1]

    def steps(self) -> list[int]:
        """Steps whose rollouts are kept."""
        return list(rollout_files(self.path))

    def roles(self) -> list[str]:
        """Roles in the order of how many rollouts they have."""
        return list(
            self._ask("SELECT role FROM rollouts GROUP BY role ORDER BY count(*) DESC, role")[
                "role"
            ]
        )

    # -- rollouts ---------------------------------

    def rollouts(
        self,
        chosen: Filter | None = None,
        *,
        columns: Sequence[str] | None = None,
        sort: str | None = None,
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
        **filters: Any,
    ) -> pd.DataFrame:
        """Rollouts and anchors, in the order of steps if not told otherwise.

        Args:
            chosen: Which; or give the fields of `Filter` by name, as in `rollouts(step=10)`.
            columns: Which columns. The default is all but `HEAVY`, which cost time; `tokens` is the
                length of `token_ids`.
            sort: A column; rollouts without a value come last.
            descending: Largest first.
            limit, offset: A part of the answer.

        Raises:
            UserError: Unknown columns, or conditions that cannot be read.
        """
        chosen = chosen or Filter(**filters)
        self.refresh()
        names = self._names()
        wanted = list(names if columns is None else columns)
        heavy = [name for name in wanted if name in HEAVY]
        light = list(
            dict.fromkeys(
                ["step", "row", *(n for n in wanted if n not in HEAVY)] if heavy else wanted
            )
        )
        self._check_names([*light, *([sort] if sort else [])])
        where, values = self._where(chosen)
        order = f"{_name(sort)} {'DESC' if descending else 'ASC'} NULLS LAST, " if sort else ""
        query = (
            f"SELECT {', '.join(map(_name, light))} FROM rollouts {where} "
            f"ORDER BY {order}step, row {_part(limit, offset)}"
        )
        table = self._ask(query, values, fresh=False)
        for name in heavy:
            table[name] = None
        if heavy and len(table):
            table = pd.concat(
                [self._with_heavy(part, heavy) for _, part in table.groupby("step", sort=False)]
            ).loc[table.index]
        return table[wanted]

    def count(self, chosen: Filter | None = None, **filters: Any) -> int:
        """How many rollouts and anchors there are."""
        where, values = self._where(chosen or Filter(**filters))
        return int(self._ask(f"SELECT count(*) AS n FROM rollouts {where}", values)["n"][0])

    def groups(
        self,
        chosen: Filter | None = None,
        *,
        sort: str = "step",
        descending: bool = False,
        limit: int | None = None,
        offset: int = 0,
        **filters: Any,
    ) -> pd.DataFrame:
        """Groups of rollouts of one text in one step: size, best and worst rationale, and the
        standard deviation of the advantage (`spread`) and of each reward (`spread/<label>`).

        Anchors form no groups. A filter keeps the rollouts that fit, and then the groups of those.
        """
        where, values = self._where(chosen or Filter(**filters), "advantage IS NOT NULL")
        rewards = [name for name in self._names() if name.startswith(REWARD)]
        spreads = "".join(
            f", stddev_pop({_name(n)}) AS {_name('spread/' + n.removeprefix(REWARD))}"
            for n in rewards
        )
        names = ["step", "group", "example", "role", "text", "rollouts", "best", "worst", "spread"]
        labels = [f"spread/{name.removeprefix(REWARD)}" for name in rewards]
        if sort not in ["step", "group", "rollouts", "spread", *labels]:
            raise UserError(f"{self.path}: groups cannot be sorted by {sort!r}")
        order = f"{_name(sort)} {'DESC' if descending else 'ASC'} NULLS LAST"
        # Texts are fetched for the groups that are shown, not carried through the grouping.
        query = f"""
            WITH chosen AS (
              SELECT step, "group", count(*) AS rollouts, stddev_pop(advantage) AS spread{spreads},
                arg_max(row, advantage) AS best_row, arg_min(row, advantage) AS worst_row
              FROM rollouts {where} GROUP BY step, "group"
              ORDER BY {order}, step, "group" {_part(limit, offset)})
            SELECT chosen.step, chosen."group", best.example, best.role, best.text, rollouts,
              best.rationale AS best, worst.rationale AS worst, spread
              {"".join(f", {_name(label)}" for label in labels)}
            FROM chosen
            JOIN rollouts AS best ON best.step = chosen.step AND best.row = best_row
            JOIN rollouts AS worst ON worst.step = chosen.step AND worst.row = worst_row
            ORDER BY chosen.{order}, chosen.step, chosen."group"
        """
        return self._ask(query, values)[[*names, *labels]]

    def count_groups(self, chosen: Filter | None = None, **filters: Any) -> int:
        """How many groups there are."""
        where, values = self._where(chosen or Filter(**filters), "advantage IS NOT NULL")
        counted = f'SELECT DISTINCT step, "group" FROM rollouts {where}'
        return int(self._ask(f"SELECT count(*) AS n FROM ({counted})", values)["n"][0])

    def group(self, step: int, group: int, heavy: Sequence[str] = ()) -> pd.DataFrame:
        """The rollouts of one text in one step, best to worst.

        Args:
            step, group: Which.
            heavy: Columns of `HEAVY` that are wanted too.

        Raises:
            UserError: There is no such group.
        """
        self.refresh()
        table = self.rollouts(
            step=step,
            group=group,
            columns=[*self._names(), *heavy],
            sort="advantage",
            descending=True,
        )
        if table.empty:
            raise UserError(f"{self.path}: no group {group} in step {step}")
        return table

    def rollout(self, step: int, row: int) -> dict[str, Any]:
        """One rollout with all its columns.

        Raises:
            UserError: There is none.
        """
        table = self.step_table(step)
        if not 0 <= row < table.num_rows:
            raise UserError(
                f"{self.path}: step {step} has rollouts 0 to {table.num_rows - 1}, not {row}"
            )
        return {**table.slice(row, 1).to_pylist()[0], "row": row}

    def step_table(self, step: int, columns: Sequence[str] | None = None) -> pa.Table:
        """All that is stored of one step.

        Raises:
            UserError: Nothing is stored of that step.
        """
        return read_rollouts(self.path, [step], columns)

    def advantages(self) -> pd.DataFrame:
        """Lowest and highest advantage of each stored step, 10th and 90th percentile."""
        return self._ask(
            """SELECT step, min(advantage) AS lowest, quantile_cont(advantage, 0.1) AS p10,
               quantile_cont(advantage, 0.9) AS p90, max(advantage) AS highest
               FROM rollouts WHERE advantage IS NOT NULL GROUP BY step ORDER BY step"""
        )

    # -- one text through the steps ---------------------------------

    def texts(self, text: str | None = None, limit: int | None = None) -> pd.DataFrame:
        """Texts with their role, example and number of steps, those of most steps first."""
        where, values = self._where(
            Filter(), *(["contains(lower(text), lower(?))"] if text else [])
        )
        return self._ask(
            f"""SELECT text, any_value(role) AS role, any_value(example) AS example,
                count(DISTINCT step) AS steps, min(step) AS first, max(step) AS last
                FROM rollouts {where} GROUP BY text
                ORDER BY steps DESC, first, text {_part(limit)}""",
            [text] if text else values,
        )

    def through_training(self, text: str) -> pd.DataFrame:
        """The best rationale of this very text at each step that has one, by advantage."""
        return self._ask(
            """SELECT * FROM rollouts WHERE text = ? QUALIFY 1 =
               row_number() OVER (PARTITION BY step ORDER BY advantage DESC NULLS LAST, row)
               ORDER BY step""",
            [text],
        )

    # -- reading files ---------------------------------

    def refresh(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load what has been written since; every question does this by itself.

        Args:
            progress: Called with the number of files loaded and to load.
        """
        with self._lock:
            if self._loaded and time.monotonic() - self._looked < LOOK_AGAIN:
                return
            self._load(progress)
            self._looked = time.monotonic()

    def _load(self, progress: Callable[[int, int], None] | None) -> None:
        files, found = rollout_files(self.path), {}
        for step, path in files.items():
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            found[step] = (about.st_mtime_ns, about.st_size)
        gone = [step for step, stamp in self._loaded.items() if found.get(step) != stamp]
        database = self._database.cursor()
        if gone:
            database.execute("DELETE FROM rollouts WHERE list_contains(?, step)", [gone])
            for step in gone:
                del self._loaded[step]
                self._unreadable.pop(step, None)
        new = [step for step in found if step not in self._loaded]
        for start in range(0, len(new), FILES_AT_ONCE):
            if progress:
                progress(start, len(new))
            part = new[start : start + FILES_AT_ONCE]
            try:
                self._insert(database, [files[step] for step in part])
            except duckdb.Error:
                self._insert_each(database, {step: files[step] for step in part})
            self._loaded |= {step: found[step] for step in part}
        if progress and new:
            progress(len(new), len(new))

    def _insert_each(self, database: duckdb.DuckDBPyConnection, files: dict[int, Path]) -> None:
        """Some of the files are broken, or a resuming run has cut them off meanwhile."""
        for step, path in files.items():
            try:
                self._insert(database, [path])
            except duckdb.Error as error:
                reason = str(error).partition("\n")[0]
                self._unreadable[step] = f"the rollouts of step {step} are left out: {reason}"

    def _insert(self, database: duckdb.DuckDBPyConnection, files: Sequence[Path]) -> None:
        paths = list(map(str, files))
        source = "read_parquet(?, union_by_name = true, file_row_number = true)"
        there = [
            c[0] for c in database.execute(f"SELECT * FROM {source} LIMIT 0", [paths]).description
        ]
        rewards = [name for name in there if name.startswith(REWARD)]
        known = self._names(database)
        for name in rewards:
            if name not in known:
                database.execute(f"ALTER TABLE rollouts ADD COLUMN {_name(name)} FLOAT")
        made = {"row": "file_row_number", "tokens": "len(token_ids)"}
        columns = [*LIGHT, *rewards]
        database.execute(
            f"INSERT INTO rollouts ({', '.join(map(_name, columns))}) "
            f"SELECT {', '.join(made.get(name, _name(name)) for name in columns)} FROM {source}",
            [paths],
        )

    def _with_heavy(self, part: pd.DataFrame, heavy: list[str]) -> pd.DataFrame:
        step = int(part["step"].iloc[0])
        stored = self.step_table(step, heavy).take(pa.array(part["row"]))
        return part.assign(
            **{
                name: pd.Series(stored[name].to_pylist(), index=part.index, dtype=object)
                for name in heavy
            }
        )

    # -- asking ---------------------------------

    def _ask(self, query: str, values: Sequence[Any] = (), fresh: bool = True) -> pd.DataFrame:
        if fresh:
            self.refresh()
        return self._database.cursor().execute(query, list(values)).df()

    def _names(self, database: duckdb.DuckDBPyConnection | None = None) -> list[str]:
        answer = (database or self._database.cursor()).execute("SELECT * FROM rollouts LIMIT 0")
        return [column[0] for column in answer.description]

    def _where(self, chosen: Filter, *more: str) -> tuple[str, list[Any]]:
        conditions = list(more)
        values: list[Any] = []
        if isinstance(chosen.step, int):
            conditions.append("step = ?")
            values.append(chosen.step)
        elif chosen.step is not None:
            for end, compared in zip(chosen.step, (">=", "<="), strict=True):
                if end is not None:
                    conditions.append(f"step {compared} ?")
                    values.append(end)
        for name in ("role", "example", "group", "truncated"):
            if (value := getattr(chosen, name)) is not None:
                conditions.append(f"{_name(name)} = ?")
                values.append(value)
        if chosen.text:
            conditions.append(
                "(contains(lower(text), lower(?)) OR contains(lower(rationale), lower(?)))"
            )
            values += [chosen.text, chosen.text]
        for name, compared, number in chosen.conditions():
            column = name if name in ("advantage", "tokens") else REWARD + name
            self._check_names([column])
            conditions.append(f"{_name(column)} {compared} ?")
            values.append(number)
        return (f"WHERE {' AND '.join(conditions)}" if conditions else ""), values

    def _check_names(self, names: Sequence[str]) -> None:
        self.refresh()
        known = self._names()
        if unknown := [name for name in names if name not in known]:
            there = ", ".join([*known, *HEAVY])
            raise UserError(f"{self.path}: no column {', '.join(unknown)}; there are: {there}")


def distinct_names(runs: Sequence[Run]) -> None:
    """Tell runs of one folder name apart by their paths.

    Raises:
        UserError: The same run twice.
    """
    paths = [run.path.resolve() for run in runs]
    if twice := {str(path) for path in paths if paths.count(path) > 1}:
        raise UserError([f"{path}: given twice" for path in sorted(twice)])
    for parts in range(2, max(len(path.parts) for path in paths) + 1):
        names = [run.name for run in runs]
        for run, path in zip(runs, paths, strict=True):
            if names.count(run.name) > 1:
                run.name = str(Path(*path.parts[-parts:]))


def _name(column: str) -> str:
    """A column's name in SQL."""
    return '"' + column.replace('"', '""') + '"'


def _part(limit: int | None, offset: int = 0) -> str:
    return ("" if limit is None else f"LIMIT {int(limit)} ") + f"OFFSET {int(offset)}"
