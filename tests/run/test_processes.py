"""Processes are joined with the recipe's limit on waiting, also on a CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

CODE = """
import sys
from datetime import timedelta
from grace_rl.run.processes import join_processes
from grace_rl.errors import UserError
settled = join_processes({"use_cpu": True, "ddp_timeout": 925})
import torch.distributed as dist
from transformers import TrainingArguments
args = TrainingArguments("x", ddp_timeout=925, report_to="none", **settled)
assert args.world_size == 2, args.world_size
found = dist.group.WORLD._get_backend(args.device).options._timeout
assert found == timedelta(seconds=925), found
from grace_rl.run.processes import agree
try:
    agree("a full disk" if args.process_index else None, 2)
except UserError as error:
    assert error.problems == ["a full disk"]
else:
    sys.exit("no error")
import os
from grace_rl.run.processes import left_by_others
assert not left_by_others(RuntimeError("a bug"))
if args.process_index:
    os._exit(0)  # as if killed
try:
    agree(None, 2)
except RuntimeError as error:
    assert left_by_others(error), error
    assert left_by_others(ValueError("told on")) is False
else:
    sys.exit("no error")
os._exit(0)
"""


def test_ddp_timeout_reaches_gloo_and_processes_fail_alike_or_know_who_is_left(tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for child in children:
        said = child.communicate()[1]
        assert child.returncode == 0, said
