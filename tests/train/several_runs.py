"""Several `grace-rl` commands one after another in one process, for the tests beside it: starting
Python, torch and DeepSpeed takes longer than each of these runs.

    python -m torch.distributed.run --nproc_per_node 2 several_runs.py COMMANDS.json

COMMANDS.json is a list of `{"arguments": [...], "interrupt_at": step or null, "exit": code}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from grace_rl import cli
from grace_rl.train.callbacks import StopOnSignal

on_step_end = StopOnSignal.on_step_end


def interrupting(step: int | None) -> Any:
    """`StopOnSignal.on_step_end`, after telling the last process to stop, as Ctrl-C would."""

    def on_step_end_told(self: Any, args: Any, state: Any, *others: Any, **keywords: Any) -> None:
        if state.global_step == step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, *others, **keywords)

    return on_step_end_told


for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    StopOnSignal.on_step_end = interrupting(command["interrupt_at"])  # type: ignore[method-assign]
    code = cli.main(command["arguments"])
    if code != command["exit"]:
        sys.exit(f"exit code {code} of {command}")
