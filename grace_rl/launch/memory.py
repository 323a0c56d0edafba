"""How much memory a process needs, from a model's config alone.

The states of the model follow ZeRO (arXiv 1910.02054, section 3): with P parameters on N processes,
w bytes a weight, g a gradient and K for the optimizer's states,

    DDP     w P       + g P       + K P
    ZeRO-1  w P       + g P       + K P / N
    ZeRO-2  w P       + g P / N   + K P / N
    ZeRO-3  w P / N   + g P / N   + K P / N

Gradients and optimizer count trained parameters only (LoRA). The rest (activations, caches, an
engine's share) is estimated for the longest texts and rationales that the recipe allows, so a run
usually needs less. All sizes are bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from peft import get_peft_model

from grace_rl.embed.hidden_states import decoder_stack

GIB = 2**30
BUCKET = 500_000_000  # elements: DeepSpeed's default reduce_bucket_size
LIVE = 1_000_000_000  # elements: DeepSpeed's default stage3_max_live_parameters
RUNTIME = {"gpu": int(1.2 * GIB), "cpu": int(0.7 * GIB)}  # CUDA context and kernels; Python, torch
OPTIMIZER_STATES = {"sgd": 0, "adafactor": 0, "lion_32bit": 1, "rmsprop": 1}  # others: Adam's two


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its memory.

    Attributes:
        parameters: All, tied ones once.
        trained: Those that are trained; all without LoRA.
        stack: Those of the decoder stack, which a separate critic copies.
        hidden, intermediate, layers, vocabulary: Widths and depth.
        query, key_value: Widths of all query heads, and of all key or value heads.
    """

    parameters: int
    trained: int
    stack: int
    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int


@dataclass(frozen=True)
class MemoryPlan:
    """How a model is trained, on one process.

    Attributes:
        processes: N.
        zero_stage: 0 to 3; 0 is DDP, or one process without DeepSpeed.
        deepspeed: Whether DeepSpeed trains, also at stage 0 or alone.
        offload: Weights and optimizer in the machine's memory (ZeRO-3).
        on_gpu: On a GPU, or on a CPU.
        weight_bytes: Of a weight as loaded: 4 or 2.
        bf16: Mixed precision in bfloat16.
        lora: An adapter is trained, in float32.
        optimizer_states: Numbers kept for each trained parameter: 2 for Adam.
        rows: Sequences of one forward with gradients.
        tokens: The longest of them: prompt and rationale.
        checkpointing: Activations are computed again instead of kept.
        logits: Positions whose logits over the whole vocabulary are held; RL's fused head has none.
        in_parts: `mini_batch_size` decides `rows`, whatever the batch.
        rollouts: Sequences that are written at once with transformers; 0 with vLLM or without
            rollouts.
        reference: A frozen copy is held (`beta` above 0 without LoRA).
        critic: A separate critic is trained.
        engine: Bytes that a colocated vLLM takes; 0 without.
        engine_sleeps: It gives them back while the policy is trained.
    """

    processes: int = 1
    zero_stage: int = 0
    deepspeed: bool = False
    offload: bool = False
    on_gpu: bool = True
    weight_bytes: int = 4
    bf16: bool = False
    lora: bool = False
    optimizer_states: int = 2
    rows: int = 1
    tokens: int = 512
    checkpointing: bool = False
    logits: int = 0
    in_parts: bool = False
    rollouts: int = 0
    reference: bool = False
    critic: bool = False
    engine: int = 0
    engine_sleeps: bool = False


def model_shape(model: Any, peft_config: Any = None) -> ModelShape:
    """Count a causal model's parameters.

    Args:
        model: On the meta device, or anywhere else.
        peft_config: PEFT's config of the adapter to train, which is put into the model; None trains
            all.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    stack = sum(p.numel() for p in decoder_stack(model).parameters())
    parameters = trained = sum(p.numel() for p in model.parameters())
    text = model.config.get_text_config()
    if peft_config is not None:
        adapted = get_peft_model(model, peft_config)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        parameters += trained
    heads = getattr(text, "num_attention_heads", None) or 1  # a state space model has none
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=parameters,
        trained=trained,
        stack=stack,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        query=heads * head,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head,
        vocabulary=text.vocab_size,
    )


def model_states(
    parameters: int, trained: int, w: int, g: int, k: int, stage: int, processes: int
) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on one process; see the module's formulas.

    >>> model_states(100, 100, 2, 2, 12, stage=2, processes=4)
    {'weights': 200, 'gradients': 50, 'optimizer': 300}
    """
    share = [processes if stage >= level else 1 for level in (1, 2, 3)]
    return {
        "weights": w * parameters // share[2],
        "gradients": g * trained // share[1],
        "optimizer": k * trained // share[0],
    }


def activation_bytes(shape: ModelShape, plan: MemoryPlan) -> int:
    """What a forward keeps for its backward.

    With checkpointing that is each layer's input, and one layer in full while it is computed again.
    """
    size = 2 if plan.bf16 else plan.weight_bytes
    layer = per_token(shape) * size
    kept = shape.layers * layer
    if plan.checkpointing:
        kept = shape.layers * shape.hidden * size + layer
    return plan.rows * plan.tokens * kept + plan.logits * shape.vocabulary * (size + 8)


def per_token(shape: ModelShape) -> int:
    """Numbers that a layer keeps for each token.

    Measured on Qwen3 with scaled-dot-product attention in bfloat16, exact to a percent. Llama's
    layers, which have no norms of queries and keys, keep a fifth less; so does float32.
    """
    return 8 * shape.hidden + 4 * shape.intermediate + 5 * (shape.query + shape.key_value)


