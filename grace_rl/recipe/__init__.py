"""Recipes: what the user asked for, read, checked and typed before anything starts."""

from grace_rl.recipe.recipe import (
    Recipe,
    default_name,
    describe,
    load_recipe,
    read_rewards,
    recipe_of,
)

__all__ = ["Recipe", "default_name", "describe", "load_recipe", "read_rewards", "recipe_of"]
