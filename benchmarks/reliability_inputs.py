"""Inputs made at random for `reliability.py inputs`: good ones, with something done to them.

Each kind gives (what reads the input, a key that must be refused or an empty string).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

RECIPE: dict[str, Any] = {
    "method": "grpo",
    "model_name_or_path": "scenes",
    "dataset_name": "scenes",
    "dataset_rows": 16,
    "instruction": None,
    "roles": {"query": {"samples": 4}, "positive": {"samples": 4}},
    "reader": {"span": "bottleneck", "layers": [0, -1], "centre": True},
    "rewards": [{"name": "contrastive", "temperature": 0.1}, {"name": "length", "weight": 0.1}],
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "max_completion_length": 12,
    "learning_rate": 1e-4,
    "bf16": False,
    "use_cpu": True,
}
ODD: list[Any] = [None, "", " ", "none", -1, 0, 1, 1e308, -0.5, float("nan"), float("inf"), True]
ODD += [[], {}, [None], {"": 1}, [[[]]], {"a": {"b": []}}, "\x00", "\ud800", "é" * 50, "../..", "~"]
ODD += [10**30, "1e-4", "0x10", "2024-01-01", "&a", "!!python/object:os.system", "\u202e"]
TASKS = [
    {"name": "a", "kind": "sts", "path": "sts.jsonl"},
    {"name": "b", "kind": "classification", "path": "c"},
]
Made = tuple[Callable[[], Any], str]


def recipe(draw: random.Random, folder: Path) -> Made:
    from grace_rl.recipe.stages import load

    tree = json.loads(json.dumps(RECIPE))
    unknown = _spoil(draw, tree)
    path = folder / "recipe.yaml"
    _write(draw, path, yaml.safe_dump(tree, allow_unicode=False), damage=0.2)
    # A key that was spoilt with bytes may be gone, or in a comment.
    kept = unknown and unknown in path.read_bytes().decode("utf-8", "ignore")
    sound = kept and _is_there(path, unknown)
    return (lambda: load(path)), unknown if sound else ""


def preflight(draw: random.Random, folder: Path) -> Made:
    """A recipe whose mistakes are told with those of its rows and its model."""
    from grace_rl.launch.preflight import all_together

    load, unknown = draw.choice([recipe, overrides])(draw, folder)

    def look() -> None:
        with all_together():
            load()

    return look, unknown


def overrides(draw: random.Random, folder: Path) -> Made:
    from grace_rl.recipe.stages import load

    path = folder / "sound.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    words: list[str] = []
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*RECIPE, "reader.span", "roles.query.samples", "rewards.length.weight"])
        key = key if draw.random() < 0.7 else _text(draw)
        value = draw.choice([json.dumps(draw.choice(ODD), default=str), _text(draw)])
        words += draw.choice([[f"--{key}", value], [f"--{key}={value}"], [f"--{key}"], [value]])
    unknown = "zz_unknown" if draw.random() < 0.3 else ""
    words += [f"--{unknown}", "1"] if unknown else []
    return (lambda: load(path, words)), unknown


def rows(draw: random.Random, folder: Path) -> Made:
    from grace_rl.data.rows import read_rows
    from grace_rl.recipe.rows import DataConfig

    made = []
    for i in range(draw.randint(0, 6)):
        row: dict[str, Any] = {"query": f"a {i}", "positive": "b", "negative": ["c"]}
        if draw.random() < 0.4:
            row[draw.choice(["query", "positive", "negative", "id", "text"])] = draw.choice(ODD)
        made.append(row)
    suffix = draw.choice([".jsonl", ".csv", ".jsonl.gz", ".parquet"])
    path = folder / f"rows{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in made)
    if suffix == ".csv":
        text = "query,positive\n" + "".join(f'"{_text(draw)}",b\n' for _ in made)
    _write(draw, path, text, damage=0.4)
    return (lambda: read_rows(DataConfig(dataset_name=str(path)))), ""


def tasks(draw: random.Random, folder: Path) -> Made:
    from grace_rl.evaluate.tasks import load_tasks

    (folder / "sts.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n')
    made = json.loads(json.dumps(TASKS[: draw.randint(0, 2)]))
    for task in made:
        if draw.random() < 0.5:
            task[draw.choice(["name", "kind", "path", "zz_unknown"])] = draw.choice(ODD)
    path = folder / "tasks.yaml"
    _write(draw, path, yaml.safe_dump(made), damage=0.3)
    return (lambda: load_tasks(path)), ""


def rollouts(draw: random.Random, folder: Path) -> Made:
    from grace_rl.rollout.store import read_rollouts

    whole = folder / "rollouts" / "whole"
    if not whole.exists():
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"step": [1] * 50, "text": ["x"] * 50}), whole)
    content = bytearray(whole.read_bytes())
    for _ in range(draw.randint(0, 5)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    cut = draw.randrange(len(content)) if draw.random() < 0.3 else len(content)
    (folder / "rollouts" / "step-000001.parquet").write_bytes(content[:cut])
    return (lambda: read_rollouts(folder)), ""


def records(draw: random.Random, folder: Path) -> Made:
    from grace_rl.run.records import read_metrics, read_recipe, read_status

    name = draw.choice(["metrics.jsonl", "recipe.yaml", "status.json"])
    text = {
        "metrics.jsonl": '{"step": 1, "seconds": 2.0}\n' * 3,
        "recipe.yaml": yaml.safe_dump(RECIPE),
        "status.json": '{"grace_rl": "1", "status": "running"}',
    }[name]
    run = folder / "records"
    run.mkdir(exist_ok=True)
    _write(draw, run / name, text, damage=0.8)
    readers: list[Any] = [read_metrics, read_recipe, read_status]
    reader = readers[["metrics.jsonl", "recipe.yaml", "status.json"].index(name)]
    return (lambda: reader(run)), ""


def model(draw: random.Random, folder: Path) -> Made:
    from grace_rl.data import scenes
    from grace_rl.rollout.policy import outline_policy

    place = folder / "model"
    place.mkdir(exist_ok=True)
    for file in scenes.COLD_START.iterdir():
        if file.is_file() and file.suffix == ".json":
            damage = 0.15 if file.name != "tokenizer.json" else 0.02
            _write(draw, place / file.name, file.read_text(encoding="utf-8"), damage)
    return (lambda: outline_policy(place)), ""


KINDS: dict[str, Callable[[random.Random, Path], Made]] = {
    "recipe": recipe,
    "overrides": overrides,
    "rows": rows,
    "tasks": tasks,
    "rollouts": rollouts,
    "run records": records,
}
SLOW_KINDS = {"model folder": model, "preflight": preflight}  # tens of milliseconds and more


def _spoil(draw: random.Random, tree: dict[str, Any]) -> str:
    """Change some values; sometimes add an unknown key and return it."""
    places: list[dict[str, Any]] = [tree, tree["reader"], tree["roles"], tree["rewards"][0]]
    for _ in range(draw.randint(0, 3)):
        place = draw.choice(places)
        if place:
            place[draw.choice(list(place))] = draw.choice(ODD)
    if draw.random() < 0.3:
        tree["zz_unknown"] = draw.choice(ODD)
        return "zz_unknown"
    return ""


def _is_there(path: Path, key: str) -> bool:
    try:
        return f"{key!r}:" in repr(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError, RecursionError):
        return False


def _write(draw: random.Random, path: Path, text: str, damage: float) -> None:
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if draw.random() < damage:
        for _ in range(draw.randint(1, 8)):
            place = draw.randrange(len(content) + 1)
            kind = draw.random()
            if kind < 0.4 and content:
                content[min(place, len(content) - 1)] = draw.randrange(256)
            elif kind < 0.7:
                content[place:place] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
            else:
                del content[place : place + draw.randint(1, 40)]
    path.write_bytes(content)


def _text(draw: random.Random) -> str:
    letters = "abc_.-={}[]:,'\"#&*!|>%@` \t\\\u202e\x1bé0123"
    return "".join(draw.choice(letters) for _ in range(draw.randint(0, 12)))
