"""Runs elsewhere: folders of runs, and addresses of fsspec, which are read and never written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from grace_rl.errors import UserError
from grace_rl.inspect import Run
from grace_rl.inspect import remote as elsewhere
from grace_rl.inspect.notes import notes, write_note
from grace_rl.inspect.remote import RemoteRun, open_runs


@pytest.fixture
def memory(run_folder: Path) -> Any:
    """The written run at memory://runs/written."""
    system = fsspec.filesystem("memory")
    system.put(str(run_folder), "/runs/written", recursive=True)
    yield system
    system.rm("/runs", recursive=True)


def test_a_run_at_an_address_is_as_one_here(
    memory: Any,
    run_folder: Path,
    add_step: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(elsewhere, "LOOK_AGAIN", 0.0)
    memory.pipe("/runs/written/model/model.safetensors", b"large")
    before = memory.find("/runs")
    (run,) = open_runs(["memory://runs/written"])
    own = Run(run_folder)
    assert run.name == "written" and run.count() == own.count()
    assert run.recipe() == own.recipe() and len(run.metrics()) == len(own.metrics())
    assert not (run.path / "model").exists()
    write_note(run, 1, 0, {"flag": "good"})
    assert len(notes(run)) == 1 and (tmp_path / "written.inspect").is_dir()
    assert memory.find("/runs") == before
    add_step(run_folder, 4)
    new = "rollouts/step-000004.parquet"
    memory.pipe(f"/runs/written/{new}", (run_folder / new).read_bytes())
    memory.rm("/runs/written/rollouts/step-000001.parquet")
    run.stamp()
    assert run.steps() == [2, 3, 4]


def test_a_folder_of_runs_opens_all(run_folder: Path) -> None:
    (run_folder.parent / "no run").mkdir()
    assert [run.name for run in open_runs([str(run_folder.parent)])] == ["written"]


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(UserError) as caught:
        open_runs(["memory://nowhere/x", "nosuch://x/y", "/nowhere/at/all"])
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="nowhere"):
        RemoteRun("memory://nowhere/x")
