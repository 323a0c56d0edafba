"""grace-rl check RECIPE [--key value ...]"""

from __future__ import annotations

import argparse

HELP = "read recipe, rows and rewards and say what is wrong with them"
RECIPE_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="force known rationales: can the embedding see a better one?",
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.recipe import describe, load_recipe

    recipe = load_recipe(options.recipe, overrides)
    if options.oracle:
        from grace_rl.evaluate.oracle import print_oracle_table

        print_oracle_table(recipe)
        return 0
    from grace_rl.data.rows import read_rows
    from grace_rl.methods import METHODS, named

    recipe.model_config()
    rows = read_rows(recipe.data)
    named(METHODS[recipe.method].plan)(recipe, recipe.training_arguments(), rows)
    for line in describe(recipe, len(rows)):
        print(f"# {line}")
    print("recipe, rows and rewards are in order")
    return 0
