"""Recipes: what the user asked for, read, checked and typed before anything starts."""

from grace_rl.recipe.recipe import Recipe, describe, kept_recipe, load_recipe
from grace_rl.recipe.rewards import RewardSpec, read_rewards

__all__ = ["Recipe", "RewardSpec", "describe", "kept_recipe", "load_recipe", "read_rewards"]
