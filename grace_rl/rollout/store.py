"""The rollout store: one parquet file per logged step, one row per rationale.

The file of step 10 is `<run>/rollouts/step-000010.parquet`.

| column | type | |
|---|---|---|
| `step` | int64 | optimizer step that the rollout trains |
| `example`, `group` | int64 | row number in the data set; rollouts of one text share the group |
| `role` | string | `query`, `positive`, `negative`, ... |
| `text`, `rationale` | string | what was read, what was written |
| `token_ids` | list of int32 | the rationale as sampled, with its end token |
| `truncated` | bool | the rationale never ended |
| `advantage` | float32 | null for anchors, which are never trained |
| `step_scores` | list of float32 | one per prefix; null without a step-wise reward |
| `step_ends` | list of int32 | tokens of each prefix; null like `step_scores` |
| `token_advantages` | list of float32 | null where all tokens have `advantage` |
| `embedding` | list of float32 | L2-normalised |
| `side` | int64 | texts of one example with the same side mean the same |
| `prompt` | string | as the policy read it |
| `row_columns` | string | the data row's other fields, as JSON |
| `total` | float32 | of all rewards, gates applied |
| `token_values` | list of float32 | what the critic of PPO said before each token |
| `token_kl` | list of float32 | the KL to the reference, of each token |
| `prefix_embeddings` | list of float32 | (K+1, D), prefix by prefix; null like `step_ends` |
| `reward/<label>` | float32 | null: not scored |

What belongs to a whole step (how credit was given, the seed) is JSON in the file's metadata. With
both a replay gives the run's own scores and advantages again (grace_rl/reward/replay.py).

Embeddings are float32 and not float16: not every parquet reader knows half precision, and only
logged steps are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from grace_rl.errors import UserError, reading
from grace_rl.run.files import whole_file
from grace_rl.run.records import cut_rollouts, rollout_files, step_file

__all__ = ["cut_rollouts", "read_rollouts", "rollout_files", "write_rollouts"]

REWARD = "reward/"
NOTES = b"grace_rl"  # the key of what belongs to a whole step, in a file's metadata
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("example", pa.int64(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("rationale", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("advantage", pa.float32()),
        pa.field("step_scores", pa.list_(pa.float32())),
        pa.field("step_ends", pa.list_(pa.int32())),
        pa.field("token_advantages", pa.list_(pa.float32())),
        pa.field("embedding", pa.list_(pa.float32())),
        pa.field("side", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("row_columns", pa.string()),
        pa.field("total", pa.float32()),
        pa.field("token_values", pa.list_(pa.float32())),
        pa.field("token_kl", pa.list_(pa.float32())),
        pa.field("prefix_embeddings", pa.list_(pa.float32())),
    ]
)


def write_rollouts(run: str | Path, step: int, rollouts: pa.Table | Mapping[str, Any]) -> Path:
    """Keep the rollouts of one step; a file of the same step is replaced.

    Args:
        run: The run directory.
        step: Optimizer step, at least 0; goes into the file's name and its `step` column.
        rollouts: From `Rollouts.to_arrow`, or the columns by name but for `step`, as
            `arrow_table` takes them.

    Returns:
        The file, which appears whole or not at all.

    Raises:
        ValueError: Unknown or missing columns, or unequal lengths; all in one message.
    """
    if not isinstance(rollouts, pa.Table):
        rollouts = arrow_table({"step": [step] * len(rollouts["text"]), **rollouts})
    path = step_file(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        pq.write_table(rollouts, unfinished, compression="zstd")
    return path


def arrow_table(columns: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> pa.Table:
    """A table as it is stored.

    Args:
        columns: By name, all equally long: lists, arrays, or None for nulls. Nullable ones may be
            left out; NaN in plain float32 columns (`advantage`, `reward/<label>`) becomes null.
        notes: What belongs to the step as a whole, as JSON has it.

    Raises:
        ValueError: Unknown or missing columns, or unequal lengths; all in one message.
    """
    _check(columns)
    count = len(columns["text"])
    schema = _schema(columns)
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if field.type == pa.string() and values is not None:
            # A lone surrogate (JSON can hold one) has no UTF-8 form.
            values = [v if v is None else v.encode("utf-8", "replace").decode() for v in values]
        try:
            if values is None:
                array = pa.nulls(count, field.type)
            elif isinstance(values, pa.Array):
                array = values.cast(field.type)
            else:  # from_pandas: NaN is null
                array = pa.array(values, field.type, from_pandas=field.type == pa.float32())
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"rollouts: column {field.name!r}: {error}") from error
        arrays.append(array)
    if notes is not None:
        schema = schema.with_metadata({NOTES: json.dumps(notes).encode()})
    return pa.Table.from_arrays(arrays, schema=schema)


def read_rollouts(
    run: str | Path, steps: Iterable[int] | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """The stored rollouts as one table, in the order of steps; safe while the run is still writing.

    Args:
        run: The run directory.
        steps: Only these steps.
        columns: Only these columns, in this order. The default is all, rewards last; a reward that
            some steps do not have is null there.

    Raises:
        UserError: The folder does not exist, a step or a column is not there, or a file is broken.
    """
    files = rollout_files(run)
    if steps is not None:
        wanted = sorted(set(steps))
        if missing := [step for step in wanted if step not in files]:
            there = _some(sorted(files))
            raise UserError(
                f"{run}: no rollouts of step {', '.join(map(str, missing))}; there are: {there}"
            )
        files = {step: files[step] for step in wanted}
    opened: list[pq.ParquetFile] = []
    streams: list[BinaryIO] = []
    for path in files.values():
        with suppress(FileNotFoundError):  # cut off by a resuming run since the folder was listed
            streams.append(path.open("rb"))
            with reading(path, "rollouts"):
                opened.append(pq.ParquetFile(streams[-1]))
    names = dict.fromkeys(name for file in opened for name in file.schema_arrow.names)
    schema = _schema(names)
    if columns is not None:
        if unknown := [name for name in columns if name not in schema.names]:
            raise UserError(
                f"{run}: no column {', '.join(unknown)}; there are: {', '.join(schema.names)}"
            )
        schema = pa.schema([schema.field(name) for name in columns])
    tables = [schema.empty_table()]
    for stream, file in zip(streams, opened, strict=True):
        with stream, reading(stream.name, "rollouts"), file:
            own = [name for name in schema.names if name in file.schema_arrow.names]
            table, rows = file.read(columns=own), file.metadata.num_rows
            arrays = [table[f.name] if f.name in own else pa.nulls(rows, f.type) for f in schema]
            tables.append(pa.Table.from_arrays(arrays, schema=schema))
    notes = opened[0].schema_arrow.metadata if len(opened) == 1 else None
    return pa.concat_tables(tables).replace_schema_metadata(notes)


def _schema(names: Iterable[str]) -> pa.Schema:
    """`SCHEMA`, and the rewards among these names."""
    rewards = [pa.field(name, pa.float32()) for name in names if name.startswith(REWARD)]
    return pa.schema([*SCHEMA, *rewards])


def _check(columns: Mapping[str, Any]) -> None:
    names = [field.name for field in SCHEMA]
    problems = [
        f"missing column {f.name!r}" for f in SCHEMA if not f.nullable and f.name not in columns
    ]
    problems += [
        f"unknown column {name!r}; known are {', '.join(names)} and reward/<label>"
        for name in columns
        if name not in names and not name.startswith(REWARD)
    ]
    lengths = {name: len(values) for name, values in columns.items() if values is not None}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        problems.append(f"columns must be equally long, but have these many values: {listed}")
    if any(step < 0 for step in columns.get("step") or []):
        problems.append("step must be at least 0")
    if problems:
        step = next(iter(columns.get("step") or ["?"]))
        raise ValueError(f"rollouts of step {step}: {'; '.join(problems)}")


def _some(steps: list[int]) -> str:
    if len(steps) <= 12:
        return ", ".join(map(str, steps)) or "none yet"
    return f"{', '.join(map(str, steps[:10]))}, ... {steps[-1]} ({len(steps)} steps)"
