"""grace-rl curate RECIPE [--shard i/n] [--engine ray] [--overwrite] [--key value ...]"""

from __future__ import annotations

import argparse
import re

from grace_rl.run.printing import say
from grace_rl.run.workers import Cluster

HELP = "make training pairs from sentences: generate, rate, filter, and embed for the mask"
RECIPE_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file (docs/curation.md)")
    parser.add_argument(
        "--shard",
        metavar="i/n",
        default="1/1",
        help="do the i-th of n shares of generate and rate (i from 1 on)",
    )
    parser.add_argument(
        "--engine", choices=("ray",), help="ray: many workers generate and rate, as the recipe says"
    )
    Cluster.add_arguments(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away finished work whose settings have changed",
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.errors import UserError

    match = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    problems: list[str] = []
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        problems.append(f"--shard: must be i/n with i from 1 to n, not {options.shard!r}")
    cluster = Cluster.told(options, problems)
    if match is None or problems:
        raise UserError(problems)
    from grace_rl.recipe.curation import load_curation

    recipe = load_curation(options.recipe, overrides)
    from grace_rl.curate.run import Shard, curate

    try:
        shard = Shard(int(match[1]), int(match[2]))
        curate(recipe, shard, options.overwrite, cluster=cluster)
    except KeyboardInterrupt:
        say(
            f"interrupted; finished chunks are in {recipe.output_dir}; the same command goes on",
            error=True,
        )
        return 130
    return 0
