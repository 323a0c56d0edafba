"""Soft-token refinement (GIRCSE): what a step costs, and whether the steps pay.

    python benchmarks/gircse.py cost
    python benchmarks/gircse.py ablation --seeds 0 1 2 --jobs 2

`cost`: seconds and peak memory of a training step with kept keys and values, over the form that
computes the prefix again in each of K + 1 passes; and seconds to encode with 0 to 20 steps.

`ablation`: one model trained on NLI triplets in each of the paper's four ways, scored on STS-B:
    plain        InfoNCE on the last token's state, no soft tokens
    generation   InfoNCE on the embedding after the last step
    step-wise    InfoNCE after every step
    regularised  and no step may be worse than the one before
Results are kept one file a run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SHARED = Path("../shared")
RESULTS = Path("benchmarks/results")
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"gircse_steps": 0},
    "generation": {"icr": {"steps": "last", "weight": 0.0}},
    "step-wise": {"icr": {"weight": 0.0}},
    "regularised": {"icr": {"weight": 1.0}},
}
CURVE = (1, 3, 5, 10, 20)


# -- what it costs ---------------------------------


def load(path: str) -> tuple[Any, Any]:
    from grace_rl.rollout.policy import load_policy

    return load_policy(path, dtype="float32")


def training_step(
    model: Any, rows: int, tokens: int, steps: int, cache: bool
) -> Callable[[], None]:
    """Forward, objective, backward and update on `rows` triplets of random texts."""
    from grace_rl.embed.soft_tokens import soft_tokens
    from grace_rl.train.gircse_terms import ICRConfig, icr_loss, step_losses

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (3 * rows, tokens), generator=generator)
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()

    def step() -> None:
        vectors = soft_tokens(model, ids, mask, steps, cache=cache).vectors()
        positives = torch.arange(rows, device=ids.device)
        losses = step_losses(vectors[:rows], vectors[rows:], positives)
        icr_loss(losses, ICRConfig())[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(options: argparse.Namespace) -> int:
    """Print the MiB that the second training step adds to weights, gradients and Adam's states."""
    torch.set_num_threads(options.threads)
    model = load(options.model)[0].to(options.device)
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    step = training_step(model, options.rows, options.tokens, options.steps, options.form == "kept")
    step()
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        after = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
        before = resident("VmRSS")
        step()
        after = resident("VmHWM")
    print((after - before) / 2**20)
    return 0


