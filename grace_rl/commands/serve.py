"""grace-rl serve MODEL: a vLLM server for `vllm_mode: server`, as TRL starts it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from grace_rl.run.printing import say

HELP = "serve a policy with vLLM, for training with --use_vllm true --vllm_mode server"
RECIPE_OVERRIDES = True  # what is not known here is given to `vllm serve`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="`scenes`, a folder, or a hub id")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: this machine only). vLLM's endpoints take new weights "
        "from anybody who reaches them: open it to a network that you trust, or to none",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--tensor_parallel_size", type=int, default=1, metavar="N", help="GPUs that share the model"
    )
    parser.add_argument(
        "--gpu_memory_utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the GPU's memory (default: 0.9)",
    )
    parser.add_argument(
        "--max_model_len", type=int, metavar="TOKENS", help="prompt and rationale together"
    )
    parser.add_argument("--dtype", default="auto", help="default: as the model is stored")
    parser.epilog = "All other options are those of `vllm serve`, such as --enforce-eager."


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.errors import UserError
    from grace_rl.rollout.policy import SCENES_UNTRAINED, outline_policy, resolve_model

    if options.model == SCENES_UNTRAINED:
        raise UserError("serve: scenes/untrained is made by each run; serve a folder or a hub id")
    outline_policy(resolve_model(options.model, Path()))
    if find_spec("vllm") is None:
        raise UserError("serve: needs the package vllm; install 'grace-rl[vllm]'")
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    from grace_rl.rollout.engines import vllm_runs_on_cpu

    if vllm_runs_on_cpu():
        raise UserError(
            "serve: this vLLM is built for CPUs, and a server gets its weights over NCCL, which "
            "needs a GPU; on a CPU use --use_vllm true --vllm_mode colocate"
        )
    command = build_command(
        ScriptArguments(
            model=resolve_model(options.model, Path()),
            host=options.host,
            port=options.port,
            tensor_parallel_size=options.tensor_parallel_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            max_model_len=options.max_model_len,
            dtype=options.dtype,
        ),
        overrides,
    )
    shown = shlex.join(["vllm", *command[command.index("serve") :]])
    say(f"VLLM_SERVER_DEV_MODE=1 {shown}")
    # Weights and prefix cache are reached through vLLM's development endpoints.
    os.execve(sys.executable, command, {**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
