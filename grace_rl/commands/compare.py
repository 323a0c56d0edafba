"""grace-rl compare FILE"""

from __future__ import annotations

import argparse

HELP = "train and score several recipes with equal data, seeds and budget: one table, one picture"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="a YAML file with the rows (docs/evaluation.md)"
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing; write the table of what is finished"
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.evaluate.compare import compare
    from grace_rl.evaluate.comparison import load_comparison

    return compare(load_comparison(options.file), only_table=options.table)
