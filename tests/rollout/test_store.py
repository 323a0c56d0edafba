"""The rollout store: what is written is read back whole, also from a running or killed run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from grace_rl.errors import UserError
from grace_rl.rollout.store import (
    SCHEMA,
    cut_rollouts,
    read_rollouts,
    rollout_files,
    write_rollouts,
)


def rollouts(count: int = 3, **changes: Any) -> dict[str, list[Any]]:
    return {
        "example": list(range(count)),
        "group": list(range(count)),
        "role": ["query"] * count,
        "text": ["ein Fuchs 🦊"] * count,
        "rationale": ["red, small"] * count,
        "token_ids": [[1, 2, 3]] * count,
        "truncated": [False] * count,
        "advantage": [0.5] * count,
        "embedding": [[0.6, 0.8]] * count,
        **changes,
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    columns = rollouts(
        2,
        step_scores=[[0.25, 0.5], None],
        step_ends=[[0, 3], None],
        token_advantages=[[0.5, 0.5, -0.5], None],
        advantage=[0.5, None],
    ) | {"reward/length": [0.5, None]}
    path = write_rollouts(tmp_path, 10, columns)
    assert path == tmp_path / "rollouts" / "step-000010.parquet"
    table = read_rollouts(tmp_path)
    assert table.schema.names == [*SCHEMA.names, "reward/length"]
    read = table.to_pydict()
    assert read.pop("step") == [10, 10]
    assert [pytest.approx(v) for v in read.pop("embedding")] == columns.pop("embedding")
    assert {name: read[name] for name in columns} == columns
    assert pq.read_schema(path).field("embedding").type == SCHEMA.field("embedding").type


def test_nan_is_null_and_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    columns = rollouts(2, text=["a\ud800b", "c"]) | {"reward/length": [float("nan"), 1.0]}
    write_rollouts(tmp_path, 1, columns)
    read = read_rollouts(tmp_path, columns=["reward/length", "text"])
    assert read.schema.names == ["reward/length", "text"]
    assert read.to_pydict() == {"reward/length": [None, 1.0], "text": ["a?b", "c"]}


def test_steps_with_different_rewards_are_one_table(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 20, rollouts(1) | {"reward/new": [2.0]})
    write_rollouts(tmp_path, 3, rollouts(1) | {"reward/old": [1.0]})
    write_rollouts(tmp_path, 1_000_000, rollouts(1))
    read = read_rollouts(tmp_path)
    assert read["step"].to_pylist() == [3, 20, 1_000_000]
    assert read["reward/old"].to_pylist() == [1.0, None, None]
    assert read["reward/new"].to_pylist() == [None, 2.0, None]
    assert read_rollouts(tmp_path, steps=[20])["step"].to_pylist() == [20]
    cut_rollouts(tmp_path, 3)
    assert list(rollout_files(tmp_path)) == [3]


def test_unfinished_files_are_not_seen(tmp_path: Path) -> None:
    assert read_rollouts(tmp_path).num_rows == 0
    write_rollouts(tmp_path, 1, rollouts())
    (tmp_path / "rollouts" / ".step-000002.parquet.7.writing").write_bytes(b"PAR1 half")
    assert read_rollouts(tmp_path).num_rows == 3


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 1, rollouts())
    with pytest.raises(ValueError, match="column 'token_ids'"):
        write_rollouts(tmp_path, 1, rollouts(token_ids=[["x"]] * 3))
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-000001.parquet"]
    assert read_rollouts(tmp_path).num_rows == 3


def test_all_mistakes_are_told_together(tmp_path: Path) -> None:
    columns = rollouts(2, text=["only one"], rewards=[1.0, 2.0])
    del columns["role"]
    with pytest.raises(ValueError) as caught:
        write_rollouts(tmp_path, 4, columns)
    for part in (
        "step 4",
        "missing column 'role'",
        "unknown column 'rewards'",
        "equally long",
        "text 1",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "rollouts").exists()


def test_reading_says_what_there_is(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 5, rollouts())
    with pytest.raises(UserError, match="step 6; there are: 5"):
        read_rollouts(tmp_path, steps=[5, 6])
    with pytest.raises(UserError, match="no column reward/x"):
        read_rollouts(tmp_path, columns=["reward/x"])
    with pytest.raises(UserError, match="no such run directory"):
        read_rollouts(tmp_path / "nowhere")


WRITER = """
import sys
from grace_rl.rollout.store import write_rollouts
n = 2000
columns = dict(
    example=[0] * n, group=[0] * n, role=["query"] * n, text=["text " * 20] * n,
    rationale=["words " * 20] * n, token_ids=[[1] * 32] * n, truncated=[False] * n,
    advantage=[0.0] * n, embedding=[[0.5] * 32] * n,
)
for step in range(10_000):
    write_rollouts(sys.argv[1], step % 5, columns)
    if step == 0:
        print("written", flush=True)
"""


def test_killed_while_writing_every_visible_file_is_whole(tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline()
            time.sleep(moments.uniform(0.05, 0.3))
            writer.send_signal(signal.SIGKILL)
        table = read_rollouts(tmp_path)
        assert table.num_rows == 2000 * len(rollout_files(tmp_path)) > 0
