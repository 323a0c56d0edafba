"""Step time and memory on one and two processes of a CPU, beside what the formulas say.

    python benchmarks/scaling.py steps
    python benchmarks/scaling.py memory

`steps` trains a Qwen3 of about 10M random parameters with GRPO on rationales that end by
themselves: alone, and on two processes with DDP, ZeRO-2 and ZeRO-3, at the same batch over all
processes. Each process is pinned to a core of its own and has one thread; the runs take turns,
--repeats times. Prints the median time of a step, the share of each phase, and the ratio to one
process.

`memory` trains a Qwen3 of about --millions random parameters for three steps with every strategy
and prints what each process holds after a backward (resident memory, above what it had before the
model was made), beside the formula of `grace_rl.launch.memory`. The activations of 8 tokens are
nothing here, and DeepSpeed's buckets are made small, so that what is left are weights, gradients
and optimizer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
STRATEGIES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}
PHASES = ("rollout", "embed", "reward", "train", "sync")
RECIPE = """
method: grpo
dtype: float32
dataset_name: scenes
dataset_rows: 512
dataset_options: {form: triplet}
instruction: null
max_text_tokens: 96
roles: {query: {samples: 8}, positive: {samples: 8}, negative: {samples: 1, train: false}}
rewards: [{name: contrastive}, {name: length}]
num_generations: 8
max_completion_length: 48
learning_rate: 1.0e-5
use_cpu: true
bf16: false
gradient_checkpointing: false
logging_steps: 1
save_strategy: "no"
print_rollouts_steps: 0
report_to: none
seed: 0
"""


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")
    if sys.argv[1:2] == ["pinned"]:
        run_pinned(sys.argv[2:])
    if sys.argv[1:2] == ["hold"]:
        hold(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["steps", "memory"])
    parser.add_argument("--batch", type=int, default=64, help="rollouts of a step, all processes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--millions", type=int, default=60, help="parameters of `memory`")
    parser.add_argument("--processes", type=int, default=2, help="of `memory`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.what == "steps":
        compare_steps(options)
    else:
        compare_memory(options)


# --- step time ----------------------------------------------------------------------------------


def compare_steps(options: argparse.Namespace) -> None:
    from random_policy import save_random_policy

    runs: dict[str, list[dict[str, float]]] = {"alone": [], "ddp": [], "zero2": [], "zero3": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = save_random_policy(folder / "model", ends=1 / 24)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        for repeat in range(options.repeats):
            for strategy in runs:
                run = folder / f"{strategy}-{repeat}"
                train(options, folder, strategy, run)
                runs[strategy].append(times(run))
                print(f"# {strategy} {repeat}: {runs[strategy][-1]['step']:.2f} s", flush=True)
    table = {name: summary(measured) for name, measured in runs.items()}
    print(f"{size / 1e6:.1f}M parameters, {options.batch} rollouts a step, one thread a process")
    print(
        f"{'':>8} {'s/step':>8} {'spread':>13}", *[f"{p:>8}" for p in (*PHASES, "other")], "speed"
    )
    for name, row in table.items():
        shares = [f"{row[phase]:>8.0%}" for phase in (*PHASES, "other")]
        ratio = table["alone"]["step"] / row["step"]
        spread = f"{row['fastest']:.2f} to {row['slowest']:.2f}"
        print(f"{name:>8} {row['step']:>8.2f} {spread:>13}", *shares, f"{ratio:.2f}")
    load = os.getloadavg()[1] / (os.cpu_count() or 1)
    print(f"load of the machine: {load:.1f} a core; above 1 something else ran beside it")
    found = {"parameters": size, "batch": options.batch, "load_per_core": load, "runs": table}
    save(options, "scaling-steps", found)


def train(options: argparse.Namespace, folder: Path, strategy: str, run: Path) -> None:
    processes = 1 if strategy == "alone" else 2
    words = ["train", str(folder / "recipe.yaml"), "--model_name_or_path", str(folder / "model")]
    words += ["--output_dir", str(run), "--max_steps", str(options.steps)]
    words += ["--per_device_train_batch_size", str(options.batch // processes)]
    if strategy.startswith("zero"):
        stage = STRATEGIES[strategy]
        words += ["--deepspeed", json.dumps(deepspeed_config(stage))]
    launch(processes, "pinned", words)


def run_pinned(words: list[str]) -> None:
    """In each process: a core of its own, then the command line."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    from grace_rl.cli import main as grace_rl

    sys.exit(grace_rl(words))


