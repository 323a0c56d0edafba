"""grace-rl train RECIPE [--launch NAME] [--key value ...]"""

from __future__ import annotations

import argparse
import os
import shlex
from typing import TYPE_CHECKING

import yaml

from grace_rl.run.printing import say
from grace_rl.run.secrets import masked, masked_words

if TYPE_CHECKING:
    from grace_rl.launch.lines import Launch
    from grace_rl.recipe import Recipe
    from grace_rl.recipe.stages import Chain

HELP = "train a policy as a recipe says; an unfinished run resumes"
RECIPE_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the plan, and stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run")
    add_launch_arguments(parser)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """`--launch` and `--num_processes`, which `check` has too."""
    parser.add_argument(
        "--launch",
        metavar="NAME",
        help="start many processes: a file of recipes/accelerate such as zero3, or your own",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        metavar="N",
        help="with --launch: how many (default: the GPUs of this machine)",
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.launch.lines import launched

    if options.launch or options.num_processes is not None:
        return _launch(options, overrides)
    with launched() as tell:
        from grace_rl.launch.preflight import all_together
        from grace_rl.recipe.stages import Chain, load

        with all_together(int(os.environ.get("WORLD_SIZE", "1"))):
            recipe = load(options.recipe, overrides)
        if options.dry_run:
            return _dry_run(recipe, None, int(os.environ.get("WORLD_SIZE", "1")))
        if isinstance(recipe, Chain):
            from grace_rl.train.stages import train_chain

            return int(tell(train_chain(recipe, overwrite=options.overwrite)))
        from grace_rl.train.run import train

        return int(tell(train(recipe, overwrite=options.overwrite)))


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    """Start `grace-rl train` on many processes; what is wrong with the recipe is said once."""
    from grace_rl.errors import UserError
    from grace_rl.launch.lines import counted, read_launch, run_launch
    from grace_rl.launch.preflight import all_together
    from grace_rl.recipe.stages import load, recipes_of

    if options.launch is None:
        raise UserError("--num_processes: needs --launch, such as --launch zero2")
    launch = read_launch(options.launch, options.num_processes)
    with counted(launch.processes), all_together(launch.processes):
        recipe = load(options.recipe, overrides)
    if launch.zero_stage and any(one.training.get("deepspeed") for one in recipes_of(recipe)):
        raise UserError(
            f"--launch: {options.launch} brings ZeRO, and so does the recipe's key deepspeed; "
            "use --launch ddp, or take deepspeed out"
        )
    if options.dry_run:
        words = launch.line(["train", options.recipe, *overrides])
        say(f"# {shlex.join(masked_words(words))}")
        return _dry_run(recipe, launch, launch.processes)
    again = ["grace-rl", "train", options.recipe, "--launch", options.launch]
    again += ["--num_processes", str(launch.processes), *overrides]
    overwrite = ["--overwrite"] if options.overwrite else []
    return run_launch(launch, ["train", options.recipe, *overwrite, *overrides], again)


def _dry_run(recipe: Recipe | Chain, launch: Launch | None, processes: int) -> int:
    from grace_rl.launch.lines import counted
    from grace_rl.launch.preflight import preflight, refuse
    from grace_rl.recipe import describe
    from grace_rl.recipe.stages import Chain

    if isinstance(recipe, Chain):
        say(_told(recipe))
        return print_stages(recipe, launch, processes)

    flight = preflight(recipe, launch=launch, processes=processes)
    refuse([flight])
    say(_told(recipe))
    with counted(processes):
        for line in describe(recipe, len(flight.rows)):
            say(f"# {line}")
    return 0


def _told(recipe: Recipe | Chain) -> str:
    """The resolved recipe as YAML, secrets masked."""
    tree = masked(recipe.resolved())
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def print_stages(chain: Chain, launch: Launch | None, processes: int) -> int:
    """What each stage loads and does, after all have been checked."""
    from grace_rl.launch.lines import counted
    from grace_rl.launch.preflight import check_stages
    from grace_rl.recipe import describe

    with counted(processes):
        counts = check_stages(chain, launch=launch, processes=processes)
        for number, (stage, rows) in enumerate(zip(chain.stages, counts, strict=True), start=1):
            say(f"# stage {number} of {len(chain.stages)}: {stage.name}")
            if stage.recipe is None:
                say(f"#   rows       {stage.folder / 'rows.jsonl'}")
                continue
            for line in describe(stage.recipe, rows):
                say(f"#   {line}")
    return 0
