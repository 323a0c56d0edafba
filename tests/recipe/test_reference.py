"""The JSON schema of recipes: current, true of every shipped recipe, and it knows mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace_rl.recipe.methods import METHODS
from grace_rl.recipe.recipe import recipe_keys
from grace_rl.recipe.reference import SCHEMA_FILE, json_schema, recipe_keys_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if path.parent.name not in ("accelerate", "curate", "evaluate")
]


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="checks the schema of recipes")
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_current() -> None:
    """Else: python -m grace_rl.recipe.reference"""
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema()


def test_every_key_is_there_and_told() -> None:
    for method in METHODS:
        keys = recipe_keys_of(method)
        assert set(keys) == set(recipe_keys(method))
        untold = [key.name for key in keys.values() if key.home == "grace-rl" and not key.meaning]
        assert untold == []


def test_every_shipped_recipe_is_valid(validator: Any) -> None:
    wrong = {
        str(path): [error.message[:200] for error in found]
        for path in RECIPES
        if (found := [*validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))])
    }
    assert wrong == {} and len(RECIPES) > 10


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rat": 1e-4},
        {"learning_rate": "much"},
        {"method": "magic"},
        {"reader": {"span": "everything"}},
        {"critic": "shared"},  # of PPO only
        {"num_generations": 1},
        {"stages": [{"method": "grpo", "learning_rat": 1}]},
        {"rewards": [{"weight": 1.0}]},
    ],
)
def test_mistakes_are_known(validator: Any, change: dict[str, Any]) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert not [*validator.iter_errors(recipe)]
    assert [*validator.iter_errors(recipe | change)]
