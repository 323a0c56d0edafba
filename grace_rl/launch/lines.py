"""`grace-rl train RECIPE --launch zero3`: the accelerate line that it stands for, printed and run.

The files that a name stands for are those of `recipes/accelerate`; the package carries them, so
they are found without a checkout. What the launcher hides is brought through: a signal reaches the
processes that train and nobody kills them while they save, and the exit code is theirs.

Cheap to import.
"""

from __future__ import annotations

import difflib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from grace_rl.errors import UserError, first_line
from grace_rl.run.environment import COMMAND, OUTCOME
from grace_rl.run.secrets import masked_words

CONFIGS = Path(__file__).with_name("accelerate")
INTERRUPTED = 130
SAVING = 3600  # seconds that torch's agent waits for processes told to stop


@dataclass(frozen=True)
class Launch:
    """One way to start a run.

    Attributes:
        path: accelerate's config file.
        config: Its content.
        processes: How many there will be, at least 1.
    """

    path: Path
    config: dict[str, Any]
    processes: int

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed.

        >>> read_launch("zero3", 8).zero_stage, read_launch("ddp", 8).zero_stage
        (3, 0)
        """
        return int((self.config.get("deepspeed_config") or {}).get("zero_stage", 0))

    @property
    def offloads(self) -> bool:
        """Whether weights and optimizer live in the machine's memory."""
        config = self.config.get("deepspeed_config") or {}
        return "cpu" in (config.get("offload_optimizer_device"), config.get("offload_param_device"))

    def line(self, arguments: Sequence[str]) -> list[str]:
        """The words of the command.

        Args:
            arguments: What follows `grace-rl`, without `--launch` and `--num_processes`.
        """
        several = self.config["distributed_type"] != "NO"
        count = ["--num_processes", str(self.processes)] if several else []
        return [
            *("accelerate", "launch", "--config_file", _shown(self.path)),
            *count,
            *("-m", "grace_rl"),
            *arguments,
        ]


def launch_names() -> list[str]:
    """What `--launch` takes, beside a file of one's own.

    >>> launch_names()[:3]
    ['cpu-zero2', 'cpu-zero3', 'ddp']
    """
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_launch(name: str, processes: int | None = None) -> Launch:
    """Read a config file.

    Args:
        name: A name of `launch_names()` or a YAML file of accelerate's.
        processes: How many; None takes the GPUs of this machine, or the file's number where there
            are none.

    Raises:
        UserError: There is no such file, or it cannot be started from one line.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        close = difflib.get_close_matches(name, launch_names(), n=1)
        advice = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(launch_names())
        raise UserError(f"--launch: no {name}{advice}; there are {names}, or a YAML file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise UserError(f"--launch: {path} is no YAML that can be read: {reason}") from error
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise UserError(f"--launch: {path} is no config of accelerate: it has no distributed_type")
    for key in ("num_machines", "num_processes"):
        if not isinstance(config.get(key), int | None):
            raise UserError(f"--launch: {path}: {key} must be a number, not {config[key]!r}")
    if not isinstance(config.get("deepspeed_config"), dict | None):
        raise UserError(f"--launch: {path}: deepspeed_config must be a mapping")
    if (config.get("num_machines") or 1) > 1:
        raise UserError(
            f"--launch: {name} is for several machines, which must each be told their number; "
            f"the lines to type are in the comments of {_shown(path)}"
        )
    alone = config["distributed_type"] == "NO"
    if processes is None:
        processes = 1 if alone else _gpus() or config.get("num_processes") or 1
    if processes < 1:
        raise UserError(f"--num_processes: must be at least 1, not {processes}")
    if alone and processes > 1:
        raise UserError(f"--num_processes: {name} starts one process, not {processes}; use ddp")
    if processes == 1 and str(config["distributed_type"]).startswith("MULTI_"):
        raise UserError(f"--num_processes: {name} needs at least 2 processes; use --launch single")
    return Launch(path, config, processes)


def run_launch(launch: Launch, arguments: Sequence[str], typed: Sequence[str]) -> int:
    """Print the line, run it, and return the exit code of the processes that trained.

    Ctrl-C and SIGTERM are passed on: they save a checkpoint and end with 130.

    Args:
        launch: What to start.
        arguments: See `Launch.line`.
        typed: The command to type again to resume, word by word.
    """
    words = launch.line(arguments)
    print(shlex.join(masked_words(words)), flush=True)
    words[:2] = [sys.executable, "-m", "accelerate.commands.launch"]
    words[words.index("--config_file") + 1] = str(launch.path)
    environment = {
        **os.environ,
        COMMAND: shlex.join(typed),
        # torch's agent would stop for Ctrl-C itself and kill after 30 s what still saves.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGHUP,SIGQUIT",
        "PET_SHUTDOWN_TIMEOUT": str(SAVING),
    }
    if not _gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    told: list[float] = []

    def tell(number: int, frame: Any) -> None:
        # The terminal tells all processes within a moment; that is one signal.
        if not told or time.monotonic() - told[-1] > 1.0:
            told.append(time.monotonic())
            _interrupt_below(launcher.pid)

    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome"
        # Ignored from here on, also by the launcher, which inherits it; those that train take
        # the signal back (`launched`).
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        launcher = subprocess.Popen(words, env=environment | {OUTCOME: str(outcome)})
        others = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = launcher.wait()
        finally:
            others[signal.SIGINT] = before
            for number, handler in others.items():
                signal.signal(number, handler)
        said = int(outcome.read_text(encoding="utf-8")) if outcome.is_file() else 0
    if said:
        return said
    if told and code:
        return INTERRUPTED
    return code if code >= 0 else 128 - code


@contextmanager
def launched() -> Iterator[Any]:
    """In a process that trains: inside, Ctrl-C works again under `run_launch`.

    Yields a function that takes the exit code, tells it to `run_launch`, and returns what the
    launcher should see. Without `run_launch` nothing happens.
    """
    place = os.environ.get(OUTCOME)
    if place is None:
        yield int
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def tell(code: int) -> int:
        Path(place).write_text(str(code), encoding="utf-8")
        # Processes that stop in order do so together; for the launcher nothing failed.
        return 0 if code == INTERRUPTED else code

    try:
        yield tell
    except UserError:
        tell(2)
        raise


@contextmanager
def counted(processes: int) -> Iterator[None]:
    """Inside, recipes are read as in a run of so many processes."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def _interrupt_below(pid: int) -> None:
    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in below:
        try:
            process.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            continue


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _shown(path: Path) -> str:
    """As one would type it: from here, where it lies below."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
