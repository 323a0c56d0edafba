"""What `grace-rl check` looks at before a run: will it start, will it fit, will it come to its end.

No model is loaded; its size is counted on the meta device. What is wrong with the recipe itself is
said by the recipe and by the method's plan, as `grace-rl train` would.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from peft.utils.error import NoMatchingPeftModuleError

from grace_rl.embed.reader import ReaderConfig
from grace_rl.errors import UserError
from grace_rl.launch.alone import arguments_alone
from grace_rl.launch.lines import Launch
from grace_rl.launch.memory import (
    GIB,
    OPTIMIZER_STATES,
    MemoryPlan,
    ModelShape,
    checkpoint_bytes,
    estimate,
    host_bytes,
    model_shape,
    remedies,
)
from grace_rl.recipe.methods import METHODS, named
from grace_rl.recipe.zero_config import deepspeed_config
from grace_rl.run.versions import installed_versions, untested

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

PORT = 29500  # where the processes of one machine meet, by default
PROMPT = 64  # tokens of the instruction and the chat template around a text
ROLLOUTS = (
    "A short description of it.",
    "What it says, in other words, with the parts that matter first and all the others after.",
    "again again again again",
    "",
)


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        name: What was looked at.
        found: What was found.
        level: `ok`; `warning`, the run would go on; `problem`, it would fail.
        advice: What to do, the most useful first.
    """

    name: str
    found: str
    level: Literal["ok", "warning", "problem"] = "ok"
    advice: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Attributes:
        gpus: Names.
        memory: Bytes for each process: of the smallest GPU, or its share of the free RAM.
        cores: CPU cores.
        ram: Free bytes of the machine.
    """

    gpus: tuple[str, ...]
    memory: int
    cores: int
    ram: int


def this_machine(processes: int, use_cpu: bool) -> Machine:
    """Look at the machine.

    Args:
        processes: That share its RAM.
        use_cpu: Leave GPUs out.
    """
    ram = min(psutil.virtual_memory().available, _container_limit())
    count = 0 if use_cpu else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    memory = min((int(gpu.total_memory) for gpu in gpus), default=ram // max(1, processes))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Machine(tuple(gpu.name for gpu in gpus), memory, cores or 1, ram)


def preflight(
    recipe: Recipe, rows: list[dict[str, Any]], launch: Launch | None, processes: int
) -> list[Finding]:
    """Everything that can be looked at without a model.

    Args:
        recipe: Loaded for so many processes.
        rows: Of its data.
        launch: How the run is to be started; None: without accelerate's file.
        processes: At least 1.

    Raises:
        UserError: The method's plan refuses rows, rewards or batches.
    """
    args, findings = _arguments(recipe, processes)
    named(METHODS[recipe.method].plan)(recipe, args, rows)
    machine = this_machine(processes, bool(args.use_cpu))
    findings.insert(0, _machine(machine, processes, launch))
    findings += _memory(recipe, args, rows, launch, processes, machine)
    findings += _engine(args, processes, recipe)
    if processes > 1:
        findings.append(_port("processes", PORT, needed=False))
    findings.append(_versions())
    if recipe.rewards:
        findings.append(_rewards(recipe, args, rows))
    return findings


def memory_plan(
    recipe: Recipe,
    args: Any,
    rows: list[dict[str, Any]],
    text: int,
    launch: Launch | None,
    processes: int,
    machine: Machine,
) -> MemoryPlan:
    """How a recipe uses memory on one process.

    Args:
        recipe: The recipe.
        args: From `arguments_alone`.
        text: Tokens of the longest text.
        rows, launch, processes, machine: See `preflight`.
    """
    given, method = recipe.training, METHODS[recipe.method]
    stage, offload = (launch.zero_stage, launch.offloads) if launch else (0, False)
    deepspeed = stage > 0
    if config := deepspeed_config(given.get("deepspeed")):
        zero = config.get("zero_optimization", {})
        stage, deepspeed = int(zero.get("stage", 0)), True
        offload = "cpu" in [
            zero.get(f"offload_{part}", {}).get("device") for part in ("optimizer", "param")
        ]
    lora = bool(recipe.model.get("use_peft"))
    sequences, tokens, logits = _held(recipe.method, args, rows, text, processes)
    vllm = bool(getattr(args, "use_vllm", False))
    weight = {"bfloat16": 2, "float16": 2, "auto": 2}.get(str(recipe.model.get("dtype")), 4)
    engine = 0
    if vllm and args.vllm_mode == "colocate" and machine.gpus:
        engine = int(args.vllm_gpu_memory_utilization * machine.memory)
    elif vllm and args.vllm_mode == "colocate":
        engine = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * GIB)
    rollouts = 0
    if method.rollouts and not vllm:
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
    batch = max(1, args.per_device_train_batch_size // processes)
    if METHODS[method].rollouts:
        alone = ReaderConfig(**args.reader).span == "bottleneck"
        again = args.max_completion_length if args.reader_loss and alone else 0
        return batch, text + PROMPT + args.max_completion_length + again, 0
    if method == "sft":  # a rationale is no longer than the longest text of the rows
        tokens = min(2 * text + PROMPT, args.max_length or math.inf)
        return batch, int(tokens), batch * int(tokens)
    if method == "reconstruction":  # both sides are read, both are rebuilt, and some are written
        alone = ReaderConfig(**args.reader).span == "bottleneck"
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


# --- one look each ------------------------------------------------------------------------------


def _arguments(recipe: Recipe, processes: int) -> tuple[Any, list[Finding]]:
    try:
        return arguments_alone(recipe, processes), []
    except UserError as error:
        reason = " ".join(error.problems).rpartition("says: ")[2]
        try:  # as on the machine that the recipe is meant for
            args = arguments_alone(recipe, processes, bf16=False, fp16=False, use_cpu=True)
        except UserError:
            raise error from None
        advice = ["on this machine: --bf16 false --use_cpu true --dtype float32"]
        return args, [Finding("precision", reason, "problem", advice)]


def _machine(machine: Machine, processes: int, launch: Launch | None) -> Finding:
    if not machine.gpus:
        threads = int(os.environ.get("OMP_NUM_THREADS") or machine.cores)
        found = f"no GPU; {machine.cores} cores, {machine.ram / GIB:.1f} GiB free"
        if processes > 1 and threads * processes > machine.cores:
            found += f"; {processes} processes x {threads} threads"
            advice = [f"OMP_NUM_THREADS={max(1, machine.cores // processes)}"]
            return Finding("machine", found, "warning", advice)
        return Finding("machine", found)
    found = f"{len(machine.gpus)} x {machine.gpus[0]}, {machine.memory / GIB:.1f} GiB each"
    here = processes // int((launch.config.get("num_machines") if launch else None) or 1)
    if here > len(machine.gpus):
        advice = [f"--num_processes {len(machine.gpus)}"]
        return Finding("machine", f"{found}, for {here} processes", "problem", advice)
    return Finding("machine", found)


def _memory(
    recipe: Recipe,
    args: Any,
    rows: list[dict[str, Any]],
    launch: Launch | None,
    processes: int,
    machine: Machine,
) -> list[Finding]:
    try:
        shape, text = _shape(recipe), _longest_text(recipe, args, rows)
    except NoMatchingPeftModuleError as error:
        names = "lora_target_modules: names of the model's own layers, or all-linear"
        return [Finding("adapter", str(error).partition(". ")[0], "problem", [names])]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return [Finding("memory", f"no config of the model: {reason}", "problem")]
    plan = memory_plan(recipe, args, rows, text, launch, processes, machine)
    if plan.engine and not machine.gpus:
        own = plan.weight_bytes * shape.parameters
        plan = dataclasses.replace(plan, engine=plan.engine + own)
    parts = estimate(shape, plan)
    need = sum(parts.values())
    trained = "" if shape.trained == shape.parameters else f", {_count(shape.trained)} trained"
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    findings = [Finding("model", f"{_count(shape.parameters)} parameters{trained}")]
    where = "each process" if processes > 1 else "the process"
    found = (
        f"{where} needs {need / GIB:.1f} of {machine.memory / GIB:.1f} GiB, at {plan.rows} rows of "
        f"{plan.tokens} tokens: {listed}"
    )
    level: Literal["ok", "warning", "problem"] = "ok"
    if need > machine.memory:
        level = "problem"
    elif need > 0.9 * machine.memory:
        level = "warning"
    advice: list[str] = []
    if level != "ok":
        advice = remedies(shape, plan, int(0.9 * machine.memory))
        advice = advice or ["a smaller model, or more memory"]
    findings.append(Finding("memory", found, level, advice))
    offloaded = host_bytes(shape, plan)
    if offloaded > machine.ram:
        found = f"offloading needs {offloaded / GIB:.1f} GiB, {machine.ram / GIB:.1f} are free"
        findings.append(Finding("RAM", found, "problem", ["more machines, or LoRA"]))
    if plan.engine and machine.gpus:
        findings.append(_share(shape, plan, args))
    findings.append(_disk(recipe, args, shape, plan))
    return findings


def _share(shape: ModelShape, plan: MemoryPlan, args: Any) -> Finding:
    """Does vLLM's share hold the weights and the keys and values of one sequence at least?"""
    parallel = args.vllm_tensor_parallel_size
    weights = 2 * shape.parameters // parallel
    cache = 2 * shape.layers * shape.key_value * 2 // parallel
    sequences = (plan.engine - weights) // (cache * plan.tokens)
    found = f"vLLM's share holds {max(0, sequences)} sequences of {plan.tokens} tokens at once"
    if sequences < 1:
        return Finding("vLLM", found, "problem", ["a higher vllm_gpu_memory_utilization"])
    if sequences < 8:
        return Finding("vLLM", found, "warning", ["a higher vllm_gpu_memory_utilization"])
    return Finding("vLLM", found)


