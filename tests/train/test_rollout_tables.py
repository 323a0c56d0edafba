"""Rollout tables reach the trackers that `report_to` names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_callback import CallbackHandler

from grace_rl.rollout.store import write_rollouts
from grace_rl.run.directory import RunDirectory
from grace_rl.train.rollout_tables import NAME, RolloutTables, chosen_rows, markdown

HOSTILE = "a|b <script>x</script> [l](http://evil.example)\n![i](http://evil.example)"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    columns: dict[str, Any] = {
        "example": [0] * 6,
        "group": [0, 0, 0, 1, 1, 1],
        "role": ["query"] * 6,
        "text": ["one"] * 3 + ["two"] * 3,
        "rationale": ["low", "high", "middle", HOSTILE, "b", "c"],
        "token_ids": [[1]] * 6,
        "truncated": [False] * 6,
        "advantage": [-1.0, 1.0, 0.0, 0.5, float("nan"), -0.5],
        "reward/length": [0.1] * 6,
    }
    write_rollouts(tmp_path, 5, columns)
    return RunDirectory(tmp_path)


def log(run: RunDirectory, step: int, report_to: list[str], *callbacks: Any) -> RolloutTables:
    handler = CallbackHandler(list(callbacks), None, None, None, None)
    tables = RolloutTables(run, handler)
    args: Any = SimpleNamespace(report_to=report_to)
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=True)
    for _ in range(2):  # transformers logs twice at the end
        tables.on_log(args, state, None, {"loss": 1.0})  # type: ignore[arg-type]
    return tables


def test_whole_groups_best_first_without_anchors(run: RunDirectory) -> None:
    from grace_rl.rollout.store import read_rollouts

    table = read_rollouts(run.path)
    assert [r["rationale"] for r in chosen_rows(table)] == ["high", "middle", "low", HOSTILE, "c"]
    assert len(chosen_rows(table, limit=4)) == 3  # the second group would not fit whole
    assert len(chosen_rows(table, limit=1)) == 3


def test_markdown_cells_hold_no_markup(run: RunDirectory) -> None:
    text = markdown([{"rationale": HOSTILE}])
    assert len(text.splitlines()) == 3
    assert text.splitlines()[2].count("|") == 2
    assert not set(text.splitlines()[2]) & set("<>[]()!")


def test_tensorboard_gets_a_table_for_each_stored_step(run: RunDirectory, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = tensorboard.SummaryWriter(str(tmp_path / "log"))
    callback = SimpleNamespace(tb_writer=writer)
    log(run, 5, ["tensorboard"], callback)
    log(run, 6, ["tensorboard"], callback)  # nothing is stored of step 6
    writer.close()
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0})
    events.Reload()
    tables = events.Tensors(f"{NAME}/text_summary")
    assert [table.step for table in tables] == [5]
    text = tables[0].tensor_proto.string_val[0].decode()
    assert "| 5 | 0 | query | one | high |" in text and "reward/length" in text


def test_trackio_gets_the_rows(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = pytest.importorskip("trackio", reason="needs trackio")
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(trackio, "log", lambda values, **_: sent.append(values))
    log(run, 5, ["trackio"])
    assert len(sent) == 1 and isinstance(sent[0][NAME], trackio.Table)
    assert sent[0]["train/global_step"] == 5


def test_wandb_keeps_the_tables_offline(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(run, 5, ["wandb"])  # no run is open: nothing is sent, nothing raised
    with wandb.init(project="tables", mode="offline", dir=str(tmp_path)):
        log(run, 5, ["wandb"])
        log(run, 6, ["wandb"])  # nothing is stored of step 6
    (file,) = tmp_path.rglob(f"{NAME}_*.table.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    assert table["columns"][:5] == ["step", "group", "role", "text", "rationale"]
    assert [row[4] for row in table["data"]] == ["high", "middle", "low", HOSTILE, "c"]


@pytest.mark.parametrize("asked", [[], ["none"]])
def test_nothing_is_sent_that_nobody_asked_for(
    run: RunDirectory, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = pytest.importorskip("trackio", reason="needs trackio")
    sent: list[Any] = []
    monkeypatch.setattr(trackio, "log", lambda *values, **_: sent.append(values))
    writer = SimpleNamespace(add_text=lambda *values, **_: sent.append(values))
    log(run, 5, asked, SimpleNamespace(tb_writer=writer))
    assert sent == []
