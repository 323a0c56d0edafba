"""From a recipe to how it uses memory: the numbers that `grace_rl.launch.memory` adds up."""

from __future__ import annotations

import math
import os
from typing import Any

from grace_rl.launch.memory import GIB, OPTIMIZER_STATES, MemoryPlan, ModelShape
from grace_rl.launch.subject import Subject
from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.zero_config import deepspeed_config

PROMPT = 64  # tokens of the instruction and the chat template around a text


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
    text = subject.text_tokens
    sequences, tokens, logits = _held(recipe.method, args, subject.rows, text, processes)
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
        rows=sequences,
        tokens=tokens,
        checkpointing=bool(args.gradient_checkpointing),
        logits=logits,
        in_parts=recipe.method in ("infonce", "gircse"),
        rollouts=rollouts,
        reference=bool(getattr(args, "beta", 0.0)) and not lora,
        critic=getattr(args, "critic", "") == "separate",
        engine=engine,
        engine_sleeps=bool(vllm and args.vllm_enable_sleep_mode),
    )


def _held(
    method: str, args: Any, rows: list[dict[str, Any]], text: int, processes: int
) -> tuple[int, int, int]:
    """Sequences with gradients on one process at once, their longest, and positions with logits."""
    # One process that stands for all has the batch of all.
    batch = max(1, args.per_device_train_batch_size * args.world_size // processes)
    if METHODS[method].rollouts:
        alone = args.reader.span == "bottleneck"
        again = args.max_completion_length if args.reader_loss and alone else 0
        return batch, text + PROMPT + args.max_completion_length + again, 0
    if method == "sft":  # a rationale is no longer than the longest text of the rows
        tokens = min(2 * text + PROMPT, args.max_length or math.inf)
        return batch, int(tokens), batch * int(tokens)
    if method == "reconstruction":  # both sides are read, both are rebuilt, and some are written
        alone = args.reader.span == "bottleneck"
        tokens = text + (1 if alone else PROMPT)
        written = math.ceil(batch * args.writing_share)
        return 4 * batch + written, tokens, (2 * batch + written) * (text + 1)
    # A query, its positive and hard negatives; or a part of all texts (gradient cache).
    given = [len(row.get("negative") or []) for row in rows]
    if method == "infonce":
        texts = batch * (2 + min(given))
        return min(texts, args.mini_batch_size or texts), text, 0
    texts = batch * (2 + min(max(given), args.hard_negatives))
    texts, steps = min(texts, args.mini_batch_size or texts), args.gircse_steps
    prompt = PROMPT if args.query_prompt or args.passage_prompt else 0
    return texts, min(text + prompt, args.max_text_tokens) + steps, texts * steps
