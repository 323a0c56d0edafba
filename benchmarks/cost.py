"""What a GRPO step costs, by formula; and the formula beside the clock.

    OMP_NUM_THREADS=1 python benchmarks/cost.py compare
    python benchmarks/cost.py gpus

`compare` trains a Qwen3 of about 10M random parameters in four settings of rows, tokens and reader.
The rates of this machine (FLOPs per second of processor time when writing, reading and training)
are taken from the first; the other three are predicted from the formula and these rates.

`gpus` prints what the formula says of a policy of 7B parameters on 8 and on 64 GPUs (H100). Their
rates are assumptions, named in `H100`: nothing of that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Policy:
    """A decoder: parameters of its blocks and of its head, and what attention and caches need."""

    blocks: float
    head: float
    layers: int
    hidden: int
    kv_width: int  # of keys; values are as wide
    weight_bytes: int = 2


@dataclass(frozen=True)
class Step:
    """One optimizer step on all processes: on-policy, every rollout in it once.

    Prompts and rationales are means, in tokens; `anchors` of a row are written once each.
    """

    rows: int
    texts: int
    samples: int
    prompt: float
    text: float
    tokens: float
    reader: str = "bottleneck"
    anchors: int = 0
    engine: str = "transformers"
    processes: int = 1
    zero3: bool = False

    @property
    def trained(self) -> int:
        return self.rows * self.texts * self.samples

    @property
    def written(self) -> int:
        return self.trained + self.rows * self.anchors


@dataclass(frozen=True)
class Work:
    """Of all processes together: tokens through the blocks, FLOPs, bytes read from memory."""

    tokens: float
    flops: float
    bytes: float


def forward(policy: Policy, tokens: float, length: float, scored: float = 0.0) -> float:
    """FLOPs of tokens in sequences of that length, `scored` of them through the head."""
    attention = 4 * length * policy.hidden * policy.layers
    return tokens * (2 * policy.blocks + attention) + 2 * policy.head * scored


def work(policy: Policy, step: Step) -> dict[str, Work]:
    """By phase. Prompts are computed once a text, by transformers and by vLLM's prefix cache."""
    length = step.prompt + step.tokens
    weights = (policy.blocks + policy.head) * policy.weight_bytes
    distinct = step.rows * (step.texts + step.anchors)
    decoded = step.written * step.tokens
    # one step more shows an in-context reader the last token
    steps = step.tokens + (step.reader in ("context", "rationale"))
    cache = 2 * policy.kv_width * policy.layers * policy.weight_bytes
    write = forward(policy, distinct * step.prompt, step.prompt)
    write += forward(policy, step.written * steps, step.prompt + step.tokens / 2, decoded)
    read = {"bottleneck": decoded, "joint": decoded + distinct * step.text}.get(step.reader, 0.0)
    reading = forward(policy, read, step.tokens)
    passes = step.trained * length
    once = forward(policy, passes, length, step.trained * step.tokens)
    old = step.engine == "vllm"  # TRL's log-probabilities; in-context readers look on
    per_step = step.processes * weights + step.written * (step.prompt + step.tokens / 2) * cache
    return {
        "write": Work(distinct * step.prompt + step.written * steps, write, steps * per_step),
        "read": Work(read, reading, step.processes * weights if read else 0.0),
        "old": Work(passes * old, once * old, step.processes * weights * old),
        "score": Work(0, 2.0 * step.written**2 * policy.hidden, 0),
        "train": Work(3 * passes, 3 * once, 3.0 * step.processes * weights),
    }


def exchanged(policy: Policy, step: Step) -> dict[str, float]:
    """Bytes that each process sends."""
    share = (step.processes - 1) / step.processes
    weights = (policy.blocks + policy.head) * policy.weight_bytes
    return {
        "gradients": (1 if step.zero3 else 2) * share * weights,
        "weights": (2 if step.zero3 else 0) * share * weights,
        "vectors": share * step.written * policy.hidden * 4 / step.processes,
    }


# -- the formula beside the clock ---------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    import step as bench
    from random_policy import save_random_policy

    policy = Policy(7.6e6, 2.6e6, 6, 320, 320, 4)
    settings = [(1, 48, "bottleneck"), (2, 24, "joint"), (1, 96, "context"), (2, 12, "bottleneck")]
    rates: dict[str, float] = {}
    found = []
    for rows, tokens, reader in settings:
        given = ["--rows", str(rows), "--tokens", str(tokens), "--variants", reader]
        parsed = bench.parser().parse_args(given)
        with tempfile.TemporaryDirectory() as name:
            save_random_policy(Path(name) / "model")
            bench.time_phases_by_processor()
            trainer = bench.build(reader, parsed, Path(name) / "model", Path(name) / "run")
            stepper = bench.Stepper(trainer)
            for _ in range(options.repeats + 1):
                stepper.batch()
        prompt, text = bench.lengths(trainer, rows)
        setting = Step(rows, 4, bench.SAMPLES, prompt, text, tokens, reader)
        parts = {"write": "rollout", "read": "embed", "train": "train"}
        seconds = {
            part: statistics.median(stepper.phases[phase][1:]) for part, phase in parts.items()
        }
        flops = {part: of.flops for part, of in work(policy, setting).items()}
        rates = rates or {part: flops[part] / seconds[part] for part in parts}
        predicted = {part: flops[part] / rates[part] for part in parts}
        found.append({"setting": vars(setting), "seconds": seconds, "predicted": predicted})
        total = sum(predicted.values()) / sum(seconds.values())
        each = ", ".join(f"{p} {predicted[p]:.2f} / {seconds[p]:.2f}" for p in parts)
        print(f"{rows} rows, {tokens} tokens, {reader}: predicted / measured {total:.2f} ({each})")
    print("GFLOP/s:", {part: round(rate / 1e9, 1) for part, rate in rates.items()})
    return {"rates": rates, "settings": found}


# -- a policy of 7B parameters ---------------------------------


@dataclass(frozen=True)
class Device:
    """FLOPs and bytes per second that a device reaches, and its link to others."""

    name: str
    flops: float
    bytes: float
    link: float


H100 = Device("H100, bfloat16", flops=0.4 * 990e12, bytes=0.6 * 3.35e12, link=0.7 * 450e9)
BETWEEN_NODES = 0.7 * 50e9
SEVEN = Policy(6.5e9, 0.55e9, 28, 3584, 512)


def gpus(_: argparse.Namespace) -> dict[str, Any]:
    base = Step(8, 2, 8, 96, 64, 128, engine="vllm", zero3=True, anchors=1)
    found: dict[str, Any] = {}
    print("7B, 128 rollouts a GPU of 96 + 128 tokens, vLLM, ZeRO-3; seconds of a step by phase")
    for processes, reader in [(n, r) for n in (8, 64) for r in ("context", "bottleneck", "joint")]:
        setting = replace(base, rows=8 * processes, reader=reader, processes=processes)
        device = H100 if processes <= 8 else replace(H100, link=BETWEEN_NODES)
        seconds = {
            part: max(of.flops / device.flops, of.bytes / device.bytes) / processes
            for part, of in work(SEVEN, setting).items()
        }
        seconds["exchange"] = sum(exchanged(SEVEN, setting).values()) / device.link
        found[f"{processes} {reader}"] = seconds
        total = sum(seconds.values())
        parts = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())
        print(f"{processes:>3} GPUs, {reader:>10}: {total:6.2f} s ({parts})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("compare", "gpus"))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = (compare if options.what == "compare" else gpus)(options)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cost-{options.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
