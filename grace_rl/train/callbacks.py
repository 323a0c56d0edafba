"""What happens beside the training steps: metrics, progress, stale-engine alarm, orderly stop.

`follow` attaches all of it to a trainer, and takes it down again however the training ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from grace_rl.run.directory import RunDirectory
from grace_rl.run.files import plain_numbers
from grace_rl.run.records import read_metrics
from grace_rl.run.screen import Screen
from grace_rl.train.panel import panel_of
from grace_rl.train.progress import LogReader, ProgressLine
from grace_rl.train.rollout_tables import RolloutTables
from grace_rl.train.stop import StopOnSignal

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
    console = console or Screen()
    alarm = StaleEngineAlarm(stale_engine_threshold, console)
    progress = ProgressLine(console)
    stop = StopOnSignal(steps_between_generations, console)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    # First of all, so that trackers (report_to) see the alarm's metric too.
    trainer.callback_handler.callbacks.insert(0, alarm)
    if (panel := panel_of(trainer, run)) is not None:  # its cost is a metric too
        trainer.callback_handler.callbacks.insert(0, panel)
    tables = RolloutTables(run, trainer.callback_handler)
    for callback in (LastStepLogged(), MetricsWriter(run), tables, progress, stop):
        trainer.add_callback(callback)
    bars = is_progress_bar_enabled()
    disable_progress_bar()  # one for every file saved
    try:
        yield stop
    finally:
        if bars:
            enable_progress_bar()
        stop.close()
        progress.close()


class LastStepLogged(TrainerCallback):
    """The last step is logged, whatever `logging_steps` says: a short run leaves metrics, too."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class MetricsWriter(LogReader):
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

    def read_logs(self, logs: dict[str, Any], state: TrainerState, args: TrainingArguments) -> None:
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


class StaleEngineAlarm(LogReader):
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
        self.console = console or Screen()
        self._warned_at: int | None = None

    def read_logs(self, logs: dict[str, Any], state: TrainerState, args: TrainingArguments) -> None:
        difference = logs.get(ENGINE_DIFFERENCE)
        if difference is None:
            return
        stale = not difference <= self.threshold  # NaN is no good sign either
        logs["alarms/stale_engine"] = float(stale)
        recently = self._warned_at is not None and state.global_step - self._warned_at < self.every
        if not stale or recently:
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
        self.console.print(text, style="bold red")
