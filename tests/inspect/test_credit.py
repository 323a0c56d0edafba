"""Which words earned it: on a run of the world of scenes, where the words that matter are known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from grace_rl.cli import main
from grace_rl.data import scenes
from grace_rl.inspect import Run
from grace_rl.inspect.beside import against_siblings, kept_credit
from grace_rl.inspect.checkpoints import checkpoints, loaded
from grace_rl.inspect.credit import StepCredit, measurable_rewards, measured
from grace_rl.inspect.filters import Filter
from grace_rl.inspect.page import answers
from grace_rl.inspect.page.site import Site
from grace_rl.rollout.store import read_rollouts, write_rollouts

pytestmark = pytest.mark.slow
ROWS, SAMPLES = 6, 4


@pytest.fixture(scope="module")
def made(root: Path) -> Any:
    """The benchmark that makes the run, as a module."""
    place = importlib.util.spec_from_file_location(
        "word_credit", root / "benchmarks" / "word_credit.py"
    )
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(made: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(made.world_run(tmp_path_factory.mktemp("credit") / "world", ROWS, SAMPLES))


@pytest.fixture(scope="module")
def credit(world: Run) -> StepCredit:
    return StepCredit(world, 1, measurable_rewards(world)[0])


@pytest.fixture(scope="module")
def words(credit: StepCredit) -> pd.DataFrame:
    return pd.concat(credit.measure(range(len(credit.batch))))


def test_words_that_matter_get_the_credit(made: Any, credit: StepCredit, words: Any) -> None:
    examples = scenes.rows("test", "quad", ROWS, 0)
    rows = torch.tensor(words["row"].to_numpy())
    table = words.assign(example=credit.batch.example[rows].tolist())
    found = made.correlations(table, examples)
    assert found["margin"] > 0.1 > abs(found["chance"])
    assert credit.likeness == pytest.approx(1.0, abs=1e-3)  # the very weights that wrote them


def test_credit_is_with_the_word_minus_without(world: Run, credit: StepCredit, words: Any) -> None:
    """One word by hand: its rollout alone is read again, all else stays."""
    word = words.iloc[3]
    batch, row = credit.batch, int(word["row"])
    parts = batch.rationales[row].split()
    assert parts[word["place"]] == word["word"]
    rest = " ".join(part for i, part in enumerate(parts) if i != word["place"])
    read = credit.checkpoint.read([batch.rationales[row], rest], [batch.texts[row]] * 2)
    texts = batch.pool.by_text
    cosines = torch.from_numpy(read) @ texts.centroids.T
    positive = batch.positives()[row, texts.rows].nonzero()[0, 0]
    moved = float(cosines[0, positive] - cosines[1, positive])
    assert word["positive"] == pytest.approx(moved, abs=1e-5)
    (reward,) = (one for one in credit.rewards if one.label == "contrastive")
    vectors = batch.embeddings.clone()
    vectors[row] = torch.from_numpy(read[1])
    scores = [reward(one, {}).values[row] for one in (batch, batch.read_as(vectors))]
    assert word["reward/contrastive"] == pytest.approx(float(scores[0] - scores[1]), abs=1e-5)
    assert word["credit"] == pytest.approx(word["reward/contrastive"] + word["reward/length"])


def test_words_that_no_sibling_has_are_marked() -> None:
    table = pd.DataFrame({"group": [0, 0, 0, 1], "row": [0, 0, 1, 2]})
    table["word"] = ["red", "fox", "Fox", "sea"]
    assert list(against_siblings(table)["only"]) == [True, False, False, False]


def test_credit_is_kept_beside_the_run_until_its_rollouts_change(
    world: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.path.rglob("*")}
    group = int(world.groups(step=1)["group"][0])
    arguments = ["inspect", str(world.path), "--credit", "--step", "1", "--group", str(group)]
    file = tmp_path / "words.csv"
    assert main([*arguments, "--csv", str(file)]) == 0
    said = capsys.readouterr().out
    assert "read by model" in said and "contrastive" not in said
    rows = pd.read_csv(file)
    assert {"word", "positive", "negative", "reward/contrastive", "only"} <= set(rows)
    assert {path: path.stat().st_mtime_ns for path in world.path.rglob("*")} == before
    kept = kept_credit(world, 1)
    assert kept is not None and len(kept[0]) == len(rows)
    ((share, found),) = measured(world, 1, [int(rows["row"][0])])
    assert share == 1.0 and set(found[0]["row"]) == {rows["row"][0]}
    write_rollouts(world.path, 1, read_rollouts(world.path, [1]))
    assert kept_credit(world, 1) is None
    assert world.beside.parent == world.path.parent


def test_rewards_that_a_run_names_are_not_called_unasked(
    world: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\ndef evil(batch):\n    return [0.0] * len(batch)\n"
    (tmp_path / "evil.py").write_text(code)
    recipe = world.path / "recipe.yaml"
    own = recipe.read_text()
    recipe.write_text(f"method: grpo\nrewards: [{{name: '{tmp_path}/evil.py:evil'}}]\n")
    try:
        run = Run(world.path)
        rewards, missing = measurable_rewards(run)
        assert rewards == [] and "evil" in missing
        row = int(run.rollouts(Filter(step=1))["row"][0])
        *_, (_, (table, _)) = measured(run, 1, [row])
        assert list(table["credit"]) == list(table["margin"]) and not mark.exists()
        arguments = ["inspect", str(world.path), "--credit", "--row", str(row)]
        assert main([*arguments, "--rewards", str(recipe)]) == 0 and mark.exists()
        assert "evil" in capsys.readouterr().out
    finally:
        recipe.write_text(own)


def test_try_measures_words_or_says_why_not(world: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = list(checkpoints(world))[-1]
    pool = loaded(world, name).pool
    query = {"of": f"{world.name}:{name}", "text": pool["text"][0]}

    def said(**more: str) -> str:
        events = answers.read(Site({world.name: world}), query | more)
        return next(event["html"] for event in events if event["into"] == "credit")

    assert "tokens" in said() and said(rationale="fox").count("<span") == 1
    assert "Nothing is written" in said(rationale=" \n")
    monkeypatch.setitem(loaded(world, name).__dict__, "pool", pool.head(2))
    assert "Not measured" in said()  # there is one other text
