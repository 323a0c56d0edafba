"""The tables that a run prints when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

HEADINGS = {
    "recall_at_1": "recall@1",
    "triplet_accuracy": "triplet",
    "spearman": "Spearman",
    "coverage": "coverage",
    "precision": "precision",
}


def score_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per task and policy.

    Args:
        rows: As in evaluation.json: `name`, `rationale`, `scores` with names `<task>/<score>`.
    """
    table = Table(title="Held-out scores", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("split", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    tasks = dict.fromkeys(score.split("/")[0] for row in rows for score in row["scores"])
    for task in tasks:
        for i, row in enumerate(rows):
            label = row["name"].replace("_", " ")
            if row["rationale"] == "none" and row["name"] == "cold_start":
                label = "no rationale"
            values = [row["scores"].get(f"{task}/{score}") for score in HEADINGS]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            split = "test" if task == "scenes" else task.removeprefix("scenes_")
            table.add_row(split if i == 0 else "", label, *cells, end_section=i == len(rows) - 1)
    return table


def rationale_table(examples: Mapping[str, Sequence[Mapping[str, str]]]) -> Table:
    """The same texts with every policy's rationale.

    Args:
        examples: Name of a policy -> `{text, rationale}`, the same texts for each.
    """
    table = Table(title="What was written", title_justify="left", show_lines=True)
    table.add_column("text", ratio=2)
    for name in examples:
        table.add_column(name.replace("_", " "), ratio=1)
    for same_text in zip(*examples.values(), strict=True):
        cells = [Text(example["rationale"]) for example in same_text]
        table.add_row(Text(same_text[0]["text"]), *cells)
    return table
