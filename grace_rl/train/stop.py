"""Ending a run before its last step: told by a signal, or when a budget is used up.

transformers' own callback for signals (`enable_jit_checkpoint`) knows SIGTERM only, saves between
any two steps, on the process that was told, and waits for a hanging step for ever; hence ours.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from grace_rl.run.environment import OUTCOME, command_line
from grace_rl.run.screen import Screen

INTERRUPTED = 130
SHOW_THREADS = signal.SIGUSR2

OUTSIDE = """
import os, select, signal, sys, time

process, longest, spare, show = int(sys.argv[1]), 0.0, float(sys.argv[2]), int(sys.argv[3])
told, digits = None, ""
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # whoever ends whole families
    signal.signal(number, signal.SIG_IGN)
while os.getppid() == process:
    left = 60 if told is None else max(0, told + longest + spare - time.monotonic())
    if not select.select([0], [], [], left)[0]:
        if told is None:
            continue
        os.write(2, b"The process does not answer any more; it is ended. Its threads:\\n")
        os.kill(process, show)
        time.sleep(1)
        os.kill(process, signal.SIGKILL)
    for byte in os.read(0, 4096) or sys.exit():
        if byte in (signal.SIGINT, signal.SIGTERM):
            told = told or time.monotonic()
        elif byte == 32:
            told, longest, digits = None, float(digits), ""
        elif chr(byte) in "0123456789.":
            digits += chr(byte)
"""
"""A process that ends this one where code in it never lets go of Python, so that no handler of a
signal runs. Its stdin has numbers of signals, which Python's own handler in C writes there, and
after each step without one the seconds of the longest step, followed by a space."""

# What is told to a fork of this process is told to that fork only.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop.

    A second signal ends at once (KeyboardInterrupt). With several processes all stop at the same
    step, whichever of them was told. A step that does not end (a reward that hangs) is given up
    `patience` seconds after the longest one so far would have ended, and the process `last` seconds
    later, whatever it is doing; then the last checkpoint stands.

    Args:
        steps_between_generations: Optimizer steps that one batch of rollouts serves. A checkpoint
            between them would lose the rest of the batch, so the stop waits for the next multiple.
        console: Where to say what happens.

    Attributes:
        interrupted: Whether the training was stopped before its last step: exit code 130.
    """

    patience = 15.0
    last = 10.0

    def __init__(self, steps_between_generations: int = 1, console: Console | None = None) -> None:
        self.steps_between_generations = max(1, steps_between_generations)
        self.console = console or Screen()
        self.interrupted = False
        self._first_signal: float | None = None
        self._grace = 0.0
        self._handlers: dict[int, Any] = {}
        self._longest = self._since = 0.0  # seconds between two moments at which it could stop
        self._overdue = False
        self._ended = threading.Event()
        self._outside: subprocess.Popen[bytes] | None = None
        self._tells = -1  # where `OUTSIDE` listens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The terminal tells every process and the launcher, which tells them again: that is one
        # signal.
        self._grace = 2.0 if args.world_size > 1 or OUTCOME in os.environ else 0.0
        self._since = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers.setdefault(number, signal.signal(number, self._on_signal))
            self._watch_from_outside()

    def _watch_from_outside(self) -> None:
        spare = self.patience + self.last + 2  # later than the thread that watches from inside
        command = [sys.executable, "-I", "-S", "-c", OUTSIDE]
        command += [str(os.getpid()), str(spare), str(int(SHOW_THREADS))]
        its_end, own = os.pipe()
        self._outside = subprocess.Popen(
            command, stdin=its_end, stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(its_end)
        os.set_blocking(own, False)
        signal.set_wakeup_fd(own, warn_on_full_buffer=False)
        self._tells = own
        faulthandler.register(SHOW_THREADS, file=2)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._tell_outside(bytes([number]))
            # print() may be what the signal interrupted
            _tell("\nStopping after this step and saving a checkpoint; once more to end at once.")
            threading.Thread(target=self._watch, daemon=True).start()
        elif self._overdue or now - self._first_signal >= self._grace:
            self.restore_handlers()
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """In a thread of its own: give the step up, then the process."""
        if not self._ended.wait(self._longest + self.patience):
            self._overdue = True
            _tell("The step does not end; giving it up. The last checkpoint stands.")
            main = threading.main_thread().ident
            if main is not None:
                signal.pthread_kill(main, signal.SIGTERM)
            if not self._ended.wait(self.last):
                os._exit(INTERRUPTED)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps_between_generations:
            return
        now = time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now
        if self._first_signal is None:
            self._tell_outside(f"{self._longest:.3f} ".encode())
        if any_process(self._first_signal is not None, args):
            self._watched_no_more()  # saving takes as long as it takes
            if state.global_step < state.max_steps:
                self.interrupted = True
                control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        if self.interrupted and state.is_world_process_zero:
            command = command_line(without=("--overwrite",))
            done = f"Stopped at step {state.global_step} of {state.max_steps}"
            self.console.print(f"{done}; a checkpoint is saved. To resume:\n  {command}")

    def restore_handlers(self) -> None:
        """Put back the signal handlers from before the training; may be called more than once."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def close(self) -> None:
        """The training is over. A run that was given up has its last seconds, and no more."""
        self.restore_handlers()
        if not self._overdue:
            self._watched_no_more()

    def _tell_outside(self, message: bytes) -> None:
        if self._outside is not None:
            with contextlib.suppress(OSError):
                os.write(self._tells, message)

    def _watched_no_more(self) -> None:
        self._ended.set()
        outside, self._outside = self._outside, None
        if outside is not None:
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(-1)
            faulthandler.unregister(SHOW_THREADS)
            os.close(self._tells)
            outside.kill()
            outside.wait()


class Budget(TrainerCallback):
    """Ends the training in order, as after its last step, when its budget is used up.

    Args:
        seconds: Of training, scoring during it included; a resumed run has them anew. None is no
            limit.
        tokens: That training reads and writes, of all processes and of the whole run. None is no
            limit.
    """

    def __init__(self, seconds: float | None = None, tokens: float | None = None) -> None:
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
        if any_process(spent or state.num_input_tokens_seen >= self.tokens, args):
            control.should_training_stop = True
            control.should_log |= args.logging_strategy != "no"  # it is the last step


def any_process(flag: bool, args: TrainingArguments) -> bool:
    """Whether the flag is set on any process; all must ask."""
    if args.world_size <= 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=args.device), "sum").item())


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, f"{line}\n".encode())
