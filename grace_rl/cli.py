"""The command line: parse, call, print. Torch is imported by what is called, never here.

Exit codes: 0 done; 2 a mistake of the user's, explained on stderr; 130 interrupted and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from grace_rl import __version__
from grace_rl.errors import UserError

if TYPE_CHECKING:
    from grace_rl.recipe import Recipe

USER_ERROR = 2
INTERRUPTED = 130

OVERRIDES = """\
overrides:
  Any key of the recipe can be given as --key value or --key=value, also one that the file does not
  have: --learning_rate 2e-4 --use_vllm true. Dots go deeper: --reader.span context,
  --rewards.contrastive.temperature 0.05, --roles '{query: {}, positive: {}}'.
  The keys are those of docs/recipes.md and every field of TRL's GRPOConfig (method: grpo),
  SFTConfig (method: sft) and ModelConfig. A wrong key is answered with the nearest right one.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # vLLM's own log begins when TRL imports it, whether or not it is used; errors still show.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    try:
        from grace_rl.recipe import load_recipe

        recipe = load_recipe(options.recipe, overrides)
        return _train(recipe, options) if options.command == "train" else _check(recipe, options)
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grace-rl",
        description="Reinforcement learning for text embeddings "
        "that come with a written rationale.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"grace-rl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_ in (
        ("train", "train a policy as a recipe says; an unfinished run resumes"),
        ("check", "read recipe, rows and rewards and say what is wrong with them"),
    ):
        command = commands.add_parser(
            name,
            help=help_,
            description=help_[0].upper() + help_[1:] + ".",
            usage=f"grace-rl {name} RECIPE [--key value ...] [options]",
            epilog=OVERRIDES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
        if name == "train":
            command.add_argument(
                "--dry-run",
                action="store_true",
                help="print the resolved recipe and the plan, and stop",
            )
            command.add_argument("--overwrite", action="store_true", help="replace a finished run")
        else:
            command.add_argument(
                "--oracle",
                action="store_true",
                help="force known rationales: can the embedding see a better one?",
            )
    return parser


def _train(recipe: Recipe, options: argparse.Namespace) -> int:
    if options.dry_run:
        from grace_rl.data.rows import read_rows
        from grace_rl.recipe import SCENES, describe, is_local_file

        recipe.model_config()
        recipe.training_arguments()
        local = recipe.data.dataset_name == SCENES or is_local_file(recipe.data.dataset_name)
        rows = len(read_rows(recipe.data)) if local else None
        print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=100))
        _print_plan(describe(recipe, rows))
        return 0
    from grace_rl.train.run import train

    return train(recipe, overwrite=options.overwrite)


def _check(recipe: Recipe, options: argparse.Namespace) -> int:
    if options.oracle:
        from grace_rl.evaluate.oracle import print_oracle_table

        print_oracle_table(recipe)
        return 0
    from grace_rl.data.rows import read_rows
    from grace_rl.recipe import check_rows, describe

    recipe.model_config()
    recipe.training_arguments()
    rows = read_rows(recipe.data)
    check_rows(recipe, rows)
    _print_plan(describe(recipe, len(rows)))
    print("recipe, rows and rewards are in order")
    return 0


def _print_plan(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"# {line}")
