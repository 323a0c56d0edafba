"""Recipes of several stages: what each stage gets, and every mistake of every stage at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_rl.errors import UserError
from grace_rl.recipe import Recipe
from grace_rl.recipe.stages import Chain, load

BASE: dict[str, Any] = {
    "model_name_or_path": "scenes",
    "dataset_name": "scenes",
    "instruction": None,
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
}
GRPO: dict[str, Any] = {
    "method": "grpo",
    "num_generations": 4,
    "rewards": [
        {"name": "contrastive"},
        {"name": "reconstruction", "model": "stage:reconstruction"},
    ],
}
CURATION = {
    "dataset_name": "scenes",
    "dataset_rows": 4,
    "dataset_options": {"form": "unsupervised"},
    "generate": {"model_name_or_path": "scenes", "engine": "transformers"},
}


def written(folder: Path, tree: dict[str, Any], name: str = "chain.yaml") -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


def chain_of(folder: Path, stages: list[Any], *overrides: str, **changes: Any) -> Chain:
    tree = {"output_dir": str(folder / "run")} | BASE | changes | {"stages": stages}
    chain = load(written(folder, tree), overrides)
    assert isinstance(chain, Chain)
    return chain


def problems_of(folder: Path, stages: list[Any], *overrides: str, **changes: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        chain_of(folder, stages, *overrides, **changes)
    return error.value.problems


def test_each_stage_starts_from_the_last_ones_model(tmp_path: Path) -> None:
    chain = chain_of(tmp_path, ["reconstruction", {"method": "sft", "max_steps": 7}, GRPO])
    first, second, third = chain.recipes
    run = tmp_path / "run" / "stages"
    assert [stage.folder.name for stage in chain.stages] == [
        "1-reconstruction", "2-sft", "3-grpo"
    ]  # fmt: skip
    assert first.model["model_name_or_path"] == "scenes"
    assert second.model["model_name_or_path"] == str(run / "1-reconstruction" / "model")
    assert third.model["model_name_or_path"] == str(run / "2-sft" / "model")
    assert third.training["output_dir"] == str(run / "3-grpo")
    assert second.training["max_steps"] == 7
    assert all(recipe.training["learning_rate"] == 1e-3 for recipe in chain.recipes)
    assert third.rewards[1].keywords == {"model": str(run / "1-reconstruction" / "model")}
    assert "rewards" not in chain.resolved()["stages"][0]


def test_a_stages_own_keys_go_before_shared_ones_and_overrides_before_both(tmp_path: Path) -> None:
    stages = [{"method": "reconstruction", "learning_rate": 2e-3}, {"method": "sft"}]
    chain = chain_of(tmp_path, stages)
    assert [r.training["learning_rate"] for r in chain.recipes] == [2e-3, 1e-3]
    words = ["--learning_rate", "5e-4", "--stages.sft.max_steps", "9"]
    chain = chain_of(tmp_path, stages, *words)
    assert [r.training["learning_rate"] for r in chain.recipes] == [2e-3, 5e-4]
    assert chain.recipes[1].training["max_steps"] == 9


def test_what_is_kept_loads_to_the_same_chain(tmp_path: Path) -> None:
    curate = written(tmp_path, CURATION, "curate.yaml")
    chain = chain_of(tmp_path, [{"curate": str(curate)}, "reconstruction", "sft", GRPO])
    again = load(written(tmp_path, chain.resolved(), "again.yaml"))
    assert isinstance(again, Chain)
    assert again.resolved() == chain.resolved()
    assert again.recipes == chain.recipes


def test_curated_rows_are_what_the_stages_after_read(tmp_path: Path) -> None:
    curate = written(tmp_path, CURATION, "curate.yaml")
    own = {"method": "sft", "dataset_name": "scenes", "dataset_options": {"form": "sft"}}
    stages = [{"curate": str(curate)}, {"method": "reconstruction"}, own]
    chain = chain_of(tmp_path, stages, dataset_name="scenes")
    rows = str(tmp_path / "run" / "stages" / "1-curate" / "rows.jsonl")
    assert [recipe.data.dataset_name for recipe in chain.recipes] == [rows, "scenes"]
    assert chain.stages[0].curation is not None
    assert str(chain.stages[0].curation.output_dir) == str(Path(rows).parent)
    assert chain.recipes[0].model["model_name_or_path"] == "scenes"


def test_all_mistakes_of_all_stages_are_reported_together(tmp_path: Path) -> None:
    stages = [
        {"method": "reconstruction", "alpha": 2.0},
        {"method": "sft", "max_stepz": 3},
        GRPO
        | {"num_generations": 1, "rewards": [{"name": "reconstruction", "model": "stage:ppo"}]},
    ]
    problems = problems_of(tmp_path, stages, seed="x", lerning_rate=1)
    said = "\n".join(problems)
    for words in (
        "stage 1 (reconstruction): ",
        "alpha: must be at most 1",
        "did you mean max_steps",
        "num_generations: must be at least 2",
        "no earlier stage is called 'ppo'; there are: reconstruction, 1, sft, 2",
        "lerning_rate: unknown key to every stage; did you mean learning_rate",
    ):
        assert words in said
    assert sum("seed" in problem for problem in problems) == 1  # shared, so said once


def test_stages_themselves_are_checked(tmp_path: Path) -> None:
    wrong: list[Any] = ["cook", {"method": ["sft"]}, 3, {"curate": "x", "seed": 1}]
    wrong.append({"method": "sft", "output_dir": "elsewhere"})
    problems = problems_of(tmp_path, wrong, method="grpo")
    assert len(problems) == 6
    assert "stages.4.output_dir: is set by the recipe's own output_dir" in problems[4]
    assert all("method must be one of" in problem for problem in problems[:2])
    assert "'cook'" in problems[0]
    assert "each stage has its own" in problems[5]
    assert "must be a list" in problems_of(tmp_path, [])[0]


def test_the_reader_must_read_what_reconstruction_trains(tmp_path: Path) -> None:
    other = GRPO | {"reader": {"span": "context", "layers": [-1]}}
    problems = problems_of(tmp_path, ["reconstruction", other])
    assert ["reader.span" in problem for problem in problems] == [True, False]
    assert "give both the same reader" in problems[0]


def test_a_file_without_stages_is_a_recipe(root: Path) -> None:
    assert isinstance(load(root / "recipes" / "quickstart.yaml"), Recipe)
    assert isinstance(load(root / "recipes" / "scenes" / "stages.yaml"), Chain)
