"""grace-rl check RECIPE [--launch NAME] [--num_processes N] [--key value ...]"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from grace_rl.commands.train import add_launch_arguments, print_stages
from grace_rl.run.printing import say

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grace_rl.errors import Finding

HELP = "look before a run starts: recipe, rows, rewards, memory, disk, ports, versions"
RECIPE_OVERRIDES = True
SUGGESTIONS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    add_launch_arguments(parser)
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="force known rationales: can the embedding see a better one?",
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="write for the texts of N rows, greedily and sampled, and stop",
    )


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    from grace_rl.errors import UserError
    from grace_rl.launch.lines import counted, read_launch
    from grace_rl.launch.preflight import all_together, preflight, refuse
    from grace_rl.recipe.stages import Chain, load

    if options.num_processes is not None and options.num_processes < 1:
        raise UserError(f"--num_processes: must be at least 1, not {options.num_processes}")
    launch = read_launch(options.launch, options.num_processes) if options.launch else None
    processes = launch.processes if launch else options.num_processes or 1
    with counted(processes), all_together(processes):
        recipe = load(options.recipe, overrides)
    if isinstance(recipe, Chain):
        recipes = [stage.stand_in for stage in recipe.stages if stage.stand_in is not None]
    else:
        recipes = [recipe]
    if options.sample is not None:
        from grace_rl.evaluate.samples import print_samples

        if options.sample < 1:
            raise UserError(f"--sample: must be at least 1, not {options.sample}")
        for one in recipes:
            print_samples(one, options.sample)
        return 0
    if options.oracle:
        from grace_rl.evaluate.oracle import print_oracle_table

        for one in recipes:
            print_oracle_table(one)
        return 0
    from grace_rl.recipe import describe
    from grace_rl.run.screen import Screen

    console = Screen()
    flights = []
    if isinstance(recipe, Chain):
        print_stages(recipe, launch, processes)
    for one in recipes:
        flight = preflight(one, launch=launch, processes=processes, rewards=True)
        with counted(processes):
            plan = describe(one, len(flight.rows))
        console.print(screen(plan, flight.findings))
        flights.append(flight)
    findings = [finding for flight in flights for finding in flight.findings]
    advice = suggestions(findings)
    if advice:
        console.print("what helps most:", highlight=False)
    for line in advice:
        console.print(f"  - {line}", highlight=False, markup=False, soft_wrap=True)
    refuse(flights)
    if any(finding.level == "problem" for finding in findings):
        return 2
    say("recipe, rows and rewards are in order")
    return 0


def screen(plan: list[str], findings: list[Finding]) -> RenderableType:
    """One line for each thing that was looked at.

    Args:
        plan: From `grace_rl.recipe.describe`.
        findings: From `preflight`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from grace_rl.run.screen import add_findings

    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, expand=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in plan:
        name, _, found = line.partition(" ")
        table.add_row("", name, Text(found.strip()))
    table.add_section()
    add_findings(table, findings)
    return table


def suggestions(findings: list[Finding]) -> list[str]:
    """At most three, those for problems before those for warnings."""
    ranked = sorted(findings, key=lambda f: ("problem", "warning", "ok").index(f.level))
    given = [advice for finding in ranked for advice in finding.advice]
    return list(dict.fromkeys(given))[:SUGGESTIONS]
