"""Columns between torch, Python and Arrow; float32 stays exactly as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor


def row_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' own fields as columns; a field that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def row_texts(columns: Mapping[str, list[Any]], count: int) -> list[str] | None:
    """Each row's other fields as JSON; those that JSON would change are left out."""
    if not columns:
        return None
    texts: dict[int, tuple[Any, str | None]] = {}  # rollouts of a row share their values

    def text(value: Any) -> str | None:
        if id(value) not in texts:
            try:
                written = json.dumps(value)
                same = json.loads(written) == value
            except (TypeError, ValueError, RecursionError):
                written, same = "", False
            texts[id(value)] = value, written if same else None
        return texts[id(value)][1]

    kept = {
        name: written
        for name, values in columns.items()
        if None not in (written := [text(value) for value in values])
    }
    return [
        "{" + ", ".join(f"{json.dumps(name)}: {kept[name][i]}" for name in kept) + "}"
        for i in range(count)
    ]


def lists(values: Tensor | None, there: Tensor | None = None) -> pa.Array | None:
    """(N, ...) as one list each, null where not `there`."""
    if values is None:
        return None
    flat = values.detach().cpu().reshape(len(values), -1)
    offsets = np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]
    mask = None if there is None else pa.array((~there).numpy())
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(flat.contiguous().view(-1).numpy()), mask=mask
    )


def prefix_columns(
    data: Mapping[str, pa.Array], token_ids: list[list[int]], embeddings: Tensor
) -> dict[str, Any]:
    """The columns about prefixes; an anchor, stored without, is whole from the first prefix on."""
    ends, prefixes = matrix(data["step_ends"]), matrix(data["prefix_embeddings"])
    if ends is None or prefixes is None:
        return {}
    lengths = torch.tensor([len(ids) for ids in token_ids])
    absent = ends.isnan()
    ends = torch.where(absent, lengths[:, None], ends).long()
    prefixes = torch.where(absent[..., None], embeddings[:, None], prefixes.view(*ends.shape, -1))
    return {
        "prefix_ends": ends,
        "prefix_embeddings": prefixes,
        "step_scores": matrix(data["step_scores"]),
    }


def matrix(column: pa.Array) -> Tensor | None:
    """Equally long lists as (N, M) float32, null lists NaN; None where all are null."""
    there = torch.tensor(column.is_valid().to_pylist())
    if not there.any():
        return None
    values = torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    rows = values.view(int(there.sum()), -1)
    matrix = torch.full((len(column), rows.shape[1]), torch.nan)
    matrix[there] = rows
    return matrix


def padded(column: pa.Array, empty: float) -> Tensor | None:
    """Lists of numbers as (N, T) float32, `empty` after their end; None where all are null."""
    rows = column.to_pylist()
    width = max((len(row) for row in rows if row is not None), default=None)
    if width is None:
        return None
    return torch.tensor([(row or []) + [empty] * (width - len(row or [])) for row in rows])


def vector(column: pa.Array) -> Tensor:
    """(N,) float32, null NaN."""
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).astype(np.float32))
