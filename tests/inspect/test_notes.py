"""Flags and notes: beside the run, merged over readers, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grace_rl.cli import main
from grace_rl.errors import UserError
from grace_rl.inspect import Run
from grace_rl.inspect.notes import export, flags, notes, preference_pairs, sft_rows, write_note


def test_notes_lie_beside_the_run_and_readers_merge(run_folder: Path) -> None:
    run = Run(run_folder)
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    write_note(run, 1, 0, {"flag": "good", "note": "names the fox"}, by="ada")
    write_note(run, 1, 0, {"flag": "bad", "label": "short"}, by="bob")
    write_note(run, 1, 0, {"flag": "bad", "label": "too short"}, by="bob")
    write_note(run, 2, 3, {"flag": "good"}, by="ada")
    write_note(run, 2, 4, {"flag": "good"}, by="ada")
    write_note(run, 2, 4, {}, by="ada")  # taken back
    (run.beside / "notes" / "eve.jsonl").write_text("{broken\n[]\n")
    found = notes(run)
    assert list(zip(found["by"], found["label"], strict=True)) == [
        ("ada", ""),
        ("bob", "too short"),
        ("ada", ""),
    ]
    assert flags(run) == {(2, 3): "good"}  # one voice against one is none
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before
    with pytest.raises(UserError, match="flag"):
        write_note(run, 1, 0, {"flag": "maybe"})


def test_notes_belong_to_the_words_that_they_were_made_on(
    run_folder: Path, add_step: Callable[..., None]
) -> None:
    run = Run(run_folder)
    write_note(run, 1, 0, {"flag": "good"}, by="ada")
    add_step(run_folder, 1, [f"another {i}" for i in range(8)])
    assert notes(Run(run_folder)).empty


def test_flagged_rollouts_become_rows_pairs_and_tests(run_folder: Path, tmp_path: Path) -> None:
    run = Run(run_folder)
    group = run.group(1, 0)
    best, worst = group.iloc[0], group.iloc[-1]
    write_note(run, 1, int(best["row"]), {"flag": "good"})
    assert sft_rows(run) == [{"text": best["text"], "rationale": best["rationale"]}]
    pair = {"prompt": best["text"], "chosen": best["rationale"], "rejected": worst["rationale"]}
    assert preference_pairs(run) == [pair]
    file = tmp_path / "pairs.jsonl"
    assert main(["inspect", str(run_folder), "--export", "pairs", str(file)]) == 0
    assert json.loads(file.read_text()) == pair
    assert main(["inspect", str(run_folder), "--export", "pairs", str(file)]) == 2
    count = export(run, "tests", tmp_path / "tests")
    kept = pq.read_table(tmp_path / "tests" / "rollouts" / "step-000001.parquet")
    assert len(kept) == count == 3  # the group, and the anchor of its row
    assert Run(tmp_path / "tests").group(1, 0)["rationale"].tolist() == group["rationale"].tolist()
