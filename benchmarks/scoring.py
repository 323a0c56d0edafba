"""Scoring 4,096 rollouts with the four rewards: seconds, and memory at two lengths.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py

Quads, 64 rollouts of each text, vectors of --dim. Seconds of processor time are the median of
--repeats; beside them those that a step takes which writes and trains as many rollouts, by
benchmarks/results/step-on-policy.json. Memory is the peak of resident memory
in one scoring above that before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from grace_rl.reward import RewardRuntime
from grace_rl.reward.example import batch_of_pool, random_batch
from grace_rl.reward.loading import RewardSpec, load_rewards

RESULTS = Path(__file__).parent / "results"
REWARDS = ["contrastive", "consistency", "hard_negative", "length"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--dim", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, Any] = {"options": vars(options)}
    runtime = RewardRuntime(load_rewards([RewardSpec(name) for name in REWARDS], "."))
    rows = options.rollouts // (4 * options.samples)
    batch = random_batch("quad", rows=rows, samples=options.samples, dim=options.dim)
    for length in (48, 480):
        ids = [list(range(length))] * len(batch.pool)
        pool = dataclasses.replace(batch.pool, token_ids=ids)
        longer = batch_of_pool(pool, torch.arange(len(batch)))
        seconds = []
        for _ in range(options.repeats + 1):
            started = time.process_time()
            runtime.score(dataclasses.replace(longer))
            seconds.append(time.process_time() - started)
        before = reset_peak()
        runtime.score(dataclasses.replace(longer))
        peak = memory("VmHWM") - before
        found[f"{length} tokens"] = {"seconds": statistics.median(seconds[1:]), "peak": peak}
        print(f"{length:>4} tokens: {statistics.median(seconds[1:]):.3f} s, {peak / 2**20:.1f} MiB")
    if (RESULTS / "step-on-policy.json").exists():
        step = json.loads((RESULTS / "step-on-policy.json").read_text())
        rows = step["options"]["rows"]
        cpu = statistics.median(step["runs"]["trl"]["cpu"]) / (rows * 32) * options.rollouts
        share = found["48 tokens"]["seconds"] / cpu
        print(f"of a step of TRL with as many rollouts ({cpu:.0f} s): {share:.2%}")
        found["share"] = share
    path = RESULTS / "scoring.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def reset_peak() -> int:
    """Resident bytes, from which the next peak is counted (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
