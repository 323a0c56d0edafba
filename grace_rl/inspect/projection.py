"""A map: the vectors of the same texts in two dimensions, before training and at each stored step.

The two axes are those along which the first and the last step's vectors spread most (principal
components, by SVD), and the same for all steps, so that what moves has moved. Cosines in all
dimensions decide the lines; a flat picture of them is never exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from grace_rl.errors import UserError
from grace_rl.inspect.neighbours import pool_of_step
from grace_rl.inspect.run import Run

FRAMES = 24  # steps at most
TEXTS = 64  # at most, of a step without a panel
SIZE, MARGIN = 480, 14


@dataclass(frozen=True)
class Dot:
    """A text's vector: its place, what was written, and the places of its positive and its hardest
    negative (None where there is none)."""

    x: float
    y: float
    text: str
    rationale: str
    role: str
    side: int
    row: int | None
    positive: tuple[float, float] | None
    negative: tuple[float, float] | None


@dataclass(frozen=True)
class Frame:
    """All texts at one step; `closer` is the share that are nearer to their positive than to any
    negative."""

    step: int
    dots: list[Dot]
    closer: float


def frames(run: Run) -> tuple[list[Frame], bool]:
    """The map of a run, step by step, and whether it is that of its panel. A run without a panel
    has the texts of its stored steps, others at each.

    Raises:
        UserError: A file is damaged.
    """
    steps = run.panel_steps()
    tables = [run.panel([step]) for step in _some(steps)]
    if not tables:
        tables = [
            table for step in _some(run.steps()) if (table := _of_step(run, step)) is not None
        ]
    if not tables:
        return [], False
    vectors = [np.stack(table["embedding"].to_list()) for table in tables]
    if len({part.shape[1] for part in vectors}) > 1:
        raise UserError(f"{run.path}: embeddings of several lengths")
    ends = np.concatenate([vectors[0], vectors[-1]])
    middle = ends.mean(0)
    axes = np.linalg.svd(ends - middle, full_matrices=False)[2][:2]
    flat = [(part - middle) @ axes.T for part in vectors]
    reach = max(float(np.abs(part).max()) for part in flat) or 1.0
    rows = run.best_rows(list({text for table in tables for text in table["text"]}))
    made = []
    for table, part, full in zip(tables, flat, vectors, strict=True):
        places = MARGIN + (part / reach + 1) / 2 * (SIZE - 2 * MARGIN)
        made.append(_frame(table, places, full @ full.T, rows))
    return made, bool(steps)


def _frame(
    table: pd.DataFrame, places: np.ndarray, cosines: np.ndarray, rows: dict[tuple[int, str], int]
) -> Frame:
    example, side = table["example"].to_numpy(), table["side"].to_numpy()
    text, step = table["text"].to_numpy(), int(table["step"].iloc[0])
    together = (example[:, None] == example) & (side[:, None] == side)
    positive = np.where(together & (text[:, None] != text), cosines, -np.inf)
    negative = np.where(~together & (text[:, None] != text), cosines, -np.inf)
    at = [(round(float(x), 1), round(float(y), 1)) for x, y in places]
    dots = []
    for i, row in enumerate(table.to_dict("records")):
        best = [
            at[int(of[i].argmax())] if np.isfinite(of[i].max()) else None
            for of in (positive, negative)
        ]
        stored = rows.get((step, row["text"]))
        x, y = at[i]
        said = (row["text"], row["rationale"], row["role"], int(row["side"]))
        dots.append(Dot(x, y, *said, stored, *best))
    known = np.isfinite(positive.max(1))
    closer = positive.max(1)[known] > negative.max(1)[known]
    return Frame(step, dots, float(closer.mean()) if known.any() else float("nan"))


def _of_step(run: Run, step: int) -> pd.DataFrame | None:
    """Texts of a stored step as a panel would have them; None where it has no vectors."""
    try:
        pool, vectors = pool_of_step(run, step)
    except UserError:
        return None
    pool, vectors = pool.head(TEXTS), vectors[:TEXTS]
    negative = pool["role"].str.startswith("negative").astype(int)
    return pool.assign(step=step, side=negative, embedding=list(vectors))


def _some(steps: list[int]) -> list[int]:
    """At most `FRAMES` of them, the first and the last among them.

    >>> _some([0, 5, 10])
    [0, 5, 10]
    """
    if len(steps) <= FRAMES:
        return steps
    return [steps[round(i * (len(steps) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
