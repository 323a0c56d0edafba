"""Does the quickstart work for every seed? Trains with several; prints the table and its spread.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2
    python benchmarks/quickstart_seeds.py --seeds 0 1 2 -- --max_steps 30   # after --: for train

Each seed is a run of its own under --output. Rows of one table come from the same runs: without a
rationale, the cold start, and after RL, greedy. The exit code is 1 if RL is not above the cold
start on every similarity score of both splits for every seed, or gains less than 0.30 triplet
accuracy on the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grace_rl.evaluate.scenes import SIMILARITY_SCORES

LEAST_TRIPLET_GAIN = 0.30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-seeds"))
    parser.add_argument("overrides", nargs="*", help="passed on to grace-rl train")
    options = parser.parse_args()

    runs, seconds = [], []
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        command = [sys.executable, "-m", "grace_rl", "train", options.recipe, "--overwrite"]
        command += ["--seed", str(seed), "--output_dir", str(folder), *options.overrides]
        print("$ grace-rl", *command[3:], flush=True)
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds.append(time.perf_counter() - start)
        runs.append(json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"])

    console = Console(width=160)
    console.print(summary(runs, options.seeds))
    console.print(f"seconds per run, all included: {', '.join(f'{s:.0f}' for s in seconds)}")
    failures = shortfalls(runs, options.seeds)
    for failure in failures:
        console.print(failure)
    return 1 if failures else 0


def summary(runs: list[list[dict]], seeds: list[int]) -> Table:
    """Mean and (lowest to highest) over seeds of every score of every row."""
    table = Table(title=f"{len(seeds)} seeds: mean (lowest to highest)", title_justify="left")
    rows = runs[0]
    table.add_column("score")
    for row in rows:
        table.add_column(f"{row['name']}, {row['rationale']}", justify="right")
    for score in dict.fromkeys(name for row in rows for name in row["scores"]):
        cells = []
        for i in range(len(rows)):
            values = [run[i]["scores"][score] for run in runs if score in run[i]["scores"]]
            cells.append(
                f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                if values
                else ""
            )
        table.add_row(score, *cells)
    return table


def shortfalls(runs: list[list[dict]], seeds: list[int]) -> list[str]:
    """What a seed did not reach, a sentence each."""
    found = []
    for seed, rows in zip(seeds, runs, strict=True):
        before, after = rows[-2]["scores"], rows[-1]["scores"]
        for score, value in after.items():
            if score.split("/")[1] in SIMILARITY_SCORES and value <= before[score]:
                found.append(
                    f"seed {seed}: {score} is {value:.3f}, "
                    f"not above the cold start's {before[score]:.3f}"
                )
        gain = after["scenes/triplet_accuracy"] - before["scenes/triplet_accuracy"]
        if gain < LEAST_TRIPLET_GAIN:
            found.append(
                f"seed {seed}: triplet accuracy gained {gain:.3f}, expected {LEAST_TRIPLET_GAIN}"
            )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
