"""An output where something else lies is one line and exit 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from grace_rl.cli import main
from grace_rl.data import scenes


@pytest.mark.parametrize("output", ["file", "file/under.json", "folder"])
def test_evaluate(tmp_path: Path, capsys, monkeypatch, output: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "tasks.yaml").write_text("- {name: a, kind: sts, path: nothing}\n")
    command = ["evaluate", str(scenes.COLD_START), "--tasks", "tasks.yaml", "--output", output]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--output: ") != (output == "file")


def test_evaluate_seed(tmp_path: Path, capsys):
    command = ["evaluate", str(scenes.COLD_START), "--tasks", str(tmp_path / "none.yaml")]
    assert main([*command, "--seed", "-1"]) == 2
    assert capsys.readouterr().err.startswith("--seed: ")


@pytest.mark.parametrize("output", ["file", "file/under"])
def test_curate_and_compare(tmp_path: Path, root: Path, capsys, monkeypatch, output: str):
    monkeypatch.chdir(root)
    taken = tmp_path / "file"
    taken.write_text("")
    recipe = "recipes/curate/scenes.yaml"
    assert main(["curate", recipe, "--output_dir", str(tmp_path / output)]) == 2
    comparison = tmp_path / "compare.yaml"
    comparison.write_text(
        f"output_dir: {tmp_path / output}\nbudget_seconds: 1\nseeds: [0]\n"
        "score: {dataset_splits: [test], rows: 2}\n"
        "rows: [{name: a, recipe: recipes/scenes/infonce.yaml}]\n"
    )
    assert main(["compare", str(comparison)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert str(taken) in first and str(taken) in second
    assert taken.read_text() == ""
