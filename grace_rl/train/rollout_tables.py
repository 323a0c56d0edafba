"""Rollout tables beside the metrics, in whatever `report_to` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.trainer_callback import CallbackHandler, TrainerState
from transformers.training_args import TrainingArguments

from grace_rl.rollout.store import REWARD, read_rollouts, rollout_files
from grace_rl.run.directory import RunDirectory
from grace_rl.run.files import plain_numbers
from grace_rl.train.panel import PANEL
from grace_rl.train.progress import LogReader

ROWS = 64  # of a table: whole groups, as many as fit
LONGEST = 500  # characters of a text in a Markdown table
NAME = "rollouts"
Rows = list[dict[str, Any]]


class RolloutTables(LogReader):
    """Sends the rollouts of each stored step, and its panel, to TensorBoard, trackio and Weights &
    Biases.

    TRL's `log_completions` sends prompts and completions to the latter two under a name of its own
    and prints them; these tables have the texts, roles and every reward, best rollouts first.

    Args:
        run: Where the rollouts are.
        handler: The trainer's, whose callbacks hold the trackers.
    """

    def __init__(self, run: RunDirectory, handler: CallbackHandler) -> None:
        self.run = run
        self.handler = handler
        self._sent = -1

    def read_logs(self, logs: dict[str, Any], state: TrainerState, args: TrainingArguments) -> None:
        step = state.global_step
        senders = [s for name, s in SENDERS.items() if name in (args.report_to or ())]
        if not senders or step == self._sent:
            return
        if step not in rollout_files(self.run.path):
            return
        self._sent = step
        tables = {NAME: chosen_rows(read_rollouts(self.run.path, [step]))}
        if (panel := rollout_files(self.run.path, PANEL).get(step)) is not None:
            columns = ["step", "role", "text", "rationale", "truncated"]
            tables[PANEL] = pq.read_table(panel, columns=columns).to_pylist()
        for send in senders:
            for name, rows in tables.items():
                send(self.handler, name, rows, step)


def chosen_rows(table: pa.Table, limit: int = ROWS) -> list[dict[str, Any]]:
    """The first whole groups of a step as rows, best first in each; at least one group."""
    rewards = [name for name in table.schema.names if name.startswith(REWARD)]
    names = ["step", "group", "role", "text", "rationale", "truncated", "advantage", *rewards]
    rows = [row for row in table.select(names).to_pylist() if row["advantage"] is not None]
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    chosen: list[dict[str, Any]] = []
    for group in groups.values():
        if chosen and len(chosen) + len(group) > limit:
            break
        chosen += sorted(group, key=lambda row: row["advantage"], reverse=True)
    return [dict(plain_numbers(row)) for row in chosen]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table that shows foreign text as text.

    >>> print(markdown([{"step": 5, "rationale": "a|<b>"}]))
    | step | rationale |
    |---|---|
    | 5 | a&#124;&lt;b&gt; |
    """
    names = list(rows[0]) if rows else []
    lines = [_line(names), "|" + "---|" * len(names)]
    lines += [_line([_cell(row[name]) for name in names]) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = " ".join(("" if value is None else str(value))[:LONGEST].split())
    plain = (c if c.isalnum() or c in " ,.'-:" else f"&#{ord(c)};" for c in text)
    return "".join(plain).replace("&#60;", "&lt;").replace("&#62;", "&gt;")


def _tensorboard(
    handler: CallbackHandler, name: str, rows: list[dict[str, Any]], step: int
) -> None:
    for callback in handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            writer.add_text(name, markdown(rows), step)
            writer.flush()


def _frame(rows: Rows) -> Any:
    import pandas as pd

    return pd.DataFrame(rows)


def _trackio(handler: CallbackHandler, name: str, rows: Rows, step: int) -> None:
    import trackio

    table = trackio.Table(dataframe=_frame(rows))
    trackio.log({name: table, "train/global_step": step})


def _wandb(handler: CallbackHandler, name: str, rows: Rows, step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.log({name: wandb.Table(dataframe=_frame(rows)), "train/global_step": step})


Sender = Callable[[CallbackHandler, str, Rows, int], None]
SENDERS: dict[str, Sender] = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
