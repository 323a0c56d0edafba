"""The small files of a run, read so that a damaged one is a sentence and the rest is still shown.

Nothing that a file names is imported, built or followed: what comes back is text and numbers.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from grace_rl.errors import UserError
from grace_rl.recipe.source import read_source
from grace_rl.run.records import read_status


class Records:
    """status.json, recipe.yaml, metrics.jsonl, evaluation.json and soft_tokens.jsonl of one run.

    Each is read again when its file has changed.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, tuple[tuple[int, int] | None, Any]] = {}
        self._problems: dict[str, str] = {}

    def read(self, name: str) -> Any:
        """The content of one of the files, as the method for it says."""
        try:
            about = (self.path / name).stat()
        except OSError:
            stamp = None
        else:
            stamp = about.st_mtime_ns, about.st_size
        if name not in self._kept or self._kept[name][0] != stamp:
            self._problems.pop(name, None)
            self._kept[name] = stamp, self._readers[name](self)
        return self._kept[name][1]

    def problems(self) -> list[str]:
        """A sentence for each file that is damaged."""
        for name in self._readers:
            self.read(name)
        return list(self._problems.values())

    def _status(self) -> dict[str, Any]:
        status = read_status(self.path)
        if status is None:
            self._note("status.json", "cannot be read")
        return status or {}

    def _recipe(self) -> dict[str, Any]:
        path = self.path / "recipe.yaml"
        if not path.exists():
            return {}
        try:
            source = read_source(path)
            tree, problems = source.tree, source.problems
        except UserError as error:
            tree, problems = {}, error.problems
        self._note(path.name, problems[0] if problems else "")
        return tree

    def _metrics(self) -> pd.DataFrame:
        """A row of numbers for each logged step; damaged lines are left out and told."""
        lines, bad = [], []
        for number, entry in self._lines("metrics.jsonl"):
            step = entry.get("step") if isinstance(entry, dict) else None
            if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
                bad.append(number)
                continue
            lines.append({name: _number(value) for name, value in entry.items()} | {"step": step})
        self._note("metrics.jsonl", _left_out(bad))
        return pd.DataFrame(lines) if lines else pd.DataFrame({"step": pd.Series(dtype=int)})

    def _evaluation(self) -> pd.DataFrame:
        """`name`, `rationale`, and every score by its name."""
        name, rows = "evaluation.json", []
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
            for row in content["rows"]:
                scores = {str(key): _number(value) for key, value in row["scores"].items()}
                rows.append(
                    {"name": str(row["name"]), "rationale": str(row["rationale"]), **scores}
                )
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            self._note(name, f"cannot be read: {str(error).partition(chr(10))[0]}")
        except (LookupError, TypeError, AttributeError):
            self._note(name, "is not as `grace-rl evaluate` writes it")
        return pd.DataFrame(rows)

    def _soft_tokens(self) -> list[dict[str, Any]]:
        """`step`, `text` and `words` (a list of (word, share) for each soft token) of each line."""
        lines, bad = [], []
        for number, entry in self._lines("soft_tokens.jsonl"):
            try:
                words = [[(str(w), float(p)) for w, p in s["words"]] for s in entry["steps"]]
                lines.append(
                    {"step": int(entry["step"]), "text": str(entry["text"]), "words": words}
                )
            except (LookupError, TypeError, ValueError, OverflowError):
                bad.append(number)
        self._note("soft_tokens.jsonl", _left_out(bad))
        return lines

    _readers: ClassVar = {
        "status.json": _status,
        "recipe.yaml": _recipe,
        "metrics.jsonl": _metrics,
        "evaluation.json": _evaluation,
        "soft_tokens.jsonl": _soft_tokens,
    }

    def _lines(self, name: str) -> list[tuple[int, Any]]:
        """Line number and content, None for a damaged one; one still being written is left out."""
        try:
            text = (self.path / name).read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._note(name, f"cannot be read: {error.strerror}")
            return []
        lines = []
        for number, line in enumerate(text.split(b"\n")[:-1], start=1):
            try:
                lines.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                lines.append((number, None))
        return lines

    def _note(self, name: str, problem: str) -> None:
        if problem and (self.path / name).exists():
            self._problems[name] = f"{self.path / name}: {problem}"


def _left_out(lines: list[int]) -> str:
    if not lines:
        return ""
    some = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    return f"{len(lines)} damaged lines are left out: {some}"


def _number(value: Any) -> float:
    """What is logged as a float; what is none, or too large for one, is NaN."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def flat(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe by dotted keys; items of lists that have a `name` or `label` go by that.

    >>> flat({"roles": {"query": {"samples": 8}}, "rewards": [{"name": "length", "weight": 2.0}]})
    {'roles.query.samples': 8, 'rewards.length.name': 'length', 'rewards.length.weight': 2.0}
    """
    if isinstance(recipe, list) and recipe and all(isinstance(item, Mapping) for item in recipe):
        numbered = enumerate(recipe, start=1)
        recipe = {str(i.get("label") or i.get("name") or number): i for number, i in numbered}
    if not isinstance(recipe, Mapping) or not recipe:
        return {prefix: recipe}
    return {
        name: value
        for key, item in recipe.items()
        for name, value in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def reward_weights(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Weight of each reward in the total, by label; rewards of one name are numbered as in a run.

    >>> reward_weights({"rewards": ["length", {"name": "rules.py:length", "weight": 0.5}]})
    {'length': 1.0, 'length_2': 0.5}
    """
    rewards, weights = recipe.get("rewards"), dict[str, float]()
    for entry in rewards if isinstance(rewards, list) else []:
        spec = entry if isinstance(entry, dict) else {"name": entry}
        name = str(spec.get("name")).rpartition(":")[2].replace("/", "_").replace(" ", "_")
        label = str(spec.get("label") or name)
        numbered = (f"{label}_{count}" for count in itertools.count(2))
        label = next(name for name in itertools.chain([label], numbered) if name not in weights)
        weight = spec.get("weight", 1.0)
        weights[label] = float(weight) if isinstance(weight, int | float) else 1.0
    return weights