def times(run: Path) -> dict[str, float]:
    """Median seconds of a step and of its phases; the first two steps warm up."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [b["seconds"] - a["seconds"] for a, b in zip(lines[1:], lines[2:], strict=False)]
    found = {p: statistics.median(line.get(f"time/{p}", 0.0) for line in lines[2:]) for p in PHASES}
    return {"step": statistics.median(steps), **found}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    step = statistics.median(run["step"] for run in runs)
    shares = {p: statistics.median(run[p] / run["step"] for run in runs) for p in PHASES}
    return {
        "step": step,
        "fastest": min(run["step"] for run in runs),
        "slowest": max(run["step"] for run in runs),
        **shares,
        "other": max(0.0, 1 - sum(shares.values())),
    }


# --- memory -------------------------------------------------------------------------------------


def compare_memory(options: argparse.Namespace) -> None:
    from grace_rl.launch.memory import model_states

    rows: dict[str, dict[str, float]] = {}
    for name, stage in STRATEGIES.items():
        measured = json.loads(launch(options.processes, "hold", [name, str(options.millions)]))
        size = measured["parameters"]
        k = 8 if name == "ddp" else 12
        states = model_states(size, size, 4, 4, k, stage, options.processes)
        buckets = 4 * size if name == "ddp" else 0
        expected = (sum(states.values()) + buckets) / MIB
        rows[name] = {"expected": expected, **{n: measured[n] for n in ("held", "peak")}}
        print(f"# {name}: {measured['held']:.0f} MiB", flush=True)
    print(f"{size / 1e6:.1f}M parameters in float32, {options.processes} processes, MiB a process")
    print(
        f"{'':>6} {'formula':>8} {'held':>8} {'ratio':>6} {'to ddp':>7} {'formula':>8} {'peak':>7}"
    )
    for name, row in rows.items():
        fall = [row[part] / rows["ddp"][part] for part in ("held", "expected")]
        print(
            f"{name:>6} {row['expected']:>8.0f} {row['held']:>8.0f} "
            f"{row['held'] / row['expected']:>6.2f} {fall[0]:>7.2f} {fall[1]:>8.2f} "
            f"{row['peak']:>7.0f}"
        )
    save(
        options,
        f"scaling-memory-{options.processes}",
        {"parameters": size, "processes": options.processes, "mib": rows},
    )


def hold(strategy: str, millions: int) -> None:
    """In each process: train three steps and measure after the last backward."""
    import psutil
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from grace_rl.run.processes import part_processes

    torch.manual_seed(0)
    stage = STRATEGIES[strategy]
    plugin = None
    if stage:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage, batch=1))
    accelerator = Accelerator(cpu=not stage, deepspeed_plugin=plugin)
    me = psutil.Process()

    def resident() -> float:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return me.memory_info().rss / MIB

    warm = torch.nn.Linear(64, 64)
    warm(torch.ones(1, 64)).sum().backward()
    accelerator.wait_for_everyone()
    before, peak = resident(), 0.0
    width = 768
    layer = 4 * width * width + 3 * width * 4 * width
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=max(1, round(millions * 1e6 / layer)),
            num_attention_heads=12,
            num_key_value_heads=12,
            head_dim=64,
        )
    )
    size = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.arange(8)[None] + 1
    for step in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        if stage and step == 2:
            model.backward(loss)  # accelerate's would go on with the optimizer
        else:
            accelerator.backward(loss)
        del loss
        peak = max(peak, me.memory_info().rss / MIB - before)
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
            peak = max(peak, me.memory_info().rss / MIB - before)
    held = torch.tensor([resident() - before])
    held = accelerator.gather(held)
    if accelerator.is_main_process:
        mean = float(held.mean())
        print(json.dumps({"parameters": size, "held": mean, "peak": peak}), flush=True)
    accelerator.wait_for_everyone()
    part_processes()


# --- both ---------------------------------------------------------------------------------------


def deepspeed_config(stage: int, batch: int | str = "auto") -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1_000_000}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1 if batch != "auto" else "auto",
    }


def launch(processes: int, what: str, words: list[str]) -> str:
    """Start this file again under torchrun; returns the last line that it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*torchrun, "--standalone", __file__, what, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nfailed: {' '.join(command)}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return lines[-1] if lines else ""


def save(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    (options.output / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