def resident(name: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()  # others share the machine


def cost(options: argparse.Namespace) -> int:
    console = Console(width=110)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    model.to(options.device)
    forms = {"kept": True, "again": False}
    steps = {
        form: training_step(model, options.rows, options.tokens, options.steps, cache)
        for form, cache in forms.items()
    }
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(options.repeats + 1):
        for form in forms if number % 2 else list(forms)[::-1]:
            start = now(options.device)
            steps[form]()
            if number:
                times[form].append(now(options.device) - start)
    seconds = {form: statistics.median(found) for form, found in times.items()}
    ratios = [again / kept for kept, again in zip(times["kept"], times["again"], strict=True)]
    memory = {}
    for form in forms:
        for checkpointing in (False, True):
            command = [sys.executable, __file__, "memory", "--form", form, *shared_options(options)]
            command += ["--checkpointing"] if checkpointing else []
            # What is freed goes back to the system, so that the second step shows what it needs.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            lines = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            memory[form, checkpointing] = float(lines.split()[-1])

    shape = f"{options.rows} triplets of {options.tokens} tokens, K = {options.steps}"
    table = Table(title=f"One training step, {shape}, {options.device}", title_justify="left")
    for name in ("form", "seconds", "peak MiB", "peak MiB, gradient checkpointing"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for form, name in (("kept", "keys and values kept"), ("again", "prefix again, K + 1 passes")):
        table.add_row(
            name,
            f"{seconds[form]:.3f}",
            *(f"{memory[form, checkpointing]:.0f}" for checkpointing in (False, True)),
        )
    console.print(table)
    ratio = statistics.median(ratios)
    console.print(
        f"again / kept: {ratio:.2f} times the seconds ({min(ratios):.2f} to {max(ratios):.2f} over "
        f"{len(ratios)} pairs), "
        f"{memory['again', False] / memory['kept', False]:.2f} times the memory"
    )
    encoding = encoding_cost(model, tokenizer, options)
    table = Table(title="Encoding, seconds per 100 texts", title_justify="left")
    table.add_column("steps", justify="right")
    for tokens in encoding:
        table.add_column(f"{tokens} tokens", justify="right")
        table.add_column("over 0 steps", justify="right")
    for k in (0, *CURVE):
        cells = [f"{found[k]:.3f} {found[k] / found[0]:.2f}".split() for found in encoding.values()]
        table.add_row(str(k), *(cell for pair in cells for cell in pair))
    console.print(table)
    result = {
        "model": Path(options.model).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": shape,
        "device": options.device,
        "threads": options.threads,
        "seconds": seconds,
        "ratio": {"median": ratio, "lowest": min(ratios), "highest": max(ratios)},
        "peak_mib": {f"{form}{'+checkpointing' * c}": value for (form, c), value in memory.items()},
        "encoding_seconds_per_100": encoding,
    }
    write(RESULTS / "gircse-cost.json", result)
    return 0 if ratio >= 3 else 1


def encoding_cost(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[int, Any]:
    """{tokens of a text: {steps: seconds per 100 texts}}, the median of three."""
    from grace_rl.embed.soft_tokens import soft_tokens

    model.eval()
    found: dict[int, Any] = {}
    for tokens in (16, options.tokens, 4 * options.tokens):
        ids = torch.randint(10, model.config.vocab_size, (16, tokens)).to(options.device)
        found[tokens] = {}
        for k in (0, *CURVE):
            times = []
            for _ in range(4):
                start = now(options.device)
                with torch.inference_mode():
                    soft_tokens(model, ids, torch.ones_like(ids), k)
                times.append(now(options.device) - start)
            found[tokens][k] = statistics.median(times[1:]) * 100 / len(ids)
    return found


def shared_options(options: argparse.Namespace) -> list[str]:
    names = ("model", "rows", "tokens", "steps", "threads", "device")
    return [part for name in names for part in (f"--{name}", str(getattr(options, name)))]


# -- whether it pays ---------------------------------


def train_one(options: argparse.Namespace) -> int:
    """Train one row of the ablation with one seed and score it."""
    from grace_rl.data.rows import read_rows
    from grace_rl.recipe import load_recipe
    from grace_rl.train.gircse import GIRCSETrainer

    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, ["--seed", str(options.seed), *options.override])
    recipe.training.update(
        {key: value for key, value in ROWS[options.row].items() if key != "icr"}
        | {"icr": recipe.training["icr"].changed(**ROWS[options.row].get("icr", {}))}
        | {"save_strategy": "no", "disable_tqdm": True, "word_examples": 0}
    )
    recipe.training["output_dir"] = str(options.output / "trainer")
    args = recipe.training_arguments()
    torch.manual_seed(options.seed)
    model, tokenizer = load(recipe.model["model_name_or_path"])
    trainer = GIRCSETrainer(model, args, read_rows(recipe.data), tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "row": options.row,
        "seed": options.seed,
        "settings": {
            key: getattr(args, key)
            for key in ("gircse_steps", "icr", "max_steps", "learning_rate", "max_text_tokens")
        }
        | {"batch": args.per_device_train_batch_size},
        "seconds": seconds,
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "losses": held_out_losses(trainer, options),
    }
    for split in options.splits:
        result[split] = stsb(trainer.encoder(), split)
    result["words"] = [
        [words[0] for words in step]
        for step in trainer.encoder().step_words(["A man is playing a guitar."], steps=5)[0].words
    ]
    write(options.output / f"{options.row}-{options.seed}.json", result)
    print(options.row, options.seed, result)
    return 0


def stsb(encoder: Any, split: str) -> dict[str, float]:
    """{steps: Spearman on STS-B}, one run of 20 steps for all but 0."""
    from grace_rl.embed.similarity import rank_correlation

    with gzip.open(SHARED / f"data/eval/stsb-{split}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row[name] for name in ("sentence1", "sentence2") for row in rows]
    gold = [row["score"] for row in rows]
    count = len(rows)

    def spearman(vectors: torch.Tensor) -> float:
        return rank_correlation((vectors[:count] * vectors[count:]).sum(-1).tolist(), gold)

    every = encoder.every_step(texts, max(CURVE))
    scores = {str(k): spearman(every[:, k - 1]) for k in CURVE}
    if encoder.settings.gircse_steps == 0:
        scores["0"] = spearman(encoder.every_step(texts, 0)[:, 0])
    return scores


def held_out_losses(trainer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """InfoNCE of validation rows after each of 5 steps, and how often a step is no worse."""
    from grace_rl.data.rows import read_rows
    from grace_rl.recipe.rows import DataConfig
    from grace_rl.train.gircse_terms import step_losses

    path = str(SHARED / "data/train/nli-triplets.validation.jsonl.gz")
    rows = read_rows(DataConfig(dataset_name=path, rows=256))
    encoder = trainer.encoder()
    sides = [
        encoder.every_step(texts, 5)
        for texts in (
            [row["query"] for row in rows],
            [row["positive"] for row in rows],
            [row["negative"][0] for row in rows],
        )
    ]
    candidates = torch.cat(sides[1:])
    losses = step_losses(
        sides[0], candidates, torch.arange(len(rows)), None, trainer.icr.temperature
    )
    return {
        "steps": losses.mean(0).tolist(),
        "not_worse": (losses[:, 1:] <= losses[:, :-1]).float().mean(0).tolist(),
    }


def ablation(options: argparse.Namespace) -> int:
    console = Console(width=110)
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [
        (row, seed)
        for seed in options.seeds
        for row in options.only
        if not (folder / f"{row}-{seed}.json").exists()
    ]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            row, seed = waiting.pop(0)
            command = [sys.executable, __file__, "one", "--row", row, "--seed", str(seed)]
            command += ["--output", str(folder), "--recipe", options.recipe]
            command += ["--splits", *options.splits, f"--override={' '.join(options.override)}"]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        time.sleep(1)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode:
                return process.returncode
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    for split in options.splits:
        show(console, results, split)
    return 0


def show(console: Console, results: Sequence[dict[str, Any]], split: str) -> None:
    table = Table(title=f"STS-B {split}, Spearman, mean (lowest to highest)", title_justify="left")
    table.add_column("row")
    for k in (0, *CURVE):
        table.add_column(f"K = {k}")
    table.add_column("not worse, steps 2 to 5")
    for row in ROWS:
        runs = [result for result in results if result["row"] == row and split in result]
        if runs:
            cells = [
                spread([run[split][str(k)] for run in runs if str(k) in run[split]])
                for k in (0, *CURVE)
            ]
            better = spread([statistics.mean(run["losses"]["not_worse"]) for run in runs])
            table.add_row(f"{row} ({len(runs)})", *cells, better)
    console.print(table)


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    for name, run in (("cost", cost), ("memory", peak_memory)):
        kind = kinds.add_parser(name)
        kind.add_argument("--model", default=str(SHARED / "models/tiny-en"))
        kind.add_argument("--rows", type=int, default=8, help="triplets in a batch")
        kind.add_argument("--tokens", type=int, default=64, help="tokens of a text")
        kind.add_argument("--steps", type=int, default=5)
        kind.add_argument("--threads", type=int, default=1)
        kind.add_argument("--device", default="cpu")
        if name == "memory":
            kind.add_argument("--form", choices=("kept", "again"), required=True)
            kind.add_argument("--checkpointing", action="store_true")
        else:
            kind.add_argument("--repeats", type=int, default=5)
        kind.set_defaults(run=run)
    for name, run in (("ablation", ablation), ("one", train_one)):
        kind = kinds.add_parser(name)
        kind.add_argument("--recipe", default="recipes/tiny-en/gircse.yaml")
        kind.add_argument("--output", type=Path, default=RESULTS / "gircse")
        kind.add_argument("--splits", nargs="+", default=["test"], choices=("dev", "test"))
        kind.add_argument("--override", type=str.split, default=[], help="recipe keys, one string")
        kind.add_argument("--threads", type=int, default=1)
        if name == "ablation":
            kind.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            kind.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
            kind.add_argument("--jobs", type=int, default=1)
        else:
            kind.add_argument("--row", choices=list(ROWS), required=True)
            kind.add_argument("--seed", type=int, required=True)
        kind.set_defaults(run=run)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
