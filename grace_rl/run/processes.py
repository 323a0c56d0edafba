"""The processes of one run: joined before transformers looks at them, parted before Python ends.

`torchrun`, `accelerate launch` and `deepspeed` start the processes and tell each its number in the
environment (RANK, LOCAL_RANK, WORLD_SIZE). On GPUs transformers joins them by itself. On a CPU it
would take each for a run of its own unless it is told otherwise, and DeepSpeed has to be joined by
hand over gloo, before the training arguments exist.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from grace_rl.errors import UserError

# What gloo says, in a RuntimeError of no kind of its own.
LOST = ("/gloo/", "Connection closed by peer", "Connection reset by peer")
PARTING = timedelta(seconds=5)  # how long a process waits for the others at its end


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
    part_at_exit()
    zero = bool(training.get("deepspeed")) or _is_true("ACCELERATE_USE_DEEPSPEED")
    zero = zero and find_spec("deepspeed") is not None  # the recipe will say so
    on_cpu = bool(training.get("use_cpu")) or not _has_accelerator()
    timeout = timedelta(seconds=training.get("ddp_timeout") or 1800)
    if not zero:
        if not on_cpu or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return {}
        from accelerate import PartialState

        # transformers would join them too, but without `ddp_timeout`; it takes what is there.
        PartialState(cpu=True, backend=training.get("ddp_backend") or "gloo", timeout=timeout)
        return {"use_cpu": True}
    # What torch thinks of DeepSpeed's calls is nothing that a user could change.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
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
    # DeepSpeed would compile its all-reduce through shared memory: minutes at the first start, a
    # compiler that must be there, and a start that is killed meanwhile leaves a lock for which
    # all later ones wait for ever. Gloo reduces as well.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # that of an earlier run in this process
    PartialState(backend="gloo", timeout=timeout)
    given = training.get("accelerator_config") or {}
    if isinstance(given, (str, Path)):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    # `use_cpu` would make transformers forget DeepSpeed.
    return {"use_cpu": False, "accelerator_config": {**given, "use_configured_state": True}}


def agree(problem: str | Sequence[str] | None, processes: int) -> None:
    """Have all processes go on, or fail alike: every one of them must call this.

    Args:
        problem: What went wrong on this process; None or empty if nothing did.
        processes: How many there are.

    Raises:
        UserError: With the problems of all processes, each once.
    """
    problems = [problem] if isinstance(problem, str) else list(problem or ())
    if processes > 1:
        from accelerate.utils import gather_object

        problems = list(dict.fromkeys(gather_object(problems)))
    if problems:
        raise UserError(problems)


def left_by_others(error: BaseException) -> bool:
    """Whether this is how a process learns that another one of its run has ended or hangs."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, torch.distributed.DistError):
            return True
        if isinstance(told, RuntimeError) and any(sign in str(told) for sign in LOST):
            return True
        told = told.__cause__ or told.__context__
    return False


def part_at_exit() -> None:
    """Have `part_processes` called when Python ends: once, before all registered so far."""
    atexit.unregister(part_processes)
    atexit.register(part_processes)


def part_processes() -> None:
    """End the threads that talk to the other processes, while Python still runs.

    Gloo's threads may hold the tensors of the last collective. One that frees them when the
    interpreter is already ending is ended by it in the middle, and then C++ aborts a process that
    has done all its work ("terminate called without an active exception"). After an error nothing
    is done here: other processes may still wait in a collective, and the launcher ends them.
    """
    if hasattr(sys, "last_value"):
        return
    gc.collect()  # engines that only cycles keep alive, and what they hold of the process group
    engines = sys.modules.get("vllm.distributed.parallel_state")
    if engines is not None:  # at the very end vLLM would look for its groups, and not find them
        engines.cleanup_dist_env_and_memory()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_backend() == "gloo":
            # A launcher ends all processes as soon as one has failed: let each say why first.
            with contextlib.suppress(RuntimeError):
                torch.distributed.monitored_barrier(timeout=PARTING)
        torch.distributed.destroy_process_group()


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
