"""Callbacks: metrics, progress, stopping in order, the stale-engine alarm, printed groups."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from grace_rl.run.directory import RunDirectory
from grace_rl.run.records import read_metrics, read_status
from grace_rl.run.screen import Screen
from grace_rl.train.callbacks import (
    ENGINE_DIFFERENCE,
    LastStepLogged,
    MetricsWriter,
    StaleEngineAlarm,
)
from grace_rl.train.keep import is_logged
from grace_rl.train.progress import ProgressLine, print_group
from grace_rl.train.stop import StopOnSignal

ARGS: Any = SimpleNamespace(world_size=1, device="cpu")


def plain_console(**options: Any) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Screen(file=out, width=options.pop("width", 120), **options), out


def at_step(step: int, **fields: Any) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, **fields)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.open({})
    return run


# -- metrics ---------------------------------


@pytest.mark.parametrize(("step", "logged"), [(9, False), (10, True)])
def test_the_last_step_is_logged(step: int, logged: bool) -> None:
    control = TrainerControl()
    args: Any = SimpleNamespace(logging_strategy="steps")
    LastStepLogged().on_step_end(args, at_step(step), control)
    assert control.should_log == logged


@pytest.mark.parametrize(
    ("steps", "every", "between", "kept"),
    [
        (4, 10, 1, [4]),  # a short run
        (10, 5, 1, [5, 10]),
        (10, 4, 2, [3, 7, 9]),  # a batch of rollouts serves two steps: 3 and 4, 7 and 8, 9 and 10
    ],
)
def test_rollouts_are_kept_of_logged_steps(
    steps: int, every: int, between: int, kept: list[int]
) -> None:
    args = SimpleNamespace(steps_between_generations=between, logging_first_step=False)
    state = SimpleNamespace(logging_steps=every, max_steps=steps)
    trainer = SimpleNamespace(args=args, state=state)
    written = range(1, steps + 1, between)
    assert [step for step in written if is_logged(step, trainer)] == kept


def test_metrics_are_lines_that_can_be_followed(run: RunDirectory) -> None:
    writer = MetricsWriter(run)
    writer.on_train_begin(ARGS, at_step(0), TrainerControl())
    for step in (1, 2):
        writer.on_log(
            ARGS,
            at_step(step),
            TrainerControl(),
            logs={"reward": 0.5, "kl": float("nan"), "none": None},
        )
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert lines[-1] | {"seconds": 0} == {
        "step": 2,
        "seconds": 0,
        "reward": 0.5,
        "kl": None,
        "none": None,
    }
    assert lines[1]["seconds"] >= lines[0]["seconds"] >= 0


def test_the_closing_summary_is_no_step(run: RunDirectory) -> None:
    MetricsWriter(run).on_log(
        ARGS, at_step(10), TrainerControl(), logs={"train_runtime": 3.0, "train_loss": 0.1}
    )
    assert read_metrics(run.path) == []
    status = read_status(run.path)
    assert (
        status is not None
        and status["summary"]["train_runtime"] == 3.0
        and status["status"] == "running"
    )


def test_other_processes_write_no_metrics(run: RunDirectory) -> None:
    state = at_step(1, is_world_process_zero=False)
    MetricsWriter(run).on_log(ARGS, state, TrainerControl(), logs={"reward": 0.5})
    assert read_metrics(run.path) == []


def test_seconds_go_on_where_the_kept_metrics_end(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 1, "seconds": 100.0}\n')
    writer = MetricsWriter(run)
    writer.on_train_begin(ARGS, at_step(1), TrainerControl())
    writer.on_log(ARGS, at_step(2), TrainerControl(), logs={"reward": 0.5})
    assert 100 <= read_metrics(run.path)[-1]["seconds"] < 1000


# -- progress ---------------------------------


def test_without_a_terminal_there_is_one_plain_line_per_log() -> None:
    console, out = plain_console()
    progress = ProgressLine(console)
    progress.on_train_begin(ARGS, at_step(0), TrainerControl())
    for step in (1, 2):
        progress.on_step_end(ARGS, at_step(step), TrainerControl())
        logs = {
            "reward": 0.51234,
            "completions/mean_length": 12.0,
            "entropy": float("nan"),
            "unknown": 1.0,
        }
        progress.on_log(ARGS, at_step(step), TrainerControl(), logs=logs)
    progress.on_train_end(ARGS, at_step(2), TrainerControl())
    lines = out.getvalue().splitlines()
    assert (
        len(lines) == 2
        and lines[1].startswith("step 2/10 ")
        and lines[1].endswith("reward 0.512  tokens 12")
    )


def test_a_terminal_gets_a_bar_and_gets_its_cursor_back() -> None:
    console, out = plain_console(force_terminal=True)
    progress = ProgressLine(console)
    progress.on_train_begin(ARGS, at_step(0), TrainerControl())
    progress.on_step_end(ARGS, at_step(3), TrainerControl())
    progress.on_log(ARGS, at_step(3), TrainerControl(), logs={"reward": 0.25})
    progress.close()
    progress.close()
    assert "3/10" in out.getvalue() and "reward 0.25" in out.getvalue()
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


def test_other_processes_are_quiet() -> None:
    console, out = plain_console(force_terminal=True)
    progress = ProgressLine(console)
    state = at_step(1, is_world_process_zero=False)
    progress.on_train_begin(ARGS, state, TrainerControl())
    progress.on_log(ARGS, state, TrainerControl(), logs={"reward": 1.0})
    assert out.getvalue() == ""


# -- stopping ---------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_generation_boundary_and_saves(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    console, out = plain_console()
    stop, control = StopOnSignal(steps_between_generations=4, console=console), TrainerControl()
    stop.on_train_begin(ARGS, at_step(0), control)
    os.kill(os.getpid(), number)
    for step in (1, 2, 3):
        stop.on_step_end(ARGS, at_step(step), control)
        assert not control.should_training_stop and not control.should_save
    stop.on_step_end(ARGS, at_step(4), control)
    assert control.should_training_stop and control.should_save and stop.interrupted
    stop.on_train_end(ARGS, at_step(4), control)
    assert signal.getsignal(number) is before
    assert "Stopped at step 4 of 10" in out.getvalue() and "To resume:" in out.getvalue()


def test_a_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopOnSignal()
    stop.on_train_begin(ARGS, at_step(0), TrainerControl())
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_with_several_processes_the_launchers_echo_is_no_second_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopOnSignal()
    stop.on_train_begin(SimpleNamespace(world_size=2, device="cpu"), at_step(0), TrainerControl())  # type: ignore[arg-type]
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("grace_rl.train.stop.time.monotonic", lambda: float("inf"))
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()


def test_a_signal_in_the_last_step_is_no_interruption() -> None:
    stop, control = StopOnSignal(), TrainerControl()
    stop.on_train_begin(ARGS, at_step(9), control)
    os.kill(os.getpid(), signal.SIGINT)
    stop.on_step_end(ARGS, at_step(10), control)
    stop.on_train_end(ARGS, at_step(10), control)
    assert not stop.interrupted


# -- the alarm ---------------------------------


def test_the_alarm_is_a_metric_and_warns_once_in_ten_steps() -> None:
    console, out = plain_console()
    alarm = StaleEngineAlarm(0.1, console)
    raised = []
    for step in range(1, 22):
        logs = {ENGINE_DIFFERENCE: 0.01 if step < 5 else 0.2}
        alarm.on_log(ARGS, at_step(step), TrainerControl(), logs=logs)
        raised.append(logs["alarms/stale_engine"])
    assert raised == [0.0] * 4 + [1.0] * 17
    assert [line.split(":")[0] for line in out.getvalue().splitlines() if "Step" in line] == [
        "Step 5",
        "Step 15",
    ]
    logs = {ENGINE_DIFFERENCE: float("nan")}
    alarm.on_log(ARGS, at_step(30), TrainerControl(), logs=logs)
    assert logs["alarms/stale_engine"] == 1.0


def test_no_engine_no_alarm() -> None:
    logs = {"reward": 1.0}
    StaleEngineAlarm().on_log(ARGS, at_step(1), TrainerControl(), logs=logs)
    assert logs == {"reward": 1.0}


# -- groups ---------------------------------


def row(
    rationale: str, advantage: Any, reward: float | None = 0.5, **fields: Any
) -> dict[str, Any]:
    return {
        "text": "a fox",
        "rationale": rationale,
        "advantage": advantage,
        "reward/length": reward,
        **fields,
    }


def test_a_group_is_printed_best_first() -> None:
    console, out = plain_console()
    rows = [
        row("middling", 0.0),
        row("worst", [-1.0, -0.5], None),
        row("unscored", None),
        row("best", 1.25),
    ]
    print_group(console, [{"role": "query", **r} for r in rows], ["length"])
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "role query: a fox"
    order = [
        line.split()[0]
        for line in lines
        if line.split() and line.split()[0] in {r["rationale"] for r in rows}
    ]
    assert order == ["best", "middling", "worst", "unscored"]
    assert "-0.750" in out.getvalue() and "1.250" in out.getvalue()


HOSTILE = [
    "[bold red]markup[/bold red] [/nothing]",
    "[link=file:///etc/passwd]click[/link]",
    "\x1b[2J\x1b]0;title\x07 escape \x9b31m",
    "right\u202eto left\u2066",
    "a\ud800surrogate",
    "tab\tnewline\nreturn\rnull\x00",
    "",
    "x" * 5000,
    "漢字 emoji 🦊 ﷽",
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_rationales_are_data(hostile: str, encoding: str) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=100)
    print_group(console, [row(hostile, 0.5, text=hostile), row("[b]", 0.1)], ["length"])
    console.file.flush()
    printed = raw.getvalue().decode(encoding)
    assert not set(printed) & set("\x1b\x07\x9b\x00\r\u202e\u2066")
    assert "[b]" in printed
    if "markup" in hostile:
        assert "[bold red]markup[/bold red] [/nothing]" in printed


def test_an_empty_group_prints_nothing() -> None:
    console, out = plain_console()
    print_group(console, [], ["length"])
    assert out.getvalue() == ""
