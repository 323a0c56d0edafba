"""What `grace-rl replay` left beside a run: groups that other rewards would have ranked anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace_rl.errors import UserError, reading
from grace_rl.inspect.run import Run

GROUPS = """
WITH best AS (
    SELECT step, "group", max(advantage) AS first, max(replayed_advantage) AS then
    FROM kept GROUP BY step, "group"
), pairs AS (
    SELECT a.step, a."group",
           avg((a.replayed_advantage > b.replayed_advantage)::INT) AS order_kept
    FROM kept a JOIN kept b
      ON a.step = b.step AND a."group" = b."group" AND a.advantage > b.advantage
    GROUP BY a.step, a."group"
)
SELECT step, "group", first(role) AS role, first(text) AS text, first(order_kept) AS order_kept,
       arg_max(rationale, advantage) AS best,
       arg_max(rationale, replayed_advantage) AS replayed_best,
       bool_and(advantage < best.first OR replayed_advantage < best.then) AS best_changed
FROM kept JOIN pairs USING (step, "group") JOIN best USING (step, "group")
GROUP BY step, "group"
ORDER BY order_kept, step, "group"
"""
COLUMNS = ["step", "group", "role", "text", "rationale", "advantage", "replayed_advantage"]


def replays(run: Run) -> dict[str, Path]:
    """The replays of a run by name."""
    return {path.stem: path for path in sorted((run.path / "replays").glob("*.parquet"))}


def replayed_groups(run: Run, name: str) -> pd.DataFrame:
    """Groups with anything to rank, those whose order changes most first.

    Returns:
        `step group role text order_kept best replayed_best best_changed`; `order_kept` is the share
        of pairs of rollouts that keep their order, 0 to 1.

    Raises:
        UserError: There is no replay of that name, or its file is damaged.
    """
    kept = _read(run, name)
    with duckdb.connect() as database:
        database.register("kept", kept)
        return database.execute(GROUPS).df()


def replayed_advantages(run: Run, name: str, step: int, group: int) -> dict[str, list[float]]:
    """What a replay gave the rollouts of one group: advantages by rationale, in stored order.

    Raises:
        UserError: There is no replay of that name, or its file is damaged.
    """
    advantages: dict[str, list[float]] = {}
    kept = _read(run, name, [("step", "==", step), ("group", "==", group)])
    for row in kept.select(["rationale", "replayed_advantage"]).to_pylist():
        advantages.setdefault(row["rationale"], []).append(row["replayed_advantage"])
    return advantages


def replayed_totals(run: Run, name: str) -> pd.DataFrame:
    """The mean total of each group in a replay: `step group total`.

    Raises:
        UserError: There is no replay of that name, or its file is damaged.
    """
    kept = _read(run, name, columns=["step", "group", "total"]).to_pandas()
    return kept.groupby(["step", "group"], as_index=False)["total"].mean()


def _read(
    run: Run,
    name: str,
    only: list[tuple[str, str, int]] | None = None,
    columns: Sequence[str] = COLUMNS,
) -> pa.Table:
    known = replays(run)
    if name not in known:
        there = ", ".join(known) or "none yet"
        raise UserError(f"{run.name}: no replay {name!r}; there are: {there}")
    with reading(known[name], "the replay"):
        return pq.read_table(known[name], columns=list(columns), filters=only)
