"""From a recipe to how it uses memory: the numbers that `grace_rl.launch.memory` adds up."""

from __future__ import annotations

import math
import os

from grace_rl.launch.memory import GIB, OPTIMIZER_STATES, MemoryPlan, ModelShape
from grace_rl.launch.subject import Subject
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.zero_config import deepspeed_config


def memory_plan(subject: Subject, shape: ModelShape) -> MemoryPlan:
    """How a run uses memory on one process."""
    recipe, args, machine = subject.recipe, subject.args, subject.machine
    processes, given = subject.processes, recipe.training
    launch = subject.launch
    stage, offload = (launch.zero_stage, launch.offloads) if launch else (0, False)
    deepspeed = stage > 0
    if config := deepspeed_config(given.get("deepspeed")):
        zero = config.get("zero_optimization", {})
        stage, deepspeed = int(zero.get("stage", 0)), True
        offload = "cpu" in [
            zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")
        ]
    lora = bool(recipe.model.get("use_peft"))
    # One process that stands for all has the batch of all.
    batch = max(1, args.per_device_train_batch_size * args.world_size // processes)
    held = args.held(batch, subject.text_tokens, subject.rows)
    vllm = bool(getattr(args, "use_vllm", False))
    weight = {"bfloat16": 2, "float16": 2, "auto": 2}.get(str(recipe.model.get("dtype")), 4)
    engine = 0
    if vllm and args.vllm_mode == "colocate" and machine.gpus:
        engine = int(args.vllm_gpu_memory_utilization * machine.memory)
    elif vllm and args.vllm_mode == "colocate":
        engine = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * GIB)
        engine += weight * shape.parameters
    rollouts = 0
    if METHODS[recipe.method].rollouts and not vllm:
        rollouts = math.ceil(args.generation_batch_size / processes)
    optimizer = str(getattr(args.optim, "value", args.optim))
    return MemoryPlan(
        processes=processes,
        zero_stage=stage,
        deepspeed=deepspeed,
        offload=offload,
        on_gpu=bool(machine.gpus),
        weight_bytes=weight,
        bf16=bool(given.get("bf16", args.bf16)),
        lora=lora,
        optimizer_states=OPTIMIZER_STATES.get(optimizer, 2),
        rows=held.sequences,
        tokens=held.tokens,
        checkpointing=bool(args.gradient_checkpointing),
        logits=held.logits,
        in_parts=held.in_parts,
        rollouts=rollouts,
        reference=bool(getattr(args, "beta", 0.0)) and not lora,
        critic=getattr(args, "critic", "") == "separate",
        engine=engine,
        engine_sleeps=bool(vllm and args.vllm_enable_sleep_mode),
    )
