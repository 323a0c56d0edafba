"""What a person sees while a run trains: a line or bar of progress, and groups of rationales.

transformers' bar prints whole dictionaries and TRL's has no metrics beside it; here are the few
numbers that tell how a run goes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from grace_rl.run.files import plain_numbers
from grace_rl.run.printing import safe

SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "completions/mean_length": "tokens",
    "information_gain": "gain",
    "entropy": "entropy",
    "embedding/mean_cosine": "cosine",
    "mean_token_accuracy": "accuracy",
}
"""Metrics in the progress line, and their short names; what a run does not log is left out."""


class LogReader(TrainerCallback):
    """A callback that reads what is logged, on the main process."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self.read_logs(logs, state, args)

    def read_logs(self, logs: dict[str, Any], state: TrainerState, args: TrainingArguments) -> None:
        """See what was logged, or add to it."""
        raise NotImplementedError


class ProgressLine(LogReader):
    """A bar with step, speed, time left and the last metrics.

    Without a terminal, one plain line per log. Quiet on all processes but the main one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._metrics = ""
        self._first_step = 0
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step, self._began = state.global_step, time.monotonic()
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=self.console,
        )
        self._bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, speed="", metrics=""
        )
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=state.global_step, speed=self._speed(state)
            )

    def read_logs(self, logs: dict[str, Any], state: TrainerState, args: TrainingArguments) -> None:
        if "train_runtime" in logs:
            return
        shown = [(name, plain_numbers(logs.get(key))) for key, name in SHOWN.items()]
        metrics = "  ".join(
            f"{name} {value:.3g}" for name, value in shown if isinstance(value, (int, float))
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], metrics=metrics)
        else:
            line = f"step {state.global_step}/{state.max_steps}  {self._speed(state)}  {metrics}"
            self.console.print(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; may be called more than once."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self, state: TrainerState) -> str:
        steps, seconds = state.global_step - self._first_step, time.monotonic() - self._began
        if not steps:
            return ""
        return (
            f"{seconds / steps:.1f} s/step" if seconds > steps else f"{steps / seconds:.1f} steps/s"
        )


def print_group(
    console: Console, rows: Sequence[Mapping[str, Any]], reward_labels: Sequence[str]
) -> None:
    """Print a text and its group of rationales, best first, each with rewards and advantage.

    Args:
        console: Where to print.
        rows: The rollouts of one group, as in the store (at least `text`, `rationale`, `advantage`,
            `reward/<label>`; `role` and `step` are shown if they are there). Advantages may be
            numbers, a list of one per token, or None.
        reward_labels: Which rewards, in the order of the columns.
    """
    if not rows:
        return
    first = rows[0]
    about = " ".join(f"{name} {first[name]}" for name in ("step", "role") if name in first)
    table = Table(
        box=box.SIMPLE_HEAD, title=_shown(f"{about}: {first['text']}".lstrip(": "), console)
    )
    table.title_justify = "left"
    table.add_column("rationale", ratio=1, overflow="fold")
    for label in [*reward_labels, "advantage"]:
        table.add_column(_shown(label, console), justify="right", no_wrap=True, overflow="crop")
    ranked = sorted(rows, key=lambda row: _worth(row.get("advantage")), reverse=True)
    for row in ranked:
        numbers = [_number(row.get(f"reward/{label}")) for label in reward_labels]
        rationale = str(row["rationale"]) + (" [no end]" if row.get("truncated") else "")
        table.add_row(_shown(rationale, console), *numbers, _number(_mean(row.get("advantage"))))
    console.print(table)


def _shown(text: str, console: Console, limit: int = 800) -> Text:
    """Foreign text in a cell: cut short, no markup, only what the encoding has."""
    text = safe(text if len(text) <= limit else text[:limit] + " ...").replace("\n", " ")
    return Text(text.encode(console.encoding, "replace").decode(console.encoding), overflow="fold")


def _mean(value: Any) -> float | None:
    """The advantage as one number."""
    if isinstance(value, (list, tuple)):
        return sum(value) / len(value) if value else None
    return value


def _worth(advantage: Any) -> float:
    value = plain_numbers(_mean(advantage))
    return float("-inf") if value is None else float(value)


def _number(value: Any) -> str:
    value = plain_numbers(value)
    return "-" if value is None else f"{value:.3f}"
