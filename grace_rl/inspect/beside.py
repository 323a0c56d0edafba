"""What looking at a run leaves: beside it, in `<run>.inspect`, and never in it.

Credit by word lies in `credit/`, a file for each step; what readers say of rollouts in `notes/`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace_rl.errors import reading
from grace_rl.inspect.run import Run
from grace_rl.rollout.store import rollout_files
from grace_rl.run.files import whole_file
from grace_rl.run.records import step_file

ABOUT = b"grace_rl_credit"  # the key of what the numbers belong to, in a file's metadata


def keep_credit(run: Run, step: int, table: pd.DataFrame, said: str) -> Path:
    """Write a step's credit beside its run; an older one of that step is replaced."""
    path = step_file(run.beside, step, "credit")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"of": rollouts_stamp(run, step), "said": said}
    kept = pa.Table.from_pandas(table, preserve_index=False)
    kept = kept.replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    with whole_file(path) as unfinished:
        pq.write_table(kept, unfinished, compression="zstd")
    return path


def kept_credit(run: Run, step: int) -> tuple[pd.DataFrame, str] | None:
    """What `keep_credit` left of a step, and how it was read; None if there is nothing, or if it
    belongs to rollouts that were there before."""
    path = step_file(run.beside, step, "credit")
    if not path.is_file():
        return None
    with reading(path, "credit"):
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))
        if about.get("of") != rollouts_stamp(run, step):
            return None
        return table.replace_schema_metadata(None).to_pandas(), str(about.get("said", ""))


def rollouts_stamp(run: Run, step: int) -> list[int]:
    """Size and time of a step's file, from which follows whether it is the same one."""
    files = rollout_files(run.path)
    about = files[step].stat() if step in files else None
    return [] if about is None else [about.st_size, about.st_mtime_ns]


def against_siblings(table: pd.DataFrame) -> pd.DataFrame:
    """Credit with `only`: whether no other rollout of the group has the word, in any case."""
    words = table["word"].str.casefold()
    rollouts = table["row"].groupby([table["group"], words]).transform("nunique")
    several = table.groupby("group")["row"].transform("nunique") > 1
    return table.assign(only=(rollouts == 1) & several)
