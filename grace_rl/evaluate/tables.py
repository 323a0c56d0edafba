"""The tables that a run prints when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from grace_rl.evaluate.scenes import FACT_SCORES, SIMILARITY_SCORES


def score_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per policy and split.

    Args:
        rows: As in evaluation.json: `name`, `rationale`, `scores` with names `<task>/<score>`.
    """
    table = Table(title="Held-out scores, greedy rationales", title_justify="left")
    table.add_column("split")
    table.add_column("policy")
    columns = (*SIMILARITY_SCORES, *FACT_SCORES)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    tasks = dict.fromkeys(score.split("/")[0] for row in rows for score in row["scores"])
    for task in tasks:
        for i, row in enumerate(rows):
            label = "no rationale" if row["rationale"] == "none" else row["name"]
            values = [row["scores"].get(f"{task}/{column}") for column in columns]
            cells = ["" if value is None else f"{value:.3f}" for value in values]
            table.add_row(task if i == 0 else "", label, *cells, end_section=i == len(rows) - 1)
    return table


def rationale_table(examples: Mapping[str, Sequence[Mapping[str, str]]]) -> Table:
    """The same texts with every policy's rationale.

    Args:
        examples: Name of a policy -> `{text, rationale}`, the same texts for each.
    """
    table = Table(title="What was written", title_justify="left", show_lines=True)
    table.add_column("text", ratio=2)
    for name in examples:
        table.add_column(name, ratio=1)
    for same_text in zip(*examples.values(), strict=True):
        cells = [Text(example["rationale"]) for example in same_text]
        table.add_row(Text(same_text[0]["text"]), *cells)
    return table
