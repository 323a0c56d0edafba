"""grace-rl new PROJECT"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "write a folder of your own that runs as it is: recipe, rows, reward, test, tasks"
RECIPE_OVERRIDES = False
ROWS = 64
PAIRS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="PROJECT", help="such as my-project; must not exist")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.data import scenes
    from grace_rl.errors import UserError
    from grace_rl.recipe.reference import SCHEMA_FILE
    from grace_rl.run.files import write_text
    from grace_rl.run.printing import say

    folder = Path(options.folder).expanduser()
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another name")
    folder.mkdir(parents=True)
    for template in (Path(__file__).parent / "project").iterdir():
        text = template.read_text(encoding="utf-8")
        write_text(folder / template.name.removesuffix(".txt"), text)
    write_text(folder / "recipe.schema.json", SCHEMA_FILE.read_text(encoding="utf-8"))
    triplets = scenes.rows("train", "triplet", ROWS)
    kept = ("query", "positive", "negative")
    _write_rows(folder / "rows.jsonl", [{name: row[name] for name in kept} for row in triplets])
    pairs = [
        {"sentence1": row["query"], "sentence2": row[other], "score": score}
        for row in scenes.rows("test", "triplet", PAIRS)
        for other, score in (("positive", 1.0), ("negative", 0.0))
    ]
    _write_rows(folder / "pairs.jsonl", pairs)
    say(f"wrote {folder}; go on with: cd {folder} && grace-rl train recipe.yaml")
    return 0


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    from grace_rl.run.files import write_text

    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
