"""What `Run` answers, also while the run is still being written."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from grace_rl.errors import UserError
from grace_rl.inspect import Filter, Run, database, views
from grace_rl.inspect.checkpoints import Checkpoint, checkpoints
from grace_rl.inspect.neighbours import nearest_by_rationale, pool_of_step
from grace_rl.inspect.remote import open_runs
from grace_rl.inspect.run import HEAVY
from grace_rl.rollout.store import cut_rollouts
from grace_rl.run.checkpoints import mark_complete

AddStep = Callable[..., None]


def look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOOK_AGAIN", 0.0)


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, 27),
        ({"step": 2}, 9),
        ({"step": (2, None)}, 18),
        ({"step": (None, 1)}, 9),
        ({"role": "query"}, 12),
        ({"text": "FOX"}, 6),
        ({"text": "rollout 3"}, 2),
        ({"text": "%"}, 0),
        ({"truncated": True}, 3),
        ({"empty": True}, 0),
        ({"empty": False, "step": 1}, 9),
        ({"example": 0, "group": 0}, 6),
        ({"score": "contrastive >= 1.2, tokens < 4"}, 9),
        ({"score": "advantage < 0", "step": 1}, 4),
    ],
)
def test_each_filter_keeps_what_fits(run_folder: Path, filters: dict, count: int) -> None:
    run = Run(run_folder)
    assert run.count(**filters) == len(run.rollouts(**filters)) == count
    again = Filter.from_query(dict(parse_qsl(Filter(**filters).query())))
    assert run.count(again) == count


def test_heavy_columns_come_only_when_asked_and_belong_to_their_rows(run_folder: Path) -> None:
    run = Run(run_folder)
    assert not set(run.rollouts().columns) & set(HEAVY)
    table = run.rollouts(columns=["token_ids", "row"], sort="advantage", descending=True)
    assert [ids[-1] - 3 for ids in table["token_ids"]] == list(table["row"])
    assert len(table) == 27 and table["row"].iloc[0] == 6


def test_sorting_paging_and_anchors_last(run_folder: Path) -> None:
    run = Run(run_folder)
    whole = run.rollouts(sort="advantage", descending=True)
    assert whole["advantage"].dropna().is_monotonic_decreasing
    assert whole["advantage"].tail(3).isna().all()
    pages = [run.rollouts(sort="advantage", descending=True, limit=10, offset=n)["row"].tolist()
             for n in (0, 10, 20)]  # fmt: skip
    assert sum(pages, []) == whole["row"].tolist()


def test_groups_say_best_worst_and_spread(run_folder: Path) -> None:
    run = Run(run_folder)
    groups = run.groups(step=1)
    assert len(groups) == run.count_groups(step=1) == 4  # the anchor is in none
    assert groups["best"].tolist() == [f"step 1, rollout {i}" for i in (0, 2, 4, 6)]
    assert groups["spread"].iloc[0] == pytest.approx((1.0 + 1.1) / 2, abs=1e-5)
    best = run.group(1, 0)
    assert best["advantage"].is_monotonic_decreasing and len(best) == 2
    with pytest.raises(UserError, match="no group 77 in step 1"):
        run.group(1, 77)


def test_one_text_through_training_is_its_best_rationale_at_each_step(run_folder: Path) -> None:
    run = Run(run_folder)
    table = run.through_training("a red fox runs")
    assert table["step"].tolist() == [1, 2, 3]
    assert table["rationale"].tolist()[:2] == ["step 1, rollout 0", "step 2, rollout 0"]
    texts = run.texts("SEA")
    assert texts["text"].tolist() == ["the sea at noon"] and texts["steps"].tolist() == [3]


def test_broken_files_are_named_and_the_others_are_shown(
    run_folder: Path, add_step: AddStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_again(monkeypatch)
    whole = (run_folder / "rollouts" / "step-000001.parquet").read_bytes()
    for step, content in ((1, whole[: len(whole) // 2]), (2, b"")):
        (run_folder / "rollouts" / f"step-{step:06d}.parquet").write_bytes(content)
    run = Run(run_folder)
    assert run.count() == 9 and len(run.rollouts(step=3)) == 9
    assert [s.partition(" are left out")[0] for s in run.problems()] == [
        "the rollouts of step 1",
        "the rollouts of step 2",
    ]
    with pytest.raises(UserError, match=r"step-000001.parquet: "):
        run.rollout(1, 0)
    add_step(run_folder, 1)
    cut_rollouts(run_folder, 1)
    assert run.count() == 9 and run.problems() == []


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, run_folder: Path) -> None:
    paths = [tmp_path / place / "day" / "run" for place in ("a", "b")] + [tmp_path / "c" / "run"]
    for path in paths:
        path.parent.mkdir(parents=True)
        shutil.copytree(run_folder, path)
    runs = open_runs([str(path) for path in (*paths, run_folder)])
    assert [run.name for run in runs] == ["a/day/run", "b/day/run", "c/run", "written"]
    with pytest.raises(UserError, match="given twice"):
        open_runs([str(run_folder), f"{run_folder}/."])


def test_new_steps_appear_and_cut_ones_go(
    run_folder: Path, add_step: AddStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_again(monkeypatch)
    run = Run(run_folder)
    assert run.count() == 27
    add_step(run_folder, 10)
    assert run.count() == 36
    cut_rollouts(run_folder, 2)
    assert run.count() == 18
    add_step(run_folder, 2, ["made again"] * 8)
    assert run.count(text="made again") == 8


def test_questions_while_training_writes(
    run_folder: Path, add_step: AddStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts only rise, and are whole steps, however the writer and the readers interleave."""
    look_again(monkeypatch)
    run, counts, problems = Run(run_folder), [], []

    def ask() -> None:
        try:
            while not done.is_set():
                counts.append(run.count())
        except Exception as error:
            problems.append(error)

    done = threading.Event()
    readers = [threading.Thread(target=ask) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(4, 30):
        add_step(run_folder, step)
        asked = len(counts) + 3
        while len(counts) < asked and not problems:
            time.sleep(0.001)
    done.set()
    for reader in readers:
        reader.join()
    assert not problems
    assert all(count % 9 == 0 for count in counts) and len(set(counts)) > 2
    assert run.count() == 29 * 9


def test_a_half_written_metrics_line_is_left_out(run_folder: Path) -> None:
    run = Run(run_folder)
    assert run.metrics()["step"].tolist() == [1, 2, 3]
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert run.metrics()["step"].tolist() == [1, 2, 3]


def test_neighbours_leave_out_the_text_itself(run_folder: Path) -> None:
    run = Run(run_folder)
    pool, vectors = pool_of_step(run, 1)
    assert len(pool) == 5 and vectors.shape == (5, 2)
    near = nearest_by_rationale(run, 1, 8)
    assert "an anchor" not in near["text"].tolist() and near["cosine"].is_monotonic_decreasing
    assert near.loc[near["same_row"], "text"].tolist() == ["a red fox runs"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"sort": "nothing"}, "no column nothing"),
        ({"columns": ["x; DROP TABLE rollouts"]}, "no column x; DROP"),
        ({"score": "fame > 1"}, "no column reward/fame"),
        ({"score": "length >> 1"}, "cannot read 'length >> 1'"),
    ],
)
def test_mistakes_are_sentences(run_folder: Path, question: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Run(run_folder).rollouts(**question)


def test_mistakes_in_an_address_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        Filter.from_query({"step": "ten", "example": "-1", "truncated": "maybe", "score": "a"})
    assert len(caught.value.problems) == 4
    assert all(problem.count(":") == 1 for problem in caught.value.problems)


@pytest.mark.parametrize("value", ["9" * 19, "\u0663", "1-" + "9" * 40])
def test_numbers_that_no_step_has_are_mistakes(value: str) -> None:
    with pytest.raises(UserError, match="step: cannot read"):
        Filter.from_query({"step": value})


def test_a_run_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        Run(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run's status.json nor rollouts"):
        Run(tmp_path)


def test_only_whole_checkpoints_are_offered(run_folder: Path) -> None:
    """One that is still being written has no mark yet."""
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-20"):
        folder = run_folder / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if name != "checkpoint-20":
            mark_complete(folder)
    assert list(checkpoints(Run(run_folder))) == ["checkpoint-9", "checkpoint-10"]


def test_a_checkpoint_that_is_not_the_runs_is_refused(run_folder: Path) -> None:
    for name in ("../../elsewhere", str(run_folder), "checkpoint-1"):
        with pytest.raises(UserError, match="no checkpoint"):
            Checkpoint(Run(run_folder), name)


@pytest.fixture
def two_runs(run_folder: Path, tmp_path: Path, add_step: Callable[..., None]) -> list[Run]:
    """The written run, and a copy of it with one more step."""
    shutil.copytree(run_folder, tmp_path / "other")
    add_step(tmp_path / "other", 4)
    return [Run(run_folder), Run(tmp_path / "other")]


def keep_replay(run: Run, name: str, more: dict[int, float]) -> None:
    """A replay whose totals are the run's own, and so much more in some groups."""
    found = run.rollouts(columns=["step", "group", "role", "text", "rationale", "advantage"])
    found = found[found["advantage"].notna()].assign(replayed_advantage=found["advantage"])
    found["total"] = found["advantage"] + found["group"].map(more).fillna(0.0)
    (run.path / "replays").mkdir(exist_ok=True)
    found.to_parquet(run.path / "replays" / f"{name}.parquet")


def test_groups_of_two_runs_are_compared_by_what_scores_both_alike(two_runs: list[Run]) -> None:
    run, other = two_runs
    own = views.changed_groups(run, other, None, 9)
    assert len(own) == 4 and {row["change"] for row in own} == {0.0}
    assert {(row["step_first"], row["step_second"]) for row in own} == {(3, 4)}
    keep_replay(run, "alike", {})
    keep_replay(other, "alike", {2: 1.0, 1: -2.0})
    by_replay = views.changed_groups(run, other, "alike", 2)
    assert [(row["group_second"], round(row["change"], 3)) for row in by_replay] == [
        (1, -2.0),
        (2, 1.0),
    ]


def test_both_runs_replays_stand_side_by_side(two_runs: list[Run]) -> None:
    run, other = two_runs
    keep_replay(run, "alike", {})
    keep_replay(other, "alike", {0: 4.0})
    keep_replay(other, "alone", {})
    (other.path / "replays" / "broken.parquet").write_bytes(b"no parquet")
    rows = {row["name"]: row for row in views.replay_rows(run, other)}
    assert list(rows) == ["alike", "alone", "broken"]
    assert rows["alike"]["second"] - rows["alike"]["first"] == pytest.approx(1.0)
    assert rows["alike"]["first_kept"] == 1.0
    assert rows["alone"]["first"] is None and rows["alone"]["second"] is not None
    assert rows["broken"]["second"] is None


def test_the_same_texts_of_two_runs_those_that_differ_most_first(two_runs: list[Run]) -> None:
    rows, count = views.side_by_side(*two_runs, limit=2)
    assert len(rows) == 2 and count == 5
    assert all(row["kept"] == 0.0 for row in rows)  # hostile ones against "step 4, rollout i"
