"""Every value of every key for `reliability.py values`: it trains a step, or is refused by its key.

The keys and what they may hold come from the schema of recipes (`grace_rl.recipe.reference`), down
into every section: numbers at the ends of their range and far outside of it, every choice, both
truths, null, texts and lists for numbers, keys that nobody knows.
"""

from __future__ import annotations

import collections
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

BASE: dict[str, Any] = {
    "model_name_or_path": "scenes",
    "dtype": "float32",
    "dataset_name": "scenes",
    "dataset_rows": 16,
    "dataset_options": {"form": "triplet"},
    "per_device_train_batch_size": 8,
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
ROLLOUTS: dict[str, Any] = {
    "instruction": None,
    "roles": {"query": {}, "positive": {}},
    "rewards": [{"name": "contrastive"}],
    "num_generations": 2,
    "max_completion_length": 4,
    "print_rollouts_steps": 0,
    "panel_texts": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": ROLLOUTS,
    "ppo": ROLLOUTS,
    "sft": {"dataset_options": {"form": "sft"}, "instruction": None},
    "infonce": {},
    "gircse": {"gircse_steps": 2},
    "reconstruction": {"instruction": None, "writing_share": 0.0},
}
FAR = (-1, 0, 1, 2**31 - 1, 10**20, 1e300, math.nan, math.inf, -math.inf, "word", {"a": 1}, [1])
ELSEWHERE = {
    "output_dir", "run_name", "logging_dir", "log_level", "log_level_replica", "report_to",
    "local_rank", "ddp_backend", "deepspeed", "fsdp", "fsdp_config", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "max_steps", "num_train_epochs", "use_vllm",
}  # fmt: skip
"""Keys of the machine or of how long a run is: refused or not, nothing is run with them."""
SECONDS = 120
BYTES = 24 << 30


def values_of(schema: dict[str, Any], defs: dict[str, Any], base: Any) -> Iterator[Any]:
    """What to try for a key.

    Args:
        schema: Its JSON schema.
        defs: The `$defs` that it refers to.
        base: What the recipe has for it.
    """
    defs = defs | schema.get("$defs", {})
    if "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    for one in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        yield from values_of(one, defs, base)
    yield from schema.get("enum", ())
    kind = schema.get("type")
    if kind in ("integer", "number"):
        yield from FAR
        yield from _ends(schema, kind)
    elif kind == "boolean":
        yield from (True, False, 2, "word")
    elif kind == "string" and "enum" not in schema and "const" not in schema:
        yield from ("", "zz", 1)
    elif kind == "array":
        yield from ([], "zz", [None])
        items = schema.get("items") or {}
        yield from ([value] for value in values_of(items, defs, None))
    elif kind == "object":
        yield from _inside(schema, defs, base if isinstance(base, dict) else {})


def _ends(schema: dict[str, Any], kind: str) -> Iterator[Any]:
    """The last values inside of a range."""
    step: float = 1 if kind == "integer" else 1e-9
    for name, sign in (("minimum", 0), ("maximum", 0)):
        if name in schema:
            yield schema[name] + sign
    if "exclusiveMinimum" in schema:
        yield schema["exclusiveMinimum"] + step
    if "exclusiveMaximum" in schema:
        yield schema["exclusiveMaximum"] - step


def _inside(schema: dict[str, Any], defs: dict[str, Any], base: dict[str, Any]) -> Iterator[Any]:
    yield from ({}, "zz", [])
    if "properties" in schema:
        yield base | {"zz_unknown": 1}
    for name, one in schema.get("properties", {}).items():
        yield from (base | {name: value} for value in values_of(one, defs, base.get(name)))
    more = schema.get("additionalProperties")
    if isinstance(more, dict) and more:
        for name in base:
            yield from (base | {name: value} for value in values_of(more, defs, base[name]))


def tries(only: str = "") -> Iterator[tuple[str, str, Any]]:
    """(method, key, value), a key of the libraries with one method only.

    Args:
        only: Keys that begin so.
    """
    from grace_rl.recipe.reference import recipe_keys_of

    seen: set[str] = set()
    for method, own in METHODS.items():
        base = BASE | own
        for name, key in recipe_keys_of(method).items():
            told = name + json.dumps(key.schema, sort_keys=True)
            if name == "method" or not name.startswith(only):
                continue
            if key.home in ("TRL", "model", "recipe") and told in seen:
                continue
            seen.add(told)
            tried: set[str] = set()
            for value in values_of(key.schema, {}, base.get(name)):
                if (text := repr(value)) not in tried:
                    tried.add(text)
                    yield method, name, value


def values(folder: Path, only: str = "", one_of: int = 1, seed: int = 0) -> dict[str, Any]:
    """Try them, each in a process of its own.

    Args:
        folder: For recipes, runs and what is printed.
        only: Keys that begin so.
        one_of, seed: Of so many values only one is tried, beginning with this one.
    """
    outcomes = collections.Counter[str]()
    wrong: list[str] = []
    for number, (method, key, value) in enumerate(tries(only)):
        if number % one_of != seed % one_of:
            continue
        try:
            code, said = _tried(folder, method, key, value)
        except KeyboardInterrupt:  # what was done until now counts
            break
        # A rule of several keys names the one that it would change.
        places = ("--", f"{folder / 'values.yaml'}:", f"{key}.", f"{key}:")
        named = any(line.startswith(places) for line in said.splitlines())
        kind = {0: "runs", 2: "refused"}.get(code, "wrong")
        outcomes[f"{method}: {kind}"] += 1
        if kind == "wrong" or (code == 2 and not named):
            last = (said.strip().splitlines() or [""])[-1]
            wrong.append(f"{method} --{key}={value!r}: exit {code}: {last}"[:400])
            print(wrong[-1], flush=True)
    total = sum(outcomes.values())
    return {"values": total, "wrong": wrong[:40], "wrongs": len(wrong), "outcomes": dict(outcomes)}


def _tried(folder: Path, method: str, key: str, value: Any) -> tuple[int, str]:
    recipe, run, log = folder / "values.yaml", folder / "run", folder / "said.log"
    shutil.rmtree(run, ignore_errors=True)
    recipe.write_text(yaml.safe_dump({"method": method} | BASE | METHODS[method]))
    words = ["train", str(recipe), f"--{key}={_written(value)}"]
    words += [] if key == "output_dir" else ["--output_dir", str(run)]
    words += ["--use_peft=true"] if key.startswith(("lora_", "use_dora", "use_rslora")) else []
    words += ["--dry-run"] if key in ELSEWHERE or key.startswith(("vllm_", "hub_")) else []
    child = os.fork()
    if child == 0:
        _child(lambda main: main(words), folder, log)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def _written(value: Any) -> str:
    """As YAML has it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()


def _child(work: Callable[[Any], int], folder: Path, log: Path) -> None:
    code = 1
    try:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        silent, said = os.open(os.devnull, os.O_WRONLY), os.open(log, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(said, 0)
        os.dup2(silent, 1)
        os.dup2(said, 2)
        from grace_rl.cli import main

        code = work(main)
    finally:
        os._exit(code)
