"""Looks at the machine: processes, memory, disk, vLLM, ports, versions."""

from __future__ import annotations

import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from trl import get_peft_config

from grace_rl.errors import Finding, UserError, first_line
from grace_rl.launch.memory import (
    GIB,
    MemoryPlan,
    ModelShape,
    checkpoint_bytes,
    estimate,
    host_bytes,
    model_shape,
    remedies,
)
from grace_rl.launch.model_looks import adapter
from grace_rl.launch.plan import memory_plan
from grace_rl.launch.subject import Subject
from grace_rl.run.versions import installed_versions, untested

PORT = 29500  # where the processes of one machine meet, by default
_problem = partial(Finding, level="problem")
_doubt = partial(Finding, level="problem", estimate=True)


def processes(subject: Subject) -> Iterator[Finding]:
    """GPUs or threads for all processes."""
    machine, count = subject.machine, subject.processes
    if not machine.gpus:
        threads = int(os.environ.get("OMP_NUM_THREADS") or machine.cores)
        found = f"no GPU; {machine.cores} cores, {machine.ram / GIB:.1f} GiB free"
        if count > 1 and threads * count > machine.cores:
            found += f"; {count} processes x {threads} threads"
            advice = [f"OMP_NUM_THREADS={max(1, machine.cores // count)}"]
            yield Finding("machine", found, "warning", advice)
        else:
            yield Finding("machine", found)
        return
    found = f"{len(machine.gpus)} x {machine.gpus[0]}, {machine.memory / GIB:.1f} GiB each"
    machines = subject.launch.config.get("num_machines") if subject.launch else None
    here = count // int(machines or 1)
    if here > len(machine.gpus):
        advice = [f"--num_processes {len(machine.gpus)}"]
        yield _doubt("machine", f"{found}, for {here} processes", advice=advice)
    else:
        yield Finding("machine", found)


def cpu_flags() -> set[str]:
    """What Linux says this processor can do; nothing where nobody says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    known = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(known, "").split())


def half_precision(subject: Subject) -> Iterator[Finding]:
    """bfloat16 on a processor that computes it in float32, piece by piece."""
    flags = cpu_flags()
    asked = subject.args.bf16 or subject.recipe.model.get("dtype") == "bfloat16"
    unit = flags & {"avx512_bf16", "amx_bf16", "bf16"}
    if asked and not subject.machine.gpus and flags and not unit:
        found = "this processor has no unit for it and is slower than in float32"
        yield Finding("bfloat16", found, "warning", ["--bf16 false --dtype float32"])


def memory(subject: Subject) -> Iterator[Finding]:
    """Memory of the process, vLLM's share of it, and the disk."""
    if subject.policy is None or list(adapter(subject)):
        return
    shape = shape_of(subject)
    plan = memory_plan(subject, shape)
    parts = estimate(shape, plan)
    need, room = sum(parts.values()), subject.machine.memory
    trained = "" if shape.trained == shape.parameters else f", {_count(shape.trained)} trained"
    yield Finding("model", f"{_count(shape.parameters)} parameters{trained}")
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    where = "each process" if plan.processes > 1 else "the process"
    found = (
        f"{where} needs {need / GIB:.1f} of {room / GIB:.1f} GiB, at {plan.rows} rows of "
        f"{plan.tokens} tokens: {listed}"
    )
    level: Literal["ok", "warning", "problem"] = "ok"
    advice: list[str] = []
    if need > 0.9 * room:
        level = "problem" if need > room else "warning"
        advice = remedies(shape, plan, int(0.9 * room)) or ["a smaller model, or more memory"]
    yield Finding("memory", found, level, advice, estimate=True)
    offloaded = host_bytes(shape, plan)
    if offloaded > subject.machine.ram:
        found = f"offloading needs {offloaded / GIB:.1f} GiB"
        found += f", {subject.machine.ram / GIB:.1f} are free"
        yield _doubt("RAM", found, advice=["more machines, or LoRA"])
    if plan.engine and plan.on_gpu:
        yield _share(shape, plan, subject.args)
    yield _disk(subject, shape, plan)


