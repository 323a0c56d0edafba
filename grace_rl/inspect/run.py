"""What a run left, as tables: rollouts, groups, one text through the steps, metrics.

The page, the terminal and notebooks ask the same questions here. Files are read as they appear, so
a run can be looked at while it trains; nothing is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace_rl.errors import UserError, reading
from grace_rl.inspect.database import LIGHT, RolloutTable, quoted
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.records import Records
from grace_rl.rollout.store import REWARD, SCHEMA, read_rollouts
from grace_rl.run.records import read_status, rollout_files

HEAVY = tuple(name for name in SCHEMA.names if name not in LIGHT)
"""Columns that are read from the files only where they are asked for."""
TRAINED = "advantage IS NOT NULL"  # rollouts, not anchors


class Run:
    """A run directory, read only.

    Args:
        path: `runs/<name>`.

    Raises:
        UserError: There is no run.

    Rollouts are told apart by `step` and `row`, the place in the step's file. Files that cannot be
    read are left out of the answers and named by `problems`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path}: no such run directory")
        if read_status(self.path) is None and not rollout_files(self.path):
            raise UserError(f"{path}: holds neither a run's status.json nor rollouts")
        self.name = self.path.resolve().name
        self._records = Records(self.path)
        self._table = RolloutTable(self.path)

    # -- what there is ---------------------------------

    @property
    def rewards(self) -> list[str]:
        """Labels of the rewards, as far as they are loaded."""
        names = self._table.names()
        return [name.removeprefix(REWARD) for name in names if name.startswith(REWARD)]

    @property
    def beside(self) -> Path:
        """The folder beside the run for what looking at it leaves: `<run>.inspect`."""
        path = self.path.resolve()
        return path.with_name(f"{path.name}.inspect")

    def problems(self) -> list[str]:
        """A sentence for each file that is damaged."""
        self.refresh()
        return [*self._records.problems(), *self._table.unreadable.values()]

    def refresh(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the rollouts that were written since; every question does this by itself.

        Args:
            progress: Called with the number of files loaded and to load.
        """
        self._table.refresh(progress)

    def stamp(self) -> tuple[float, int]:
        """When something was last written, in seconds since 1970, and how many files there are."""
        names = ("status.json", "metrics.jsonl", "evaluation.json", "soft_tokens.jsonl")
        paths = [self.path / name for name in names]
        for folder in ("rollouts", "panel", "checkpoints", "replays", "model"):
            paths += [self.path / folder, *(self.path / folder).glob("*")]
        times = [path.stat().st_mtime for path in paths if path.exists()]
        return max(times, default=0.0), len(times)

    def status(self) -> dict[str, Any]:
        """status.json, or nothing."""
        return self._records.read("status.json")

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values, or nothing."""
        return self._records.read("recipe.yaml")

    def evaluation(self) -> pd.DataFrame:
        """Scores before and after; one row for each name and way of reading, maybe none."""
        return self._records.read("evaluation.json")

    def soft_tokens(self) -> list[dict[str, Any]]:
        """Soft tokens of a `gircse` run as words: `step`, `text`, `words`; none for other runs."""
        return self._records.read("soft_tokens.jsonl")

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl so far, one row per logged step; what a step did not log is NaN."""
        return self._records.read("metrics.jsonl")

    def steps(self) -> list[int]:
        """Steps whose rollouts are kept."""
        return list(rollout_files(self.path))

    def panel_steps(self) -> list[int]:
        """Steps at which the panel was written, 0 for before training."""
        return list(rollout_files(self.path, "panel"))

    def panel(self, steps: Sequence[int] | None = None, text: str | None = None) -> pd.DataFrame:
        """What was written greedily of the same texts through training: `step text role example
        side rationale truncated embedding`; empty without a panel.

        Raises:
            UserError: A file of it is damaged.
        """
        parts = []
        for step, path in rollout_files(self.path, "panel").items():
            if steps is None or step in steps:
                with reading(path, "the panel"):
                    only = None if text is None else [("text", "==", text)]
                    parts.append(pq.read_table(path, filters=only).to_pandas())
        columns = ["step", "text", "role", "example", "side", "rationale", "truncated", "embedding"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def best_rows(self, texts: Sequence[str]) -> dict[tuple[int, str], int]:
        """The best stored rollout of each of these texts at each step: (step, text) -> row."""
        query = """SELECT step, text, arg_max(row, coalesce(advantage, -1e9)) AS row FROM rollouts
                   WHERE list_contains(?, text) GROUP BY step, text"""
        found = self._table.ask(query, [list(texts)])
        keys = zip(found["step"], found["text"], strict=True)
        return dict(zip(keys, found["row"].astype(int), strict=True))

    def roles(self) -> list[str]:
        """Roles in the order of how many rollouts they have."""
        query = "SELECT role FROM rollouts GROUP BY role ORDER BY count(*) DESC, role"
        return list(self._table.ask(query)["role"])

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
        self.refresh()
        wanted = list(self._table.names() if columns is None else columns)
        heavy = [name for name in wanted if name in HEAVY]
        light = [name for name in wanted if name not in HEAVY]
        light = list(dict.fromkeys(["step", "row", *light] if heavy else light))
        self._check_names([*light, *([sort] if sort else [])])
        where, values = self._where(chosen or Filter(**filters))
        query = (
            f"SELECT {', '.join(map(quoted, light))} FROM rollouts {where} "
            f"ORDER BY {_order(sort, descending)}step, row {_part(limit, offset)}"
        )
        table = self._table.ask(query, values)
        for name in heavy:
            table[name] = None
        if heavy and len(table):
            parts = [self._with_heavy(part, heavy) for _, part in table.groupby("step", sort=False)]
            table = pd.concat(parts).loc[table.index]
        return table[wanted]

    def count(self, chosen: Filter | None = None, **filters: Any) -> int:
        """How many rollouts and anchors there are."""
        where, values = self._where(chosen or Filter(**filters))
        return int(self._table.ask(f"SELECT count(*) AS n FROM rollouts {where}", values)["n"][0])

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
        self.refresh()
        where, values = self._where(chosen or Filter(**filters), TRAINED)
        labels = [f"spread/{label}" for label in self.rewards]
        spreads = "".join(
            f", stddev_pop({quoted(REWARD + label)}) AS {quoted('spread/' + label)}"
            for label in self.rewards
        )
        names = ["step", "group", "example", "role", "text", "rollouts", "best", "worst", "spread"]
        if sort not in ["step", "group", "rollouts", "spread", *labels]:
            raise UserError(f"{self.path}: groups cannot be sorted by {sort!r}")
        order = _order(sort, descending)
        # Texts are fetched for the groups that are shown, not carried through the grouping.
        query = f"""
            WITH chosen AS (
              SELECT step, "group", count(*) AS rollouts, stddev_pop(advantage) AS spread{spreads},
                arg_max(row, advantage) AS best_row, arg_min(row, advantage) AS worst_row
              FROM rollouts {where} GROUP BY step, "group"
              ORDER BY {order}step, "group" {_part(limit, offset)})
            SELECT chosen.step, chosen."group", best.example, best.role, best.text, rollouts,
              best.rationale AS best, worst.rationale AS worst, spread
              {"".join(f", {quoted(label)}" for label in labels)}
            FROM chosen
            JOIN rollouts AS best ON best.step = chosen.step AND best.row = best_row
            JOIN rollouts AS worst ON worst.step = chosen.step AND worst.row = worst_row
            ORDER BY chosen.{order}chosen.step, chosen."group"
        """
        return self._table.ask(query, values)[[*names, *labels]]

    def count_groups(self, chosen: Filter | None = None, **filters: Any) -> int:
        """How many groups there are."""
        where, values = self._where(chosen or Filter(**filters), TRAINED)
        query = f'SELECT count(DISTINCT (step, "group")) AS n FROM rollouts {where}'
        return int(self._table.ask(query, values)["n"][0])

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
            columns=[*self._table.names(), *heavy],
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
            UserError: Nothing is stored of that step, or its file is damaged.
        """
        return read_rollouts(self.path, [step], columns)

    def advantages(self) -> pd.DataFrame:
        """Lowest and highest advantage of each stored step, 10th and 90th percentile."""
        return self._table.ask(
            f"""SELECT step, min(advantage) AS lowest, quantile_cont(advantage, 0.1) AS p10,
               quantile_cont(advantage, 0.9) AS p90, max(advantage) AS highest
               FROM rollouts WHERE {TRAINED} GROUP BY step ORDER BY step"""
        )

    # -- one text through the steps ---------------------------------

    def texts(
        self, text: str | None = None, limit: int | None = None, offset: int = 0
    ) -> pd.DataFrame:
        """Texts with their role, example and number of steps, those of most steps first."""
        where = "WHERE contains(lower(text), lower(?))" if text else ""
        return self._table.ask(
            f"""SELECT text, any_value(role) AS role, any_value(example) AS example,
                count(DISTINCT step) AS steps, min(step) AS first, max(step) AS last
                FROM rollouts {where} GROUP BY text
                ORDER BY steps DESC, first, text {_part(limit, offset)}""",
            [text] if text else [],
        )

    def count_texts(self, text: str | None = None) -> int:
        """How many texts there are."""
        where = "WHERE contains(lower(text), lower(?))" if text else ""
        query = f"SELECT count(DISTINCT text) AS n FROM rollouts {where}"
        return int(self._table.ask(query, [text] if text else [])["n"][0])

    def steps_of(self, texts: Sequence[str]) -> dict[str, int]:
        """At how many steps each of the texts is stored; those that never are, are left out."""
        query = """SELECT text, count(DISTINCT step) AS steps FROM rollouts
                   WHERE list_contains(?, text) GROUP BY text"""
        found = self._table.ask(query, [list(texts)])
        return dict(zip(found["text"], found["steps"], strict=True))

    def through_training(self, text: str) -> pd.DataFrame:
        """The best rationale of this very text at each step that has one, by advantage."""
        return self._table.ask(
            """SELECT * FROM rollouts WHERE text = ? QUALIFY 1 =
               row_number() OVER (PARTITION BY step ORDER BY advantage DESC NULLS LAST, row)
               ORDER BY step""",
            [text],
        )

    def last_best(self) -> pd.DataFrame:
        """The best rationale of each text at the last step that has it: `text step rationale
        total`."""
        return self._table.ask(
            """SELECT text, step, rationale, total FROM rollouts QUALIFY 1 = row_number() OVER
               (PARTITION BY text ORDER BY step DESC, advantage DESC NULLS LAST, row)"""
        )

    def last_groups(self) -> pd.DataFrame:
        """The group of each text at the last step that has it: `text step group total`, the mean
        of its rollouts."""
        return self._table.ask(
            f"""SELECT text, step, "group", avg(total)::DOUBLE AS total FROM rollouts
                WHERE {TRAINED} GROUP BY text, step, "group" QUALIFY 1 = row_number() OVER
                (PARTITION BY text ORDER BY step DESC, "group")"""
        )

    # -- asking ---------------------------------

    def pattern_table(self, query: str, values: Sequence[Any] = ()) -> pd.DataFrame:
        """The answer to a question of `grace_rl.inspect.patterns`."""
        return self._table.ask_patterns(query, values)

    def _with_heavy(self, part: pd.DataFrame, heavy: list[str]) -> pd.DataFrame:
        step = int(part["step"].iloc[0])
        stored = self.step_table(step, heavy).take(pa.array(part["row"]))
        return part.assign(
            **{
                name: pd.Series(stored[name].to_pylist(), index=part.index, dtype=object)
                for name in heavy
            }
        )

    def _where(self, chosen: Filter, *more: str) -> tuple[str, list[Any]]:
        if chosen.pattern is not None:
            self.pattern_table("SELECT 1")  # they are there from now on
        self._check_names([column for column, _, _ in chosen.conditions()])
        conditions, values = chosen.sql()
        return " AND ".join(["WHERE true", *more, *conditions]), values

    def _check_names(self, names: Sequence[str]) -> None:
        self.refresh()
        known = self._table.names()
        if unknown := [name for name in names if name not in known]:
            there = ", ".join([*known, *HEAVY])
            raise UserError(f"{self.path}: no column {', '.join(unknown)}; there are: {there}")


def _order(sort: str | None, descending: bool) -> str:
    """A column to sort by first, those without a value last."""
    return f"{quoted(sort)} {'DESC' if descending else 'ASC'} NULLS LAST, " if sort else ""


def _part(limit: int | None, offset: int = 0) -> str:
    return ("" if limit is None else f"LIMIT {int(limit)} ") + f"OFFSET {int(offset)}"
