"""Several `grace-rl` commands one after another in one process, for the tests beside it: starting
Python, torch and DeepSpeed takes longer than each of these runs.

    python -m torch.distributed.run --nproc_per_node 2 several_runs.py COMMANDS.json

COMMANDS.json is a list of objects: `arguments`, and where wanted `exit` (the expected code),
`interrupt_at` (a step after which the last process is told to stop) and `given_rollouts` (rollouts
that depend on step and place in the batch of all processes alone, instead of samples).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from grace_rl import cli
from grace_rl.data.scenes.world import FACT_OF_WORD
from grace_rl.train.stop import StopOnSignal

on_step_end = StopOnSignal.on_step_end
sample = GRPOTrainer._generate_single_turn


def interrupting(step: int | None) -> Any:
    """`StopOnSignal.on_step_end`, after telling the last process to stop, as Ctrl-C would."""

    def on_step_end_told(self: Any, args: Any, state: Any, *others: Any, **keywords: Any) -> None:
        if state.global_step == step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        on_step_end(self, args, state, *others, **keywords)

    return on_step_end_told


def given_rollouts(self: Any, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
    """Random words in the place of samples: of rollouts by place, of anchors by text."""
    own, process = int(self._rollouts.trained.sum()), self.accelerator.process_index
    words = self._tokenizer(" ".join(["", *sorted(FACT_OF_WORD)]))["input_ids"]
    written = []
    for i, prompt in enumerate(prompt_ids):
        place = process * own + i if i < own else 1_000_000 + sum(prompt)
        generator = torch.Generator().manual_seed(1_000 * place + self.state.global_step)
        length = int(torch.randint(3, self.max_completion_length, (), generator=generator))
        chosen = torch.randint(len(words), (length,), generator=generator).tolist()
        ended = place % 5 != 0  # every fifth is cut off
        written.append([words[c] for c in chosen] + [self.eos_token_ids[0]] * ended)
    return written, None


if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        StopOnSignal.on_step_end = interrupting(command.get("interrupt_at"))  # type: ignore[method-assign]
        given = command.get("given_rollouts", False)
        GRPOTrainer._generate_single_turn = given_rollouts if given else sample  # type: ignore[method-assign]
        code = cli.main(command["arguments"])
        if code != command.get("exit", 0):
            sys.exit(f"exit code {code} of {command}")
