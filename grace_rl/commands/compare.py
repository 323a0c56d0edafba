"""grace-rl compare FILE"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HELP = "train and score several recipes with equal data, seeds and budget: one table, one picture"
RECIPE_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="a YAML file with the rows (docs/evaluation.md)"
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing; write the table of what is finished"
    )
    # FILE is then the folder of one cell: how a comparison starts its own processes.
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.cell:
        from grace_rl.evaluate.cell import run_cell

        return run_cell(Path(options.file), _train)
    from grace_rl.evaluate.compare import compare
    from grace_rl.evaluate.comparison import load_comparison

    return compare(load_comparison(options.file), only_table=options.table)


def _train(recipe: Any, budget: Mapping[str, float]) -> int:
    from grace_rl.train.run import train
    from grace_rl.train.stop import Budget

    return train(recipe, budget=Budget(**budget))
