"""The texts nearest to a rollout, by the vectors that its step stored."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from grace_rl.errors import UserError
from grace_rl.inspect.run import Run

COLUMNS = ["text", "role", "example", "rationale", "advantage", "embedding"]


def pool_of_step(run: Run, step: int) -> tuple[pd.DataFrame, np.ndarray]:
    """The distinct texts of a step and a unit vector of each, the mean of its rollouts'.

    Returns:
        A table with `text`, `role`, `example` and `rationale`, the best one by advantage; and
        (N, H) float32.

    Raises:
        UserError: Nothing is stored of that step, or no embeddings are.
    """
    stored = run.step_table(step, COLUMNS)
    vectors = _vectors(stored["embedding"].combine_chunks(), run, step)
    texts = stored.select(COLUMNS[:-1]).to_pandas()
    best = texts.sort_values("advantage", ascending=False, kind="stable").drop_duplicates("text")
    pool = best.loc[sorted(best.index), COLUMNS[:4]].reset_index(drop=True)
    sums = np.zeros((len(pool), vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, pd.Index(pool["text"]).get_indexer(texts["text"]), vectors)
    return pool, sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def nearest_by_rationale(run: Run, step: int, row: int) -> pd.DataFrame:
    """Where a rollout's own vector lies among the other texts of its step; see `ranked`."""
    pool, vectors = pool_of_step(run, step)
    rollout = run.rollout(step, row)
    own = np.array(rollout["embedding"], dtype=np.float32)
    return ranked(pool, vectors @ own, rollout["text"], rollout["example"])


def ranked(
    pool: pd.DataFrame, cosines: np.ndarray, text: str, example: int | None = None
) -> pd.DataFrame:
    """A pool in falling order of cosine, without the text itself.

    Args:
        pool: Columns `text`, `role`, `example`, and maybe `rationale`.
        cosines: (N,).
        text: The text whose neighbours these are.
        example: Its row: `same_row` marks the texts that belong with it, the counterpart and the
            hard negative.

    Returns:
        `rank` from 1, `cosine`, `text`, `role`, `example`, `same_row`, and maybe `rationale`.
    """
    table = pool.assign(cosine=np.asarray(cosines, dtype=float))
    table = table[table["text"] != text].sort_values("cosine", ascending=False, kind="stable")
    table = table.assign(rank=np.arange(1, len(table) + 1), same_row=table["example"] == example)
    columns = ["rank", "cosine", "text", "rationale", "role", "example", "same_row"]
    return table[[name for name in columns if name in table]].reset_index(drop=True)


def _vectors(stored: pa.ListArray, run: Run, step: int) -> np.ndarray:
    """(N, H) float32."""
    if not len(stored) or stored.null_count:
        raise UserError(f"{run.path}: step {step} was stored without embeddings")
    if pc.count_distinct(pc.list_value_length(stored)).as_py() > 1:
        raise UserError(f"{run.path}: step {step} holds embeddings of several lengths")
    numbers = stored.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(numbers, dtype=np.float32).reshape(len(stored), -1)
