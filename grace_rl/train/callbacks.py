"""What happens beside the training steps: metrics, progress, stale-engine alarm, orderly stop.

`follow` attaches all of it to a trainer, and takes it down again however the training ends.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
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
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from grace_rl.run.directory import RunDirectory
from grace_rl.run.environment import OUTCOME, command_line
from grace_rl.run.files import plain_numbers
from grace_rl.run.records import read_metrics
from grace_rl.train.rollout_tables import RolloutTables

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

ENGINE_DIFFERENCE = "sampling/sampling_logp_difference/mean"


@contextmanager
def follow(
    trainer: Any,
    run: RunDirectory,
    *,
    console: Console | None = None,
    steps_between_generations: int = 1,
    stale_engine_threshold: float = 0.1,
) -> Iterator[StopOnSignal]:
    """While the block runs: write metrics, show progress, watch the engine, and stop in order.

    Ctrl-C and SIGTERM stop it.

        with follow(trainer, run) as stop:
            trainer.train(resume_from_checkpoint=opened.checkpoint)
        if stop.interrupted:
            return 130

    Args:
        trainer: A transformers or TRL trainer; its own progress bar and printer are removed.
        run: The run directory, opened.
        console: Where to print; the trainer's printed groups should use the same one.
        steps_between_generations: See `StopOnSignal`.
        stale_engine_threshold: See `StaleEngineAlarm`.
    """
    console = console or Console()
    alarm = StaleEngineAlarm(stale_engine_threshold, console)
    progress = ProgressLine(console)
    stop = StopOnSignal(steps_between_generations, console)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    # First of all, so that trackers (report_to) see the alarm's metric too.
    trainer.callback_handler.callbacks.insert(0, alarm)
    tables = RolloutTables(run, trainer.callback_handler)
    for callback in (MetricsWriter(run), tables, progress, stop):
        trainer.add_callback(callback)
    bars = is_progress_bar_enabled()
    disable_progress_bar()  # one for every file saved
    try:
        yield stop
    finally:
        if bars:
            enable_progress_bar()
        stop.restore_handlers()
        progress.close()


class MetricsWriter(TrainerCallback):
    """Appends every log to metrics.jsonl: TRL's names, `step`, `seconds` since the run began.

    A resumed run goes on counting `seconds` where the kept metrics end. transformers' closing
    summary is no step and goes to status.json.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._began = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.run.metrics.is_file():
            earlier = [line["seconds"] for line in read_metrics(self.run.path)]
            self._began = time.monotonic() - max(earlier, default=0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "train_runtime" in logs:
            self.run.record_summary(logs)
            return
        line = {
            "step": state.global_step,
            "seconds": round(time.monotonic() - self._began, 3),
            **plain_numbers(logs),
        }
        # Closed, so flushed, for each line.
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


class ProgressLine(TrainerCallback):
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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        shown = [(name, plain_numbers(logs.get(key))) for key, name in SHOWN.items()]
        metrics = "  ".join(
            f"{name} {value:.3g}" for name, value in shown if isinstance(value, (int, float))
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], metrics=metrics)
        else:
            line = f"step {state.global_step}/{state.max_steps}  {self._speed(state)}  {metrics}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

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


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop.

    A second signal ends at once (KeyboardInterrupt). With several processes all stop at the same
    step, whichever of them was told.

    Args:
        steps_between_generations: Optimizer steps that one batch of rollouts serves. A checkpoint
            between them would lose the rest of the batch, so the stop waits for the next multiple.
        console: Where to say what happens.

    Attributes:
        interrupted: Whether the training was stopped before its last step: exit code 130.
    """

    def __init__(self, steps_between_generations: int = 1, console: Console | None = None) -> None:
        self.steps_between_generations = max(1, steps_between_generations)
        self.console = console or Console()
        self.interrupted = False
        self._first_signal: float | None = None
        self._grace = 0.0
        self._handlers: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The terminal tells every process and the launcher, which tells them again: that is one
        # signal.
        self._grace = 2.0 if args.world_size > 1 or OUTCOME in os.environ else 0.0
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers.setdefault(number, signal.signal(number, self._on_signal))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            # print() may be what the signal interrupted
            os.write(
                2,
                b"\nStopping after this step and saving a checkpoint; once more to end at once.\n",
            )
        elif now - self._first_signal >= self._grace:
            self.restore_handlers()
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps_between_generations:
            return
        if (
            _any_process(self._first_signal is not None, args)
            and state.global_step < state.max_steps
        ):
            self.interrupted = True
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore_handlers()
        if self.interrupted and state.is_world_process_zero:
            command = command_line(without=("--overwrite",))
            done = (
                f"Stopped at step {state.global_step} of {state.max_steps}; a checkpoint is saved."
            )
            self.console.print(
                f"{done} To resume:\n  {command}", markup=False, highlight=False, soft_wrap=True
            )

    def restore_handlers(self) -> None:
        """Put back the signal handlers from before the training; may be called more than once."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)


class Budget(TrainerCallback):
    """Ends the training in order, as after its last step, when its budget is used up.

    Args:
        seconds: Of training, scoring during it included; a resumed run has them anew. None is no
            limit.
        tokens: That training reads and writes, of all processes and of the whole run. None is no
            limit.
    """

    def __init__(self, seconds: float | None = None, tokens: int | None = None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.tokens = math.inf if tokens is None else tokens
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        spent = time.monotonic() - self._began >= self.seconds
        if _any_process(spent or state.num_input_tokens_seen >= self.tokens, args):
            control.should_training_stop = True


class StaleEngineAlarm(TrainerCallback):
    """Warns when the generation engine samples from other weights than those that are trained.

    TRL compares the log-probabilities of each sampled token in the engine and in the trainer. They
    differ a little by rounding; a mean difference above the threshold means stale or wrong weights,
    and rewards that stay flat. Adds the metric `alarms/stale_engine`, 1 or 0, wherever the
    difference is logged.

    Args:
        threshold: In nats per token, above 0.
        console: Where to warn, once in `every` steps at most.
    """

    every = 10

    def __init__(self, threshold: float = 0.1, console: Console | None = None) -> None:
        self.threshold = threshold
        self.console = console or Console()
        self._warned_at: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        difference = (logs or {}).get(ENGINE_DIFFERENCE)
        if logs is None or difference is None:
            return
        stale = not difference <= self.threshold  # NaN is no good sign either
        logs["alarms/stale_engine"] = float(stale)
        recently = self._warned_at is not None and state.global_step - self._warned_at < self.every
        if not stale or recently or not state.is_world_process_zero:
            return
        self._warned_at = state.global_step
        text = (
            f"Step {state.global_step}: the engine's log-probabilities are {difference:.3g} nats "
            f"per token away from the trainer's (alarm above {self.threshold:g}). It probably "
            "samples from old or wrong weights, and then rewards stay flat. If this goes on: "
            "restart the vLLM server (one that served another run keeps its weights), set "
            "vllm_enable_sleep_mode: false, or train with use_vllm: false. In low precision on "
            "very long rationales a higher stale_engine_threshold may be right."
        )
        self.console.print(Text(text, style="bold red"))


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
    """Foreign text, safe for a terminal.

    No markup, no control or direction characters, only what the encoding has.
    """
    if len(text) > limit:
        text = text[:limit] + " ..."
    text = "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
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


def _any_process(flag: bool, args: TrainingArguments) -> bool:
    if args.world_size <= 1:
        return flag
    import torch
    from accelerate.utils import reduce

    return bool(reduce(torch.tensor(float(flag), device=args.device), "sum").item())
