"""What a run was started with: versions, machine, code and command (environment.json)."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from grace_rl.run.secrets import masked_words
from grace_rl.run.versions import installed_versions

COMMAND = "GRACE_RL_COMMAND"  # what was typed, in the environment of launched processes
OUTCOME = "GRACE_RL_OUTCOME"  # a file for the exit code, likewise


def describe_environment(world_size: int = 1, seed: int | None = None) -> dict[str, Any]:
    """What one needs to know to run this again elsewhere."""
    import torch

    return {
        "started": now(),
        "command": command_line(),
        "seed": seed,
        "world_size": world_size,
        "versions": installed_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git(),
    }


def command_line(without: tuple[str, ...] = ()) -> str:
    """The command that started this process, as one would type it, secrets masked.

    Args:
        without: Flags to leave out, such as `--overwrite` where the command is to resume.
    """
    program, *arguments = shlex.split(os.environ.get(COMMAND, "")) or sys.argv or [""]
    if Path(program).name == "__main__.py":
        words = ["python", "-m", Path(program).parent.name]
    elif program.endswith(".py"):
        words = ["python", program]
    else:
        words = [Path(program).name]
    kept = [word for word in arguments if word.split("=")[0] not in without]
    return shlex.join(words + masked_words(kept))


def _git() -> dict[str, Any] | None:
    """Commit of the repository that the run was started in."""

    def ask(*question: str) -> str:
        answer = subprocess.run(
            ["git", *question], capture_output=True, text=True, timeout=10, check=True
        )
        return answer.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """Date and time here, with the time zone's offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
