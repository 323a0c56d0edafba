"""`check --sample`: what the recipe's own prompts make an untrained policy write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grace_rl.errors import UserError
from grace_rl.evaluate.samples import sample_rationales
from grace_rl.evaluate.untrained import untrained_encoder
from grace_rl.recipe import load_recipe


def test_each_role_is_written_for_in_its_own_prompt(root: Path, tmp_path: Path) -> None:
    overrides = ["--max_completion_length", "8", "--roles.negative.write", "false"]
    overrides += ["--roles.negative_positive", "{write: false}"]
    overrides += ["--roles.positive.instruction", "{user: 'so {text}'}"]
    recipe = load_recipe(root / "recipes/quickstart.yaml", overrides)
    samples = sample_rationales(recipe, 2)
    assert [sample.role for sample in samples] == ["query", "positive"] * 2
    encoder = untrained_encoder(recipe, tmp_path)
    (greedy,) = encoder.rationales([samples[0].text], rationale="greedy")
    assert samples[0].greedy == greedy
    told = recipe.config.roles["positive"].instruction
    (greedy,) = encoder.rationales([samples[1].text], rationale="greedy", instruction=told)
    assert samples[1].greedy == greedy


def test_a_method_that_writes_nothing_says_so(root: Path) -> None:
    with pytest.raises(UserError, match="--sample: method infonce"):
        sample_rationales(load_recipe(root / "recipes/scenes/infonce.yaml"), 1)


def test_an_untrained_policy_has_the_recipes_dtype(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe(root / "recipes/quickstart.yaml", ["--dtype", "bfloat16"])
    assert untrained_encoder(recipe, tmp_path).model.dtype == torch.bfloat16