def shape_of(subject: Subject) -> ModelShape:
    """Sizes of the policy and of what is trained of it.

    Raises:
        UserError: PEFT cannot adapt it so.
    """
    if subject.policy is None:
        raise RuntimeError("subject.policy must be there")
    try:
        adapter = get_peft_config(subject.recipe.model_config())
        with warnings.catch_warnings(action="ignore"):  # said when the run begins
            return model_shape(subject.policy.model, adapter)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {first_line(error)}") from error


def _share(shape: ModelShape, plan: MemoryPlan, args: Any) -> Finding:
    """Does vLLM's share hold the weights and the keys and values of one sequence at least?"""
    parallel = args.vllm_tensor_parallel_size
    weights = 2 * shape.parameters // parallel
    cache = max(1, 2 * shape.layers * shape.key_value * 2 // parallel)
    sequences = max(0, (plan.engine - weights) // (cache * plan.tokens))
    found = f"vLLM's share holds {sequences} sequences of {plan.tokens} tokens at once"
    if sequences >= 8:
        return Finding("vLLM", found)
    level: Literal["warning", "problem"] = "warning" if sequences else "problem"
    return Finding("vLLM", found, level, ["a higher vllm_gpu_memory_utilization"], estimate=True)


def _disk(subject: Subject, shape: ModelShape, plan: MemoryPlan) -> Finding:
    args, place = subject.args, Path(subject.recipe.training["output_dir"]).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return _problem("output_dir", f"{place} is a file", advice=["another output_dir"])
    free = shutil.disk_usage(place).free
    limit = args.save_total_limit
    saves = max(1, int(args.max_steps // args.save_steps)) if args.save_steps >= 1 else 1
    kept = min(limit + 1, saves + 1) if limit else saves
    if args.save_strategy == "no":
        kept = 0
    need = kept * checkpoint_bytes(shape, plan) + plan.weight_bytes * shape.parameters
    found = f"{need / GIB:.2f} GiB for {kept} checkpoints and the model, {free / GIB:.1f} free"
    if need > free:
        return _doubt("disk", found, advice=["save_total_limit: 1, or another output_dir"])
    return Finding("disk", found)


def engine(subject: Subject) -> Iterator[Finding]:
    """A server that answers; or engines that the processes can share."""
    args, count = subject.args, subject.processes
    if not getattr(args, "use_vllm", False):
        return
    if args.vllm_mode == "server":
        from grace_rl.rollout.server import server_problems, server_url  # requests

        url, model = server_url(args), subject.place
        wrong = server_problems(url, model, args.max_text_tokens + args.max_completion_length)
        if not wrong:
            yield Finding("vLLM server", f"{url} serves {model}")
        yield from (_doubt("vLLM server", problem) for problem in wrong)
        yield _port("weight push", args.vllm_group_port, needed=True)
        return
    parallel = args.vllm_tensor_parallel_size
    if count % parallel:
        fitting = max(n for n in range(1, parallel + 1) if count % n == 0)
        yield _problem(
            "vllm_tensor_parallel_size",
            f"{parallel} does not divide {count} processes",
            advice=[f"vllm_tensor_parallel_size: {fitting}"],
        )


def port(subject: Subject) -> Iterator[Finding]:
    """Where several processes will meet, unless they have met already."""
    if subject.processes > 1 and subject.args.world_size == 1:
        yield _port("processes", PORT, needed=False)


def _port(name: str, number: int, needed: bool) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            found = f"{number} ({name}) is taken"
            if needed:
                return _doubt("port", found, advice=["another vllm_group_port"])
            return Finding("port", f"{found}; accelerate takes another, torchrun --master_port")
    return Finding("port", f"{number} ({name}) is free")


def versions(subject: Subject) -> Iterator[Finding]:
    """Packages that were tested together."""
    differences = untested(installed_versions())
    if differences:
        yield Finding("versions", "; ".join(differences), "warning", ["pip install -U grace-rl"])
    else:
        yield Finding("versions", "as tested together")


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


LOOKS = (processes, half_precision, memory, engine, port, versions)
