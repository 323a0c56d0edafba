"""The processes of one run: joined before transformers looks at them, parted before Python ends.

`torchrun`, `accelerate launch` and `deepspeed` start the processes and tell each its number in the
environment (RANK, LOCAL_RANK, WORLD_SIZE). On GPUs transformers joins them by itself. On a CPU it
would take each for a run of its own unless it is told otherwise, and DeepSpeed has to be joined by
hand over gloo, before the training arguments exist.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from grace_rl.errors import UserError


def join_processes(training: Mapping[str, Any]) -> dict[str, Any]:
    """Make this process one of its run; called before the training arguments are built.

    They part when Python ends, in order. Joining again changes nothing.

    Args:
        training: The recipe's keys of the training arguments.

    Returns:
        Keywords of the training arguments that go before the recipe's.

    Raises:
        UserError: DeepSpeed is asked to use the CPU of a machine that shows it a GPU.
    """
    atexit.register(part_processes)
    deepspeed = bool(training.get("deepspeed")) or _is_true("ACCELERATE_USE_DEEPSPEED")
    on_cpu = bool(training.get("use_cpu")) or not _has_accelerator()
    if not deepspeed:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return {"use_cpu": True} if on_cpu and several else {}
    if "LOCAL_RANK" not in os.environ:  # started without a launcher: alone
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    if not on_cpu:
        return {}
    if _has_accelerator():
        raise UserError(
            "use_cpu: DeepSpeed takes the GPUs that it sees; to train on the CPU of this machine, "
            "set CUDA_VISIBLE_DEVICES= in the environment"
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # that of an earlier run in this process
    PartialState(backend="gloo", timeout=timedelta(seconds=training.get("ddp_timeout") or 1800))
    given = training.get("accelerator_config") or {}
    if isinstance(given, (str, Path)):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    # `use_cpu` would make transformers forget DeepSpeed.
    return {"use_cpu": False, "accelerator_config": {**given, "use_configured_state": True}}


def part_processes() -> None:
    """End what runs beside Python's main thread for the processes to talk, in order.

    Left to the end of the interpreter, threads of the process group may be destroyed while they
    still run, which aborts a process that has done all its work.
    """
    gc.collect()  # engines that only cycles keep alive, and what they hold of the process group
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