def cache_bytes(shape: ModelShape, plan: MemoryPlan) -> int:
    """Keys and values of the rationales being written with transformers, and their last logits."""
    size = 2 if plan.bf16 else plan.weight_bytes
    a_token = 2 * shape.layers * shape.key_value * plan.weight_bytes
    return plan.rollouts * (plan.tokens * a_token + shape.vocabulary * (4 + size))


def estimate(shape: ModelShape, plan: MemoryPlan) -> dict[str, int]:
    """Bytes of every part on one process; parts that are not there are left out.

    What is never there together is counted once: activations or the rollouts' cache, whichever is
    larger, and a sleeping engine only where it needs more than the update.
    """
    trained, parameters = shape.trained, shape.parameters
    if plan.critic:
        trained, parameters = trained + shape.stack, parameters + shape.stack
    trained_bytes = 4 if plan.lora else plan.weight_bytes
    w, g, k = plan.weight_bytes, trained_bytes, plan.optimizer_states * trained_bytes
    if plan.deepspeed:
        w = g = 2 if plan.bf16 else 4
        k = 4 + 4 * plan.optimizer_states  # a float32 copy of the weights beside them
    parts = model_states(parameters, trained, w, g, k, plan.zero_stage, plan.processes)
    if plan.offload:
        parts["weights"] = parts["optimizer"] = 0
    if plan.deepspeed:
        bucket = BUCKET if plan.on_gpu else min(BUCKET, trained)
        parts["buckets"] = bucket * g
        if plan.zero_stage == 3:
            parts["gathered weights"] = min(LIVE, parameters) * w
    elif plan.processes > 1:
        parts["buckets"] = trained * g  # DDP's copy of the gradients
    if plan.reference:
        share = plan.processes if plan.zero_stage == 3 else 1
        parts["reference"] = plan.weight_bytes * shape.parameters // share
    activations, cache = activation_bytes(shape, plan), cache_bytes(shape, plan)
    engine = plan.engine
    if plan.engine_sleeps:  # it wakes when neither of these is there
        update = activations + parts["gradients"]
        engine = max(0, engine - update)
    parts["activations" if activations >= cache else "rollout cache"] = max(activations, cache)
    parts["vLLM"] = engine
    parts["runtime"] = RUNTIME["gpu" if plan.on_gpu else "cpu"]
    return {name: size for name, size in parts.items() if size}


def host_bytes(shape: ModelShape, plan: MemoryPlan) -> int:
    """What offloading puts into the machine's memory, over all processes."""
    if not plan.offload:
        return 0
    return (2 + 4 + 4 * plan.optimizer_states) * shape.parameters


def checkpoint_bytes(shape: ModelShape, plan: MemoryPlan) -> int:
    """One checkpoint on the disk: weights and optimizer states of what is trained."""
    trained = shape.trained + (shape.stack if plan.critic else 0)
    size = 4 if plan.lora else plan.weight_bytes
    states = 4 + 4 * plan.optimizer_states if plan.deepspeed else plan.optimizer_states * size
    return trained * (size + states)


def remedies(shape: ModelShape, plan: MemoryPlan, room: int) -> list[str]:
    """At most three changes that would save most, the best first; each says whether it is enough.

    Args:
        shape: The model's.
        plan: One that needs more than `room`.
        room: Bytes that a process has.
    """
    now = sum(estimate(shape, plan).values())
    tried: list[tuple[str, MemoryPlan, ModelShape]] = []

    def offer(words: str, **changes: Any) -> None:
        tried.append((words, dataclasses.replace(plan, **changes), shape))

    if not plan.checkpointing:
        offer("gradient_checkpointing: true", checkpointing=True)
    if plan.rows > 1:
        words = "half per_device_train_batch_size and twice gradient_accumulation_steps"
        if plan.in_parts:
            words = f"mini_batch_size: {plan.rows // 2}"
        offer(words, rows=plan.rows // 2, logits=plan.logits // 2)
    if plan.rollouts:
        offer("use_vllm: true with vllm_enable_sleep_mode: true", rollouts=0)
    if plan.engine and not plan.engine_sleeps:
        offer("vllm_enable_sleep_mode: true", engine_sleeps=True)
    if plan.engine:
        offer("vllm_gpu_memory_utilization a third lower", engine=plan.engine * 2 // 3)
    if plan.weight_bytes == 4 and plan.on_gpu and not plan.deepspeed:
        offer("dtype: bfloat16 and bf16: true", weight_bytes=2, bf16=True)
    if not plan.lora:
        small = dataclasses.replace(shape, trained=shape.parameters // 100)
        tried.append(
            ("use_peft: true (LoRA)", dataclasses.replace(plan, lora=True, reference=False), small)
        )
    if plan.processes > 1 and plan.zero_stage < 3:
        for stage in range(plan.zero_stage + 1, 4):
            offer(f"--launch zero{stage}", zero_stage=stage, deepspeed=True)
    elif plan.zero_stage == 3 and plan.on_gpu and not plan.offload:
        offer("--launch zero3-offload", offload=True)
    if plan.on_gpu and plan.processes < 8:
        offer("--launch zero3 --num_processes 8", processes=8, zero_stage=3, deepspeed=True)
    found = [
        (now - sum(estimate(its_shape, changed).values()), words)
        for words, changed, its_shape in tried
    ]
    found.sort(key=lambda item: -item[0])
    return [
        f"{words}: {saved / GIB:.1f} GiB less" + (", enough" if now - saved <= room else "")
        for saved, words in found
        if saved > 0.02 * now
    ][:3]
