"""Inputs are told apart by their content, never by name, size or date."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grace_rl.run.identity import (
    ABSENT,
    file_digest,
    folder_digest,
    input_digests,
    path_digest,
    rows_digest,
)


def test_same_size_and_date_but_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("ab")
    before, when = file_digest(path), path.stat()
    path.write_text("ba")
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert file_digest(path) != before


def test_folder_knows_names_bytes_and_places_and_no_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    seen = {folder_digest(tmp_path)}
    for change in (
        lambda: (tmp_path / "a" / "one").write_text("2"),
        lambda: (tmp_path / "a" / "one").rename(tmp_path / "a" / "two"),
        lambda: (tmp_path / "a" / "two").rename(tmp_path / "two"),
    ):
        change()
        seen.add(folder_digest(tmp_path))
    assert len(seen) == 4
    (tmp_path / ".lock").write_text("x")
    assert folder_digest(tmp_path) in seen
    assert path_digest(tmp_path / "nothing") == ABSENT


def test_rows_are_told_apart_by_order_and_by_where_one_ends() -> None:
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    assert rows_digest(rows) == rows_digest([dict(reversed(row.items())) for row in rows])
    assert rows_digest(rows) != rows_digest(rows[::-1])
    assert rows_digest([["a"], ["b"]]) != rows_digest([["a", "b"]])


def test_inputs_of_a_recipe_are_its_local_files_and_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "docs").mkdir()
    (tmp_path / "guide.npy").write_text("1")
    (tmp_path / "mine.py").write_text("")
    recipe = {
        "model_name_or_path": "model",
        "false_negatives": {"guide": "guide.npy"},
        "rewards": [{"name": "mine.py"}, {"name": "r", "model": str(tmp_path / "model")}],
        "instruction": "docs",
        "output_dir": "model",
        "odd": "a\0b" + "x" * 5000,
    }
    assert sorted(input_digests(recipe, skip=lambda key: key == "output_dir")) == [
        "false_negatives.guide",
        "model_name_or_path",
        "rewards.2.model",
    ]
