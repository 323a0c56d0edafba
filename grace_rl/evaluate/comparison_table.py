"""The table of a comparison as Markdown, CSV and JSON, and its picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_rl.evaluate.comparison import Cell, ComparedRow, Comparison
from grace_rl.run.files import whole_file, write_text

Results = Sequence[tuple[Cell, Mapping[str, Any]]]
SHORT = {"recall_at_1": "recall@1", "triplet_accuracy": "triplet", "spearman": "Spearman"}
COSTS = {
    "training seconds": lambda result: result.get("training", {}).get("seconds"),
    "tokens": lambda result: result.get("training", {}).get("tokens"),
    "s per 1,000 texts": lambda result: result["seconds_per_1000_texts"],
    "perplexity": lambda result: result.get("perplexity"),
}


def write_tables(comparison: Comparison, results: Results, tried: Results) -> list[Path]:
    """Write `comparison.{json,csv,md,png}`.

    Args:
        comparison: The comparison.
        results: The cells of the table.
        tried: All cells, those too whose setting was not chosen; they are kept in the JSON.

    Returns:
        The files; without matplotlib there is no picture.
    """
    folder = comparison.output_dir
    lines = table_lines(comparison, results)
    content = {
        "budget": comparison.file.budget(),
        "seeds": list(comparison.file.seeds),
        "rows": lines,
        "cells": [
            {"row": cell.row, "labels": cell.labels, "seed": cell.seed, "choice": cell.choice}
            | {key: value for key, value in result.items() if key not in ("training", "spec")}
            | {"changes": cell.spec["changes"], "training": _brief(result.get("training"))}
            for cell, result in tried
        ],
    }
    paths = [folder / f"comparison.{ending}" for ending in ("json", "csv", "md")]
    write_text(paths[0], json.dumps(content, indent=1) + "\n")
    write_text(paths[1], as_csv(lines))
    write_text(paths[2], as_markdown(lines))
    picture = folder / "comparison.png"
    if draw(comparison, lines, picture):
        paths.append(picture)
    return paths


def _brief(training: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Without the curve of validation scores, but with its best."""
    if training is None:
        return None
    curve = training["validation"]
    names = sorted({key for line in curve for key in line if key.startswith("eval_r")})
    best = {name: max(line[name] for line in curve if name in line) for name in names}
    return {key: value for key, value in training.items() if key != "validation"} | best


def table_lines(comparison: Comparison, results: Results) -> list[dict[str, Any]]:
    """One entry for each row and number of labels: every score's mean and range over seeds."""
    lines = []
    for row in comparison.rows:
        own = [(cell, result) for cell, result in results if cell.row == row.name]
        for labels in sorted({cell.labels for cell, _ in own}, key=lambda n: (n is not None, n)):
            some = [(cell, result) for cell, result in own if cell.labels == labels]
            scores = {
                name: _spread([result["scores"][name] for _, result in some])
                for name in dict.fromkeys(n for _, result in some for n in result["scores"])
            }
            costs = {
                name: _spread([v for _, result in some if (v := cost(result)) is not None])
                for name, cost in COSTS.items()
            }
            chosen = {json.dumps(row.grid[c.choice]) for c, _ in some if c.choice is not None}
            lines.append(
                {
                    "row": row.name,
                    "labels": labels,
                    "seeds": len(some),
                    "scores": scores,
                    "costs": {name: spread for name, spread in costs.items() if spread},
                    "chosen": json.loads(chosen.pop()) if chosen else None,
                }
            )
    return lines


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def shown_scores(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scores of the table: on scenes the three of similarity, elsewhere all."""
    names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    of_scenes = [name for name in names if name.split("/")[-1] in SHORT]
    return (
        sorted(of_scenes, key=lambda n: (n.split("/")[0], list(SHORT).index(n.split("/")[1])))
        or names
    )


def _title(score: str) -> str:
    task, _, name = score.rpartition("/")
    task = {"scenes": "test"}.get(task, task.removeprefix("scenes_"))
    return f"{task} {SHORT.get(name, name)}".strip()


def _shown(spread: Mapping[str, float] | None, digits: int = 3) -> str:
    if spread is None:
        return ""
    texts = [f"{spread[key]:,.{digits}f}".replace("0.", ".", spread[key] < 1) for key in spread]
    return texts[0] if spread["low"] == spread["high"] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def as_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table: mean (lowest to highest) over seeds."""
    scores = shown_scores(lines)
    costs = [name for name in COSTS if any(name in line["costs"] for line in lines)]
    heads = ["row", "labels", "seeds", *map(_title, scores), *costs]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        labels = "" if line["labels"] is None else f"{line['labels']:,}"
        rows.append(
            [line["row"], labels, str(line["seeds"])]
            + [_shown(line["scores"].get(score)) for score in scores]
            + [
                _shown(line["costs"].get(cost), 0 if cost in ("tokens", "training seconds") else 2)
                for cost in costs
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Every score and cost of the table, a line each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "labels", "seeds", "score", "mean", "low", "high"])
    for line in lines:
        for name, spread in {**line["scores"], **line["costs"]}.items():
            writer.writerow(
                [line["row"], line["labels"], line["seeds"], name]
                + [round(spread[key], 6) for key in ("mean", "low", "high")]
            )
    return text.getvalue()


def draw(comparison: Comparison, lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """A panel for each task: its main score over the number of labelled rows.

    What needs no labels is a dashed line. Returns False where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = shown_scores(lines)
    panels = [name for name in scores if name.endswith("triplet_accuracy")] or scores[:4]
    counts = sorted({line["labels"] for line in lines if line["labels"] is not None})
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(3.4 * len(panels) + 2.4, 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",  # makes room for the legend
    )
    for axis, score in zip(axes[0], panels, strict=True):
        for i, row in enumerate(comparison.rows):
            own = [line for line in lines if line["row"] == row.name and score in line["scores"]]
            _draw_row(axis, row, own, score, f"C{i}", counts)
        axis.set_title(_title(score), fontsize=10)
        if counts:
            axis.set_xscale("log", base=2)
            axis.set_xticks(counts, [f"{count:,}" for count in counts])
            axis.set_xlabel("labelled rows")
            axis.minorticks_off()
        else:
            axis.set_xticks([])
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, loc="outside right center", frameon=False)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
    return True


def _draw_row(
    axis: Any,
    row: ComparedRow,
    lines: Sequence[Mapping[str, Any]],
    score: str,
    colour: str,
    counts: Sequence[int],
) -> None:
    curve = [line for line in lines if line["labels"] is not None]
    for line in lines:
        if line["labels"] is None:
            spread = line["scores"][score]
            axis.axhline(spread["mean"], color=colour, ls="--", lw=1.2, label=row.name)
            axis.axhspan(spread["low"], spread["high"], color=colour, alpha=0.08)
    if curve:
        spreads = [line["scores"][score] for line in curve]
        means = [spread["mean"] for spread in spreads]
        errors = [
            [spread["mean"] - spread["low"] for spread in spreads],
            [spread["high"] - spread["mean"] for spread in spreads],
        ]
        where = [line["labels"] for line in curve]
        axis.errorbar(where, means, errors, color=colour, marker="o", capsize=3, label=row.name)
