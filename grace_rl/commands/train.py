"""grace-rl train RECIPE [--key value ...]"""

from __future__ import annotations

import argparse

import yaml

HELP = "train a policy as a recipe says; an unfinished run resumes"
RECIPE_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run")


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.recipe import SCENES, describe, is_local_file, load_recipe

    recipe = load_recipe(options.recipe, overrides)
    if not options.dry_run:
        from grace_rl.train.run import train

        return train(recipe, overwrite=options.overwrite)
    from grace_rl.data.rows import read_rows

    recipe.model_config()
    recipe.training_arguments()
    local = recipe.data.dataset_name == SCENES or is_local_file(recipe.data.dataset_name)
    rows = len(read_rows(recipe.data)) if local else None
    print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=100))
    for line in describe(recipe, rows):
        print(f"# {line}")
    return 0
