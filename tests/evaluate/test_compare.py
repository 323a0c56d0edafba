"""A comparison's file is checked whole, InfoNCE cannot be left out, finished cells stay."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grace_rl.data import scenes
from grace_rl.errors import UserError
from grace_rl.evaluate.cell import perplexity
from grace_rl.evaluate.compare import compare
from grace_rl.evaluate.comparison import Cell, cells_of, load_comparison
from grace_rl.evaluate.comparison_table import table_lines, write_tables
from grace_rl.run.files import held

INFONCE = "{name: InfoNCE, recipe: recipes/scenes/infonce.yaml%s}"
HEAD = """\
output_dir: %s
seeds: [0, 1]
labels: [32, 512]
budget_seconds: 60
score: {dataset_splits: [test, transfer], rows: 20}
rows:
"""


@pytest.fixture
def write(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)

    def _write(*rows: str, head: str = HEAD % "runs/x") -> Path:
        path = tmp_path / "compare.yaml"
        path.write_text(head + "".join(f"  - {row}\n" for row in rows), encoding="utf-8")
        return path

    return _write


def test_the_shipped_comparison_is_valid(root, monkeypatch):
    monkeypatch.chdir(root)
    comparison = load_comparison("recipes/evaluate/compare-scenes.yaml")
    assert comparison.file.labels == (32, 512) and len(comparison.file.seeds) == 3


def test_without_infonce_there_is_no_comparison(write):
    with pytest.raises(UserError) as caught:
        load_comparison(write("{name: GRPO, recipe: recipes/quickstart.yaml}"))
    (problem,) = caught.value.problems
    assert "no row is plain InfoNCE" in problem and "compare.yaml:6: rows" in problem


def test_every_mistake_is_named_with_its_line(write):
    path = write(
        INFONCE % ", grid: [{learning_rat: 1}]",
        "{name: InfoNCE, recipe: recipes/nowhere.yaml}",
        "{name: both, recipe: recipes/quickstart.yaml, model: x}",
        "{name: odd, recipe: recipes/quickstart.yaml, trian: false, rationale: long}",
        "{name: five, recipe: recipes/quickstart.yaml, set: {max_stepz: 2}}",
        "{recipe: recipes/quickstart.yaml}",
        head="seeds: [0.5]\nlabel: [3]\nscore: {rows: 3}\nrows:\n",
    )
    with pytest.raises(UserError) as caught:
        load_comparison(path)
    problems = caught.value.problems
    for place, words in (
        (f"{path}:1: seeds", "whole number"),
        (f"{path}:2: label", "did you mean labels?"),
        (f"{path}:3: score", "give {dataset_splits"),
        ("--learning_rat", "did you mean learning_rate?"),
        (f"{path}:6", "two rows 'InfoNCE'"),
        ("recipes/nowhere.yaml", "there is no such recipe"),
        (f"{path}:7", "one of the two"),
        (f"{path}:8: rows.3.trian", "did you mean train?"),
        (f"{path}:8: rows.3.rationale", "one of greedy"),
        (f"{path}:10: rows.5.name", "is missing"),
        ("--max_stepz", "did you mean max_steps?"),
    ):
        assert any(p.startswith(place) and words in p for p in problems), (place, problems)


def test_rows_that_cannot_be_run_are_mistakes(write):
    """Each of them would have failed, or silently done something else, after hours."""
    infonce, quickstart = INFONCE % "", "{name: GRPO, recipe: recipes/quickstart.yaml}"
    for head, message in (
        ("seeds: [0, 0]", "seeds: a number is there twice"),
        ("labels: [2]", "dataset_rows: "),
        ("held_out: gone.jsonl", "held_out: there is no file"),
        ("output_dir: 3", "output_dir: must be a path"),
    ):
        head += "\nbudget_seconds: 9\nscore: {dataset_splits: [test]}\nrows:\n"
        with pytest.raises(UserError, match=message):
            load_comparison(write(infonce, quickstart, head=head))
    rows = {
        "{name: Ours (a), recipe: recipes/quickstart.yaml}": None,
        "{name: ours a, recipe: recipes/quickstart.yaml}": "would share a folder",
        "{name: '!', recipe: recipes/quickstart.yaml}": "has no letter",
        "{name: b, recipe: 3}": "must be a text",
        "{name: c, model: /nowhere}": "there is no folder",
        "{name: d, model: recipes, grid: [{learning_rate: 1}]}": "leave out grid",
        "{name: e, recipe: recipes/quickstart.yaml, train: 'no'}": "must be true or false",
        "{name: f, recipe: recipes/quickstart.yaml, labels: 32}": "must be true or false",
        "{name: g, recipe: recipes/quickstart.yaml, grid: [{seed: 1}]}": "on validation rows",
        "{name: h, recipe: recipes/quickstart.yaml, choose: reward}": "must be one of eval_",
        "{name: i, recipe: recipes/scenes/gircse.yaml, train: false}": "no policy to score",
    }
    with pytest.raises(UserError) as caught:
        load_comparison(write(infonce, *rows))
    problems = caught.value.problems
    for i, message in enumerate(rows.values(), start=1):
        found = [p for p in problems if f"rows.{i}." in p or f"rows.{i}:" in p]
        assert len(found) == (message is not None) and all(message in p for p in found), problems


def test_a_row_that_is_not_trained_is_no_baseline(write):
    with pytest.raises(UserError, match="no row is plain InfoNCE"):
        load_comparison(write(INFONCE % ", train: false"))


def test_a_changed_recipe_is_another_cell(write, tmp_path, root):
    recipe = tmp_path / "mine.yaml"
    text = (root / "recipes/scenes/infonce.yaml").read_text(encoding="utf-8")
    specs = []
    for more in ("", "# a remark\n", "label_smoothing_factor: 0.1\n"):
        recipe.write_text(text + more, encoding="utf-8")
        comparison = load_comparison(write(f"{{name: InfoNCE, recipe: {recipe}}}"))
        specs.append(cells_of(comparison, comparison.rows[0], {})[0].spec)
    assert specs[0] == specs[1] != specs[2]


def test_two_processes_do_not_run_one_comparison(tmp_path, write):
    comparison = comparison_in(tmp_path / "out", write)
    comparison.output_dir.mkdir()
    with (
        held(comparison.output_dir),
        pytest.raises(UserError, match="another process is working"),
    ):
        compare(comparison)


def comparison_in(folder: Path, write):
    return load_comparison(
        write(
            "{name: cold start, recipe: recipes/quickstart.yaml, train: false}",
            INFONCE % ", grid: [{learning_rate: 1e-3}, {learning_rate: 3e-3}]",
            "{name: label-free, recipe: recipes/scenes/unsupervised.yaml, labels: false}",
            head=HEAD % folder,
        )
    )


def test_a_grid_is_tried_with_the_first_seed_only(tmp_path, write):
    comparison = comparison_in(tmp_path / "out", write)
    cold, infonce, free = comparison.rows
    assert [cell.name for cell in cells_of(comparison, cold, {})] == ["cold-start"]
    assert [cell.name for cell in cells_of(comparison, free, {})] == [
        "label-free_seed0",
        "label-free_seed1",
    ]
    assert len(cells_of(comparison, infonce, {})) == 4
    names = [cell.name for cell in cells_of(comparison, infonce, {32: 1})]
    assert names == [
        "infonce_labels32_choice0_seed0",
        "infonce_labels32_choice1_seed0",
        "infonce_labels32_choice1_seed1",
        "infonce_labels512_choice0_seed0",
        "infonce_labels512_choice1_seed0",
    ]
    spec = cells_of(comparison, infonce, {32: 1})[2].spec
    assert spec["changes"] == {"learning_rate": 3e-3, "dataset_rows": 32, "seed": 1}


def finish(comparison, cell: Cell, triplet: float, validation=()) -> None:
    folder = comparison.output_dir / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "spec": cell.spec,
        "scores": {"scenes/triplet_accuracy": triplet, "scenes_transfer/triplet_accuracy": 0.5},
        "seconds_per_1000_texts": 1.0,
        "training": {"seconds": 9.0, "steps": 3, "tokens": None, "validation": list(validation)},
    }
    (folder / "cell.json").write_text(json.dumps(result), encoding="utf-8")


def test_finished_cells_stay_and_the_best_of_the_grid_is_in_the_table(tmp_path, write):
    """All cells are there but one, whose settings were others: that one alone is run again."""
    comparison = comparison_in(tmp_path / "out", write)
    cold, infonce, free = comparison.rows
    for cell in cells_of(comparison, cold, {}) + cells_of(comparison, free, {}):
        finish(comparison, cell, 0.3)
    for cell in cells_of(comparison, infonce, {32: 0, 512: 1}):
        good = (cell.labels == 32) == (cell.choice == 0)
        # Equal recall: the lower loss decides. The test score must not: it says the opposite.
        curve = [{"step": 1, "eval_recall_at_1": 0.9, "eval_loss": 0.1 if good else 0.7}]
        finish(comparison, cell, (0.4 if good else 0.9) + 0.1 * (cell.seed or 0), curve)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")}
    assert compare(comparison) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")}

    folder = comparison.output_dir
    rows = list(csv.DictReader((folder / "comparison.csv").open(encoding="utf-8")))
    (row,) = [
        row
        for row in rows
        if (row["row"], row["labels"], row["score"]) == ("InfoNCE", "32", "scenes/triplet_accuracy")
    ]
    assert [float(row[key]) for key in ("mean", "low", "high")] == pytest.approx([0.45, 0.4, 0.5])
    table = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "| InfoNCE | 32 | 2 | .450 (.400 to .500) |" in table
    lines = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert [line["chosen"] for line in lines if line["row"] == "InfoNCE"] == [
        {"learning_rate": 1e-3},
        {"learning_rate": 3e-3},
    ]
    picture = pytest.importorskip("matplotlib") and folder / "comparison.png"
    assert picture.stat().st_size < 100_000


@pytest.mark.slow
def test_a_cell_that_fails_names_its_log_and_the_users_mistake(tmp_path, write, capsys):
    path = write(
        INFONCE % ", set: {max_steps: 1, seed: 0, eval_steps: 1, per_device_train_batch_size: 1}",
        head=HEAD.replace("[0, 1]", "[0]").replace("[32, 512]", "[1]") % (tmp_path / "out"),
    )
    comparison = load_comparison(path)
    object.__setattr__(comparison.rows[0], "recipe", str(tmp_path / "gone.yaml"))
    assert compare(comparison) == 2
    (log,) = (tmp_path / "out").rglob("log.txt")
    said = "there is no such recipe"
    assert said in log.read_text(encoding="utf-8") and said in capsys.readouterr().out


def test_other_rows_or_start_weights_of_the_same_name_are_another_cell(write, tmp_path, root):
    """The bytes count; what was known of the file's name or size would be the same."""
    rows, model = tmp_path / "rows.jsonl", tmp_path / "model"
    shutil.copytree(scenes.COLD_START, model)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"method: infonce\nmodel_name_or_path: {model}\ndataset_name: {rows}\nmax_steps: 1\n"
    )
    weights, specs = model / "model.safetensors", []
    for text, last in (("a", 0), ("b", 0), ("b", 1)):
        line = {"query": text, "positive": "c", "negative": "d"}
        rows.write_text((json.dumps(line) + "\n") * 32, encoding="utf-8")
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([last]))
        comparison = load_comparison(write(f"{{name: InfoNCE, recipe: {recipe}, labels: false}}"))
        specs.append(cells_of(comparison, comparison.rows[0], {})[0].spec["content"])
    assert len({str(spec) for spec in specs}) == 3


