"""Does credit by word find the words that matter? In the world of scenes that is known.

    python benchmarks/word_credit.py                  # 208 rollouts of the shipped cold start
    python benchmarks/word_credit.py --run RUN        # the last stored step of a run on scenes

The cold start samples rationales for rows of the test split; each word is left out and what is left
is read again (`grace_rl.inspect.credit`). A word matters by what it says of the scene: a fact that
the hard negative lacks 2, another true fact 1, no fact 0, a false fact -1, one of the hard negative
-2. Printed are Spearman's rank correlations of that with the word's credit, over all words and as
the mean inside of rollouts, and the same for what a word's length and place would say.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from grace_rl.data import scenes
from grace_rl.data.bundles import RoleText
from grace_rl.data.scenes import read_facts
from grace_rl.embed.encoder import RationaleEncoder
from grace_rl.embed.settings import EncoderSettings
from grace_rl.inspect.credit import StepCredit, measurable_rewards
from grace_rl.inspect.run import Run
from grace_rl.reward import load_rewards
from grace_rl.reward.runtime import RewardRuntime
from grace_rl.reward.scores import with_scores
from grace_rl.reward.stored import stored_batch
from grace_rl.rollout.groups import group_means, group_stds
from grace_rl.rollout.rollouts import Rollouts
from grace_rl.rollout.store import write_rollouts

RECIPE = """method: grpo
model_name_or_path: scenes
dataset_name: scenes
max_steps: 1
rewards:
  - {name: contrastive, temperature: 0.1}
  - {name: length, weight: 1.0}
"""
ROLES = {"query": 0, "positive": 0, "negative": 1, "negative_positive": 1}


def world_run(folder: Path, rows: int = 13, samples: int = 8, seed: int = 0) -> Path:
    """A run directory as one step of training leaves it, written by the cold start."""
    (folder / "model").mkdir(parents=True)
    settings = EncoderSettings(instruction=None, max_rationale_tokens=24)
    encoder = RationaleEncoder.from_pretrained(scenes.COLD_START, settings=settings)
    examples = scenes.rows("test", "quad", rows, seed)
    table = Rollouts.to_write(*_texts(examples, samples), torch.device("cpu"))
    written = encoder.write(table.texts, "sample", seed=seed)
    raw = encoder.reader.read(written)
    encoder.reader.centre = raw.mean(0)
    encoder.save(folder / "model")
    limit = encoder.max_rationale_tokens
    values = {field: getattr(table, field) for field in ("texts", "roles", "example", "group")}
    rollouts = Rollouts(
        **values,
        side=table.side,
        trained=table.trained,
        rationales=[item.rationale for item in written],
        token_ids=[item.token_ids for item in written],
        truncated=torch.tensor([len(item.token_ids) >= limit for item in written]),
        embeddings=encoder.reader.finish(raw).float(),
        step=1,
        seed=seed,
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "status.json").write_text(json.dumps({"grace_rl": "0", "status": "finished"}))
    rewards = load_rewards(measurable_rewards(Run(folder))[0], folder)
    scored = RewardRuntime(rewards).score(stored_batch(rollouts, folder))
    rollouts = with_scores(rollouts, rewards, scored)
    own = rollouts.trained_rows
    spread = group_stds(own.totals, own.group).clamp(min=1e-4)
    advantages = (own.totals - group_means(own.totals, own.group)) / spread
    write_rollouts(folder, 1, rollouts.with_advantages(advantages).to_arrow())
    (folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
    return folder


def _texts(examples: list[dict[str, Any]], samples: int) -> tuple[list[RoleText], list[RoleText]]:
    trained, anchors = [], []
    for number, example in enumerate(examples):
        for place, (role, side) in enumerate(ROLES.items()):
            text = example[role][0] if role == "negative" else example[role]
            row = RoleText(
                text=text, role=role, example=number, group=4 * number + place, side=side
            )
            if side:
                anchors.append(row)
            else:
                trained += [row] * samples
    return trained, anchors


def matters(word: str, scene: dict[str, str], negative: dict[str, str]) -> int:
    """What a word says of a scene, from -2 to 2; see above."""
    facts = set(read_facts(word).facts)
    if facts & set(scene.items()):
        return 1 if facts & set(negative.items()) else 2
    return -2 if facts & set(negative.items()) else -1 if facts else 0


def correlations(table: pd.DataFrame, examples: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlations of credit, and of what needs no reading, with what matters."""
    table = table.assign(
        matters=[
            matters(word, examples[e]["scene"], examples[e]["negative_scene"])
            for word, e in zip(table["word"], table["example"], strict=True)
        ],
        letters=table["word"].str.len(),
        chance=random.Random(0).sample(range(len(table)), len(table)),
    )
    found = {}
    for name in ("credit", "margin", "positive", "letters", "place", "chance"):
        found[name] = float(table[name].corr(table["matters"], method="spearman"))
    inside = [
        part["credit"].corr(part["matters"], method="spearman")
        for _, part in table.groupby("row")
        if part["matters"].nunique() > 1
    ]
    found["credit, mean inside of rollouts"] = float(pd.Series(inside).mean())
    return found


def measured_words(folder: Path) -> tuple[pd.DataFrame, int, float]:
    """Words of a run's last stored step with their `example`; how many rollouts; seconds."""
    run = Run(folder)
    began = time.perf_counter()
    credit = StepCredit(run, run.steps()[-1], measurable_rewards(run)[0])
    table = pd.concat(credit.measure(range(len(credit.batch))))
    seconds = time.perf_counter() - began
    examples = credit.batch.example[torch.tensor(table["row"].to_numpy())]
    return table.assign(example=examples.tolist()), len(credit.batch), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run on quads of scenes' train split")
    parser.add_argument("--rows", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.run is not None:
        table, count, seconds = measured_words(options.run)
        examples = scenes.rows("train", "quad", int(table["example"].max()) + 1)
    else:
        examples = scenes.rows("test", "quad", options.rows, options.seed)
        with tempfile.TemporaryDirectory() as folder:
            run = world_run(Path(folder) / "world", options.rows, seed=options.seed)
            table, count, seconds = measured_words(run)
    print(f"{count} rollouts, {len(table)} words, {seconds / count:.3f} s a rollout")
    for name, value in correlations(table, examples).items():
        print(f"{name:34}{value:+.3f}")


if __name__ == "__main__":
    main()