def _disk(recipe: Recipe, args: Any, shape: ModelShape, plan: MemoryPlan) -> Finding:
    place = Path(recipe.training["output_dir"]).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        return Finding("disk", f"{place} is a file", "problem", ["another output_dir"])
    free = shutil.disk_usage(place).free
    limit = args.save_total_limit
    saves = max(1, int(args.max_steps // args.save_steps)) if args.save_steps >= 1 else 1
    kept = min(limit + 1, saves + 1) if limit else saves
    if args.save_strategy == "no":
        kept = 0
    need = kept * checkpoint_bytes(shape, plan) + plan.weight_bytes * shape.parameters
    found = f"{need / GIB:.2f} GiB for {kept} checkpoints and the model, {free / GIB:.1f} free"
    if need > free:
        return Finding("disk", found, "problem", ["save_total_limit: 1, or another output_dir"])
    return Finding("disk", found)


def _engine(args: Any, processes: int, recipe: Recipe) -> list[Finding]:
    if not getattr(args, "use_vllm", False):
        return []
    if args.vllm_mode == "server":
        from grace_rl.rollout.server import server_problems, server_url

        url, model = server_url(args), _model_place(recipe)
        tokens = args.max_text_tokens + args.max_completion_length
        wrong = server_problems(url, model, tokens)
        port = _port("weight push", args.vllm_group_port, needed=True)
        if wrong:
            return [Finding("vLLM server", problem, "problem") for problem in wrong] + [port]
        return [Finding("vLLM server", f"{url} serves {model}"), port]
    parallel = args.vllm_tensor_parallel_size
    if processes % parallel:
        found = f"vllm_tensor_parallel_size {parallel} does not divide {processes} processes"
        fitting = max(n for n in range(1, parallel + 1) if processes % n == 0)
        return [Finding("vLLM", found, "problem", [f"vllm_tensor_parallel_size: {fitting}"])]
    return []


def _port(name: str, port: int, needed: bool) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            found = f"{port} ({name}) is taken"
            if needed:
                return Finding("port", found, "problem", ["another vllm_group_port"])
            return Finding("port", f"{found}; accelerate takes another, torchrun --master_port")
    return Finding("port", f"{port} ({name}) is free")


def _versions() -> Finding:
    differences = untested(installed_versions())
    if not differences:
        return Finding("versions", "as tested together")
    return Finding("versions", "; ".join(differences), "warning", ["pip install -U grace-rl"])


def _rewards(recipe: Recipe, args: Any, rows: list[dict[str, Any]]) -> Finding:
    """Every reward on four rollouts of two rows, as training calls it."""
    from grace_rl.reward.loading import load_rewards
    from grace_rl.reward.runtime import RewardRuntime

    loaded = load_rewards(recipe.rewards, recipe.path.parent)
    batch = _four_rollouts(args, rows, steps=any(reward.steps for reward in loaded))
    said, worst, advice = [], "ok", []
    for reward in loaded:
        if hasattr(reward.function, "start_from"):
            said.append(f"{reward.label} not run (it starts from the policy's weights)")
            continue
        began = time.perf_counter()
        try:
            values = RewardRuntime([reward]).score(batch).values[:, 0]
        except UserError as error:
            return Finding("rewards", str(error), "problem")
        seconds = time.perf_counter() - began
        known = values[~values.isnan()]
        if not len(known):
            said.append(f"{reward.label} scored none of them")
            worst, advice = "warning", [f"look at {reward.label}: grace-rl rewards check"]
            continue
        few = "" if len(known) == len(values) else f" ({len(values) - len(known)} unscored)"
        low, high = float(known.min()) + 0.0, float(known.max()) + 0.0  # not -0
        said.append(f"{reward.label} {low:.3g} to {high:.3g}{few}, {seconds:.2g} s")
    return Finding("rewards", f"on {len(batch)} rollouts: " + "; ".join(said), worst, advice)  # type: ignore[arg-type]


def _four_rollouts(args: Any, rows: list[dict[str, Any]], steps: bool) -> Any:
    from grace_rl.data.bundles import Bundles, parse_roles
    from grace_rl.reward.example import example_batch, with_prefixes

    bundles = Bundles(rows[:2], parse_roles(args.roles, args.num_generations))
    generator = torch.Generator().manual_seed(0)
    role = bundles.prompts[0].role
    texts: dict[tuple[int, str], str] = {}
    everything = [*bundles.prompts, *(text for row in bundles.anchors for text, _ in row)]
    for text in everything:
        texts.setdefault((text.example, text.role), text.text)
    made: list[dict[str, Any]] = [{} for _ in rows[:2]]
    for example, its_role in texts:
        scene = torch.randn(1, 8, generator=generator)
        count = 2 if its_role == role else 1
        noise = torch.randn(count, 8, generator=generator)
        made[example][its_role] = (scene + noise).tolist()
    count = sum(len(row[role]) for row in made)
    batch = example_batch(made, [role], rationales=ROLLOUTS[:count], texts=texts)
    examples = batch.example.tolist()
    columns = {key: [rows[i].get(key) for i in examples] for key in rows[0]}
    batch = dataclasses.replace(batch, columns=columns)
    return with_prefixes(batch, segments=2) if steps else batch


# --- what they ask -------------------------------------------------------------------------------


def _shape(recipe: Recipe) -> ModelShape:
    from transformers import AutoConfig
    from trl import get_peft_config

    config = AutoConfig.from_pretrained(_model_place(recipe))
    return model_shape(config, get_peft_config(recipe.model_config()))


def _model_place(recipe: Recipe) -> str:
    from grace_rl.data import scenes
    from grace_rl.rollout.policy import SCENES_UNTRAINED, resolve_model

    name = str(recipe.model["model_name_or_path"])
    return str(scenes.COLD_START) if name == SCENES_UNTRAINED else resolve_model(name, Path())


def _longest_text(recipe: Recipe, args: Any, rows: list[dict[str, Any]]) -> int:
    """Tokens of the longest text of the rows, as far as it is read."""
    from transformers import AutoTokenizer

    most = int(getattr(args, "max_text_tokens", None) or getattr(args, "max_length", None) or 512)
    texts: list[str] = []
    for row in rows:
        for value in row.values():
            texts += [value] if isinstance(value, str) else value if isinstance(value, list) else []
    longest = sorted((text for text in texts if isinstance(text, str)), key=len)[-32:]
    tokenizer = AutoTokenizer.from_pretrained(_model_place(recipe))
    return min(most, max((len(ids) for ids in tokenizer(longest)["input_ids"]), default=most))


def _container_limit() -> int:
    """What is left of a container's memory, where it has a limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        read: Callable[[str], str] = lambda path: Path(path).read_text().strip()  # noqa: E731
        try:
            return max(0, int(read(limit)) - int(read(used)))
        except (OSError, ValueError):
            continue
    return 2**62


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)