def test_lines_have_the_spread_over_seeds(tmp_path, write):
    comparison = comparison_in(tmp_path / "out", write)
    free = comparison.rows[2]
    cells = cells_of(comparison, free, {})
    base = {"seconds_per_1000_texts": 2.0, "perplexity": 8.0}
    results = [
        (cell, {**base, "scores": {"a": value}}) for cell, value in zip(cells, (1, 3), strict=True)
    ]
    (line,) = table_lines(comparison, results)
    assert line["scores"] == {"a": {"mean": 2, "low": 1, "high": 3}}
    assert set(line["costs"]) == {"s per 1,000 texts", "perplexity"}
    (tmp_path / "out").mkdir()
    assert write_tables(comparison, results, results)


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    class Uniform:
        device = "cpu"

        def eval(self):
            pass

        def __call__(self, ids):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(1, ids.shape[1], 7))

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(c) % 7 for c in text]}

    found = perplexity(Uniform(), tokenizer, [([1, 2], "abc"), ([], "defg")])
    assert math.isclose(found, 7, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("", "budget_seconds: is missing"),
        ("budget_tokens: 0", "budget_tokens: must be at least 1, not 0"),
        ("budget_seconds: soon", "budget_seconds: must be a number, not 'soon'"),
        ("budget_tokens: 100000", None),
        ("budget_tokens: 100000\nbudget_seconds: 9", None),
    ],
)
def test_a_budget_is_of_seconds_or_of_tokens(write, budget, message):
    path = write(INFONCE % "", head=(HEAD % "runs/x").replace("budget_seconds: 60", budget))
    if message is None:
        assert load_comparison(path).file.budget()["tokens"] == 100_000
    else:
        with pytest.raises(UserError, match=message):
            load_comparison(path)


@pytest.mark.slow
def test_a_small_comparison_is_interrupted_goes_on_and_runs_nothing_twice(tmp_path, write):
    """A grid, an untrained policy and RL within a budget, two processes at once."""
    small = "validation: {split: validation, rows: 8}, max_steps: 4, eval_steps: 2"
    path = write(
        "{name: GRPO, recipe: recipes/quickstart.yaml, labels: false, set: {logging_steps: 1}}",
        INFONCE % f", set: {{{small}}}, grid: [{{learning_rate: 3e-3}}]",
        "{name: cold start, recipe: recipes/quickstart.yaml, train: false}",
        head=(HEAD % (tmp_path / "out"))
        .replace("[0, 1]", "[0]")
        .replace("[32, 512]", "[16]")
        .replace("budget_seconds: 60", "budget_tokens: 60000\njobs: 2"),
    )
    run = tmp_path / "out" / "cells" / "grpo_seed0" / "run"
    process = subprocess.Popen([sys.executable, "-m", "grace_rl", "compare", str(path)])
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert list((run / "checkpoints").glob("checkpoint-*"))

    comparison = load_comparison(path)
    assert compare(comparison) == 0
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [line["row"] for line in content["rows"]] == ["GRPO", "InfoNCE", "cold start"]
    assert content["rows"][2]["scores"]["scenes/triplet_accuracy"]["mean"] > 0
    costs = content["rows"][0]["costs"]
    (training,) = [c["training"] for c in content["cells"] if c["row"] == "GRPO"]
    assert 1 < training["steps"] < 100  # of 120: the budget ended it
    assert costs["perplexity"]["mean"] > 1 and costs["tokens"]["mean"] >= 60000
    assert content["rows"][1]["costs"]["tokens"]["mean"] > 4 * 16  # InfoNCE reads, too
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")}
    assert compare(comparison) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cell.json")}
